"""From encoded pictures of any colour mode to uint8 arrays, by Pillow.

Grey stays grey where every picture of a source is grey; otherwise all become RGB. What is transparent is laid over
white. 16-bit grey keeps its upper 8 bits. The orientation that a camera noted is applied. Modes without a scale of
their own (32-bit integers and floats) are refused.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from fedofa.data.extras import missing_extra
from fedofa.types.errors import DatasetError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Encoded = bytes | Path
"""A file's content, or where the file lies."""

_GREY_MODES = ("1", "L", "LA")
_GREY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded picture, and what errors call it."""

    name: str
    content: Encoded


def count_channels(pictures: Iterable[Picture]) -> int:
    """Return 1 when all pictures are grey and 3 otherwise; reads no more than headers, up to the first colour.

    Raises `DatasetError` naming a picture that is unreadable or has a mode without a scale.
    """
    return 1 if all(_read(picture, _is_grey) for picture in pictures) else 3


def decode_pictures(
    pictures: Iterable[Picture], channels: int, image_size: int | None
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield each picture as `(channels, height, width)`.

    Args:
        channels: 1 for grey, 3 for RGB.
        image_size: side in pixels; the largest centred square is cut out and resized (bilinear, antialiased). None
            keeps the size, which must then be the same for all.

    Raises `DatasetError` naming the picture that is unreadable or of another size.
    """
    first = None
    for picture in pictures:
        image = _read(picture, lambda opened: _pixels(opened, channels, image_size))
        first = first or (picture.name, image.shape)
        if image.shape != first[1]:
            raise DatasetError(
                f"image {picture.name} has shape {image.shape}, but the first, {first[0]}, has {first[1]}: "
                "give data.image_size to resize all, or use images of one size"
            )
        yield image


def check_image_size(image_size: int | None) -> None:
    """Raise `DatasetError` unless the setting is absent or a positive number of pixels."""
    if image_size is not None and image_size < 1:
        raise DatasetError(f"data.image_size: expected at least 1 pixel or null, found {image_size}")


def _read(picture: Picture, use: "Callable[[Image], T]") -> T:
    """Open a picture and hand it to `use`; whatever Pillow objects to is one `DatasetError`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "decode images") from error
    content = io.BytesIO(picture.content) if isinstance(picture.content, bytes) else picture.content
    try:
        with Image.open(content) as opened:
            return use(opened)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, DatasetError):
            raise DatasetError(f"image {picture.name}: {error}") from error
        raise DatasetError(f"image {picture.name} is not a readable image ({error}): replace or remove it") from error


def _is_grey(image: "Image") -> bool:
    if image.mode in _GREY_MODES or image.mode in _GREY16_MODES:
        return True
    if image.mode in _COLOUR_MODES:
        return False
    known = ", ".join((*_GREY_MODES, *_GREY16_MODES, *_COLOUR_MODES))
    raise DatasetError(f"expected one of the colour modes {known}, found {image.mode!r}: convert it")


def _pixels(image: "Image", channels: int, image_size: int | None) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageOps

    _is_grey(image)  # refuses modes without a scale
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _GREY16_MODES:
        upright = Image.fromarray((np.asarray(upright).astype(np.uint16) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    flat = upright.convert("L" if channels == 1 else "RGB")
    if image_size is not None:
        flat = ImageOps.fit(flat, (image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(flat)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

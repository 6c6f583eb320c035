"""Packages that only the `simulation` extra installs: the one error without them, and quiet where one is chatty."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fedofa.types.errors import DatasetError


def missing_extra(package: str, purpose: str) -> DatasetError:
    """Return the error to raise when `package` cannot be imported although `purpose` needs it."""
    return DatasetError(
        f"the package {package!r} is needed to {purpose}, but it is not installed: run pip install 'fedofa[simulation]'"
    )


@contextmanager
def silenced_datasets(purpose: str) -> Iterator[None]:
    """Keep progress bars, advice and log lines of the package `datasets`, which `purpose` needs, off the terminal."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", purpose) from error
    had_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        try:
            yield
        finally:
            datasets.logging.set_verbosity(verbosity)
            if had_bars:
                datasets.enable_progress_bars()

"""Inputs of a subnet from stored pixels, against the same arithmetic by hand."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedofa.finetune.inputs import ImageForm, prepare_inputs, stored_inputs

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 2, 12, 10), dtype=np.uint8)
MEAN, STD = [0.25, 0.5], [0.1, 0.4]
MEASURED = np.random.default_rng(2).normal(3.0, 2.0, (3, 2, 12, 10)).astype(np.float32)


def test_pixels_are_scaled_and_normalised_per_channel():
    kept = IMAGES.copy()
    found = prepare_inputs(IMAGES, MEAN, STD)
    expected = (IMAGES / 255 - np.array(MEAN).reshape(2, 1, 1)) / np.array(STD).reshape(2, 1, 1)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(IMAGES, kept)


@pytest.mark.parametrize("resolution", [6, 16])
def test_resizing_is_bilinear_and_antialiased_to_a_square(resolution):
    plain = prepare_inputs(IMAGES, MEAN, STD)
    found = prepare_inputs(IMAGES, MEAN, STD, resolution)
    assert found.shape == (3, 2, resolution, resolution)
    smoothed = functional.interpolate(plain, size=(resolution, resolution), mode="bilinear", antialias=True)
    assert torch.equal(found, smoothed)
    rough = functional.interpolate(plain, size=(resolution, resolution), mode="bilinear")
    assert torch.allclose(found, rough, atol=1e-4) == (resolution == 16), "smoothing matters on the way down"


def test_a_constant_image_stays_constant():
    found = prepare_inputs(np.full((1, 1, 9, 9), 51, np.uint8), [0.0], [1.0], 4)
    torch.testing.assert_close(found, torch.full((1, 1, 4, 4), 0.2))


def test_the_right_size_is_left_alone_and_slices_are_taken():
    square = IMAGES[:, :, 1:11]
    assert torch.equal(prepare_inputs(square, MEAN, STD, 10), prepare_inputs(square, MEAN, STD))


@pytest.mark.parametrize("by_row", [False, True])
def test_measurements_are_taken_as_they_are_and_normalised_per_channel_or_row(by_row):
    values = np.random.default_rng(1).normal(3.0, 2.0, (4, 2, 3, 5)).astype(np.float32)
    mean = np.arange(6.0) if by_row else np.arange(2.0)
    std = mean + 0.5
    shape = (2, 3, 1) if by_row else (2, 1, 1)
    found = prepare_inputs(values, mean.tolist(), std.tolist())
    np.testing.assert_allclose(found.numpy(), (values - mean.reshape(shape)) / std.reshape(shape), rtol=1e-5, atol=1e-6)
    assert prepare_inputs(values, mean.tolist(), std.tolist(), 8).shape == (4, 2, 8, 8)


@pytest.mark.parametrize("images", [IMAGES, MEASURED], ids=["pixels", "measurements"])
@pytest.mark.parametrize("resolution", [None, 6, 16])
def test_a_part_is_prepared_to_the_bits_of_the_whole_and_nothing_stored_changes(images, resolution):
    kept = images.copy()
    kept.setflags(write=False)
    stored = stored_inputs(kept, MEAN, STD, resolution)
    whole = prepare_inputs(images, MEAN, STD, resolution)
    part = torch.tensor([2, 0, 2])
    assert len(stored) == 3
    assert torch.equal(stored[part], whole[part])
    assert torch.equal(stored[1:3], whole[1:3])
    assert torch.equal(torch.cat(list(stored.split(2))), whole)
    assert np.shares_memory(stored.images.numpy(), kept)
    np.testing.assert_array_equal(kept, images)


def test_a_form_says_what_examples_take_and_gives_their_shapes():
    pixels = ImageForm((2, 12, 10), resolution=6)
    assert pixels.stored_bytes == IMAGES[0].nbytes
    assert pixels.input_shape == (2, 6, 6)
    assert pixels.on_meta(3)[torch.tensor([0, 1])].shape == (2, 2, 6, 6)
    measured = ImageForm((2, 12, 10), 4)
    assert measured.stored_bytes == MEASURED[0].nbytes
    assert measured.input_shape == (2, 12, 10)
    assert measured.on_meta(3)[:].shape == (3, 2, 12, 10)

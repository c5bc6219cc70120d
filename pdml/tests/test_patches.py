"""Patches against np.pad, and the symmetries against numpy's own turns and flips."""

import numpy as np
import pytest
import torch

from pdml.patches import PatchSource, augment, symmetries
from shared.data.keyed import keyed_bits
from shared.errors import UserError


def _cube(height, width, bands, dtype=np.float32):
    bits = keyed_bits(1, np.arange(height * width * bands)) % 1000
    return bits.astype(dtype).reshape(height, width, bands)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
@pytest.mark.parametrize(("height", "width", "size"), [(7, 11, 3), (4, 9, 5), (5, 6, 9), (3, 2, 1)])
def test_patches_equal_windows_of_the_mirrored_cube(height, width, size, dtype):
    cube, radius = _cube(height, width, 4, dtype), size // 2
    padded = np.pad(cube, ((radius, radius), (radius, radius), (0, 0)), mode="reflect").astype(np.float32)
    rows, columns = np.divmod(np.arange(height * width), width)
    patches = PatchSource(cube, size).gather(rows, columns)
    assert patches.dtype == torch.float32
    for patch, row, column in zip(patches.numpy(), rows, columns, strict=True):
        window = padded[row : row + size, column : column + size]
        np.testing.assert_array_equal(patch, window.transpose(2, 0, 1))


def test_label_patches_line_up_with_spectra():
    cube = _cube(6, 8, 1)
    source, rows, columns = PatchSource(cube, 5), np.array([0, 3, 5]), np.array([7, 2, 0])
    labels = source.gather_map(cube[..., 0].astype(np.int16), rows, columns)
    np.testing.assert_array_equal(source.gather(rows, columns)[:, 0].numpy(), labels.numpy())


def test_changing_a_patch_leaves_the_cube_alone():
    cube = _cube(5, 5, 2)
    before = cube.copy()
    PatchSource(cube, 3).gather(np.arange(5), np.arange(5)).zero_()
    np.testing.assert_array_equal(cube, before)


def test_an_even_patch_or_one_that_cannot_be_mirrored_is_refused():
    PatchSource(np.zeros((5, 9, 2)), 9)
    with pytest.raises(UserError, match="odd"):
        PatchSource(np.zeros((9, 9, 2)), 4)
    with pytest.raises(UserError, match="at most 9"):
        PatchSource(np.zeros((5, 9, 2)), 11)


def test_the_symmetries_are_the_eight_of_the_square():
    square = np.arange(9).reshape(3, 3)
    expected = {np.rot90(face, k).tobytes() for face in (square, np.fliplr(square)) for k in range(4)}
    assert {face.tobytes() for face in symmetries(3).reshape(8, 3, 3)} == expected and len(expected) == 8
    np.testing.assert_array_equal(symmetries(3)[0], square.reshape(-1))


def test_augmentation_turns_labels_with_their_spectra_and_depends_on_the_patch_alone():
    patches = torch.from_numpy(_cube(64, 25, 3)).reshape(64, 5, 5, 3).permute(0, 3, 1, 2)
    labels = patches[:, 1].to(torch.int64)
    index = np.arange(64)
    turned, turned_labels = augment(patches, labels, (7, 2, index))
    assert torch.equal(turned[:, 1].to(torch.int64), turned_labels)
    assert torch.equal(turned[..., 2, 2], patches[..., 2, 2])
    drawn = (keyed_bits(7, 2, index) % np.uint64(8)).astype(int)
    assert set(drawn) == set(range(8))
    for patch, result, symmetry in zip(patches, turned, drawn, strict=True):
        expected = patch.reshape(3, 25)[:, symmetries(5)[symmetry]].reshape(3, 5, 5)
        assert torch.equal(result, expected)
    part, none = augment(patches[40:].contiguous(), None, (7, 2, index[40:]))
    assert torch.equal(part, turned[40:]) and none is None


def test_augmentation_refuses_keys_that_do_not_name_every_patch():
    with pytest.raises(ValueError, match="keys"):
        augment(torch.zeros(4, 2, 3, 3), None, (0, 0))

"""MATLAB files: round trips through both formats, and one clear sentence for every bad file."""

import os

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pdml.matlab import read_mat
from shared.errors import UserError

# The folder of a test is reused by hypothesis: every example writes its file anew.
REUSED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)

CLASSES = {"uint8": "uint8", "int16": "int16", "float32": "single", "float64": "double"}
ARRAYS = st.sampled_from(sorted(CLASSES)).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=2, max_dims=4, max_side=6))
)


def write_v73(path, variables):
    """Write what MATLAB's -v7.3 writes: 512 bytes of user block, axes reversed, the class as an attribute."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in variables.items():
            data = file.create_dataset(name, data=np.asarray(array).T)
            data.attrs["MATLAB_class"] = np.bytes_(CLASSES.get(str(array.dtype), "char"))
    with open(path, "r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


WRITERS = {
    "v5": lambda path, variables: scipy.io.savemat(path, variables),
    "v5 compressed": lambda path, variables: scipy.io.savemat(path, variables, do_compression=True),
    "v7.3": write_v73,
}
every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@every_format
@REUSED_FOLDER
@given(array=ARRAYS)
def test_an_array_comes_back_as_it_was_written(write, array, tmp_path):
    write(tmp_path / "scene.mat", {"cube": array, "other": np.zeros((2, 2))})
    read = read_mat(tmp_path / "scene.mat", "cube")
    assert read.shape == array.shape and read.dtype == array.dtype
    assert read.flags.c_contiguous and read.dtype.isnative
    assert np.array_equal(read, array, equal_nan=array.dtype.kind == "f")


@every_format
def test_a_wrong_key_lists_the_keys_that_are_there(write, tmp_path):
    write(tmp_path / "scene.mat", {"cube": np.zeros((2, 3)), "labels": np.ones((2, 3))})
    for key in ("Cube", "__header__", "#refs#", "cube/x"):
        with pytest.raises(UserError, match=r"scene\.mat holds no variable .*\(cube, labels\)"):
            read_mat(tmp_path / "scene.mat", key)


@every_format
def test_a_file_cut_short_anywhere_is_refused(write, tmp_path):
    values = np.arange(3000, dtype=np.float64).reshape(50, 60) ** 0.5
    write(tmp_path / "whole.mat", {"cube": values})
    content = (tmp_path / "whole.mat").read_bytes()
    assert np.array_equal(read_mat(tmp_path / "whole.mat", "cube"), values)
    for length in [0, 1, 100, 127, 140, 300, 600, len(content) // 2, len(content) - 100]:
        (tmp_path / "cut.mat").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cut\.mat (is truncated|is no MATLAB).*download it again"):
            read_mat(tmp_path / "cut.mat", "cube")


def test_a_missing_file_a_folder_and_a_foreign_file_are_refused_by_name(tmp_path):
    (tmp_path / "page.mat").write_text("<html>404 Not Found</html>" * 100)
    for name, words in {"absent.mat": "is missing", ".": "is missing", "page.mat": "is no MATLAB"}.items():
        with pytest.raises(UserError, match=words):
            read_mat(tmp_path / name, "cube")


@pytest.mark.parametrize(
    "value",
    ["text", {"field": 1.0}, np.array([1 + 2j]), scipy.sparse.eye(3), np.array([["a", 1]], dtype=object)],
    ids=["text", "struct", "complex", "sparse", "cell"],
)
def test_what_is_not_real_numbers_is_refused_in_v5(value, tmp_path):
    scipy.io.savemat(tmp_path / "scene.mat", {"cube": value})
    with pytest.raises(UserError, match="'cube' is not an array of real numbers"):
        read_mat(tmp_path / "scene.mat", "cube")


def test_what_is_not_real_numbers_is_refused_in_v73(tmp_path):
    variables = {"text": np.array([[72, 105]], np.uint16), "complex": np.array([[1 + 2j]])}
    write_v73(tmp_path / "scene.mat", variables)
    with h5py.File(tmp_path / "scene.mat", "a") as file:
        file.create_group("struct")
    for key in ("text", "complex", "struct"):
        with pytest.raises(UserError, match=f"'{key}' is not an array of real numbers"):
            read_mat(tmp_path / "scene.mat", key)


def test_an_hdf5_file_without_matlab_header_is_read_by_its_signature(tmp_path):
    with h5py.File(tmp_path / "scene.mat", "w") as file:
        file["cube"] = np.arange(6).reshape(3, 2)
    assert np.array_equal(read_mat(tmp_path / "scene.mat", "cube"), np.arange(6).reshape(3, 2).T)


def test_an_empty_v73_array_has_its_own_shape_and_not_that_of_its_placeholder(tmp_path):
    write_v73(tmp_path / "scene.mat", {})
    with h5py.File(tmp_path / "scene.mat", "a") as file:
        file["cube"] = np.array([0, 5], np.uint64)
        file["cube"].attrs["MATLAB_empty"] = np.uint8(1)
    assert read_mat(tmp_path / "scene.mat", "cube").shape == (0, 5)


def test_real_label_map_of_indian_pines_has_its_16_classes():
    root = os.environ.get("DATA_ROOT")
    if not root:
        pytest.skip("DATA_ROOT is not set: the label map of Indian Pines is not embedded")
    labels = read_mat(f"{root}/hsi/ground_truth/indian_pines_corrected_gt.mat", "indian_pines_gt")
    assert labels.shape == (145, 145) and np.count_nonzero(labels) == 10249
    assert np.unique(labels).tolist() == list(range(17))

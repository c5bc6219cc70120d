"""CIFAR as it is published, in tiny files of its form."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from shared.data import images, manifest
from shared.data.images import load_image_set
from shared.errors import UserError


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Return what writes a set of two images a file, by the manifest's files, under checksums of their own."""

    def dump(path, content: dict) -> str:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    def write(name: str) -> list[tuple[np.ndarray, list[int]]]:
        original, rng, parts, sums = images.CIFAR[name], np.random.default_rng(0), [], []
        fine = "labels" if name == "cifar10" else "fine_labels"
        *files, meta = [tmp_path / entry.path for entry in manifest.load_manifest(name).files]
        for number, path in enumerate(files):
            parts.append((rng.integers(0, 256, (2, 3072), dtype=np.uint8), [number, 9 - number]))
            sums.append([path.name, dump(path, {"data": parts[-1][0], "coarse_labels": [0, 0], fine: parts[-1][1]})])
        key = original.meta["key"]
        sums_of_meta = {"filename": meta.name, "key": key, "md5": dump(meta, {key: list("abcdefghij")})}
        lists = {"train_list": sums[:-1], "test_list": sums[-1:], "meta": sums_of_meta}
        monkeypatch.setitem(images.CIFAR, name, type(original.__name__, (original,), lists))
        return parts

    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_keeps_the_pixels_the_labels_and_the_order_of_its_files(cifar, tmp_path, name):
    parts = cifar(name)
    for split, chosen in {"train": parts[:-1], "test": parts[-1:]}.items():
        read = load_image_set(name, split, tmp_path)
        pixels = np.concatenate([data.reshape(-1, 3, 32, 32) for data, _ in chosen])  # rows are planes of colour
        assert read.classes == tuple("abcdefghij") and read.labels.dtype == np.int64
        assert read.labels.tolist() == [label for _, labels in chosen for label in labels]
        assert torch.equal(read.batch(np.arange(len(read))), torch.from_numpy(pixels))


def test_cifar_files_that_are_others_are_one_sentence(cifar, tmp_path):
    cifar("cifar100")
    path = tmp_path / "cifar-100-python/test"
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(UserError, match=r"cifar100 in .* is not as published: get the data again, source: A\. Kriz"):
        load_image_set("cifar100", "train", tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="cifar-100-python/test is missing in DATA_ROOT=.*: set DATA_ROOT=<folder>"):
        load_image_set("cifar100", "train", tmp_path)

"""Label maps under the names that their distributors use, and ENVI's text lists of regions."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from pdml.files import OTHER_NAMES, read_map, read_regions
from pdml.tests.test_scenes import bring, data_config, real_data_root
from shared.data.manifest import load_manifest
from shared.errors import UserError

CASES = [
    ("indian-pines", "indian_pines/Indian_pines_gt.mat", "indian_pines_gt"),
    ("indian-pines", "ground_truth/Indian_pines_gt.mat", "indian_pines_gt"),
    ("pavia-university", "pavia_university/PaviaU_gt.mat", "paviaU_gt"),
    ("ksc", "ksc/KSC_gt.mat", "KSC_gt"),
    ("salinas", "salinas/Salinas_gt.mat", "salinas_gt"),
]
SPLITS = [
    ("2013_IEEE_GRSS_DF_Contest_Samples_TR.txt", "2013_IEEE_GRSS_DF_Contest_Samples_VA.txt"),
    ("2013_IEEE_GRSS_DF_Contest_Samples_TR.tif", "2013_IEEE_GRSS_DF_Contest_Samples_VA.tif"),
    ("TRLabel.mat", "TSLabel.mat"),
]


def counted_map(manifest: str, key: str, shape: tuple[int, int]) -> np.ndarray:
    """Return a map (H, W) uint8 that has as many pixels of each class as the manifest counts."""
    counts = load_manifest(manifest).counts[key]
    labels = np.zeros(shape[0] * shape[1], np.uint8)
    labels[: sum(counts)] = np.repeat(np.arange(1, len(counts) + 1), counts)
    return labels[::-1].reshape(shape)


def regions(labels: np.ndarray, blocks: bool) -> str:
    """Return a map as ENVI exports it: all headers first, or each region's before its pixels."""
    rows, columns = labels.shape
    head = ["; ENVI Output of ROIs (4.8)", f"; Number of ROIs: {labels.max()}", f"; File Dimension: {columns} x {rows}"]
    headers, points = [], []
    for number in range(1, labels.max() + 1):
        row, column = np.nonzero(labels == number)
        headers.append([f"; ROI name: region {number}", "; ROI rgb value: {0, 205, 0}", f"; ROI npts: {len(row)}"])
        triples = enumerate(zip(column + 1, row + 1, strict=True), 1)
        points.append([f"  {n}  {x}  {y}  29.7  -95.3" for n, (x, y) in triples])
    if blocks:
        parts = [[*header, ";   ID    X    Y", *lines, ""] for header, lines in zip(headers, points, strict=True)]
    else:
        parts = [*headers, [";   ID    X    Y"], *([*lines, ""] for lines in points)]
    return "\n".join([*head, *(line for part in parts for line in part)])


@pytest.mark.parametrize(("data", "place", "key"), CASES)
def test_the_university_s_own_name_is_taken_and_its_checksum_recorded(data, place, key, tmp_path):
    cfg = data_config(data)
    labels = counted_map(cfg.manifest, key, (cfg.height, cfg.width))
    path = tmp_path / "hsi" / place
    path.parent.mkdir(parents=True)
    savemat(path, {key: labels.astype(np.float64)}, do_compression=True)
    values, source = read_map(cfg, str(tmp_path), cfg.labels_file, cfg.labels_key)
    assert source == path and np.array_equal(values, labels)
    assert place in (tmp_path / f".sha256/{cfg.manifest}.json").read_text()
    savemat(path, {key: labels[::-1]}, do_compression=True)  # the same counts, another file
    with pytest.raises(UserError, match="wrong checksum"):
        read_map(cfg, str(tmp_path), cfg.labels_file, cfg.labels_key)


@pytest.mark.parametrize("names", SPLITS, ids=["txt", "tif", "mat"])
def test_houston_s_maps_are_taken_as_the_contest_and_published_code_name_them(names, tmp_path):
    cfg = data_config("houston-2013")
    folder = tmp_path / "hsi/houston_2013"
    folder.mkdir(parents=True)
    pairs = (cfg.train_labels_file, cfg.train_labels_key), (cfg.test_labels_file, cfg.test_labels_key)
    for name, (file, key) in zip(names, pairs, strict=True):
        labels = counted_map("houston_2013", key, (349, 1905))
        if name.endswith("txt"):
            (folder / name).write_text(regions(labels, blocks=key.endswith("tr")))
        elif name.endswith("tif"):
            Image.fromarray(labels).save(folder / name)
        else:
            savemat(folder / name, {name[:-4]: labels})
        values, path = read_map(cfg, str(tmp_path), file, key)
        assert path.name == name and np.array_equal(values, labels)


def test_a_map_with_other_pixels_of_the_classes_is_refused_before_its_checksum_is_recorded(tmp_path):
    cfg = data_config("pavia-university")
    labels = counted_map(cfg.manifest, "paviaU_gt", (610, 340))
    labels[labels == 9] = 8
    (tmp_path / "hsi/pavia_university").mkdir(parents=True)
    savemat(tmp_path / "hsi/pavia_university/PaviaU_gt.mat", {"paviaU_gt": labels})
    with pytest.raises(UserError, match=r"PaviaU_gt\.mat has other pixels of the classes than paviaU_gt"):
        read_map(cfg, str(tmp_path), cfg.labels_file, cfg.labels_key)
    assert not (tmp_path / ".sha256").exists()


def test_without_any_of_its_names_the_manifest_s_is_asked_for(tmp_path):
    cfg = data_config("indian-pines")
    (tmp_path / "hsi").mkdir()
    with pytest.raises(UserError, match="put hsi/ground_truth/indian_pines_corrected_gt.mat there"):
        read_map(cfg, str(tmp_path), cfg.labels_file, cfg.labels_key)


def test_the_manifest_s_own_file_comes_first(tmp_path):
    cfg = data_config("indian-pines", "data.manifest=null")
    bring(cfg, tmp_path)
    savemat(tmp_path / "hsi/ground_truth/Indian_pines_gt.mat", {"indian_pines_gt": np.ones((145, 145))})
    assert read_map(cfg, str(tmp_path), cfg.labels_file, cfg.labels_key)[1].name == "indian_pines_corrected_gt.mat"


def test_pavia_s_maps_of_published_code_are_those_of_the_row_under_another_name():
    truth, other = (f"{real_data_root()}/hsi/{name}" for name in ("ground_truth", "indian_pines_train_pixels"))
    for key in ("TRpavia_fixed", "TSpavia_fixed"):
        name, variable = OTHER_NAMES[key][1]
        assert np.array_equal(loadmat(f"{truth}/{key}.mat")[key], loadmat(f"{other}/{name}")[variable])


@pytest.mark.parametrize("text", ["", "; ROI npts: 2\n 1 1 1\n", "; ROI npts: 1\n 1 9 1\n", "; ROI npts: 1\n 1 0 1\n"])
def test_a_list_of_regions_that_does_not_fit_is_refused(text, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"list\.txt is no list of regions of \(4, 5\) pixels"):
        read_regions(path, (4, 5))

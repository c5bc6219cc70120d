"""Scenes from configs: all configs run on files of the right shape, and bad files give one sentence."""

import os
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.io import loadmat, savemat
from scipy.ndimage import maximum_filter

from pdml.matlab import read_mat
from pdml.resample import halve, pixel_sides, resample_scene
from pdml.scenes import load_scene
from shared.claims.compose import row_config
from shared.data.manifest import load_manifest
from shared.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
ALL = sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))
# The two largest cubes take seconds to write and read.
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("ksc", "houston-2013")]
BENCHMARKS = ["indian-pines", "pavia-university", "salinas", *LARGE]
# The mixture of the distributed endmembers explains the cube up to a relative error of 0.16; pixels in the
# wrong order would leave 0.83.
RESIDUAL = 0.2


def data_config(name: str, *overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(overrides=[f"+data={name}", *overrides]).data


def real_data_root() -> str:
    if not os.environ.get("DATA_ROOT"):
        pytest.skip("DATA_ROOT is not set: the real scenes are not available")
    return os.environ["DATA_ROOT"]


def striped(cfg) -> np.ndarray:
    """Return a uint8 label map: five columns of each class in turn, every fifth row empty."""
    stripes = (np.arange(cfg.width) // 5) % len(cfg.class_names) + 1
    return np.where(np.arange(cfg.height)[:, None] % 5 == 0, 0, stripes).astype(np.uint8)


def bring(cfg, root: Path, cube=None, labels=None) -> Path:
    """Write a cube and its label maps, of the config's shape unless given, where the config expects them."""
    labels = striped(cfg) if labels is None else labels
    cube = np.zeros((cfg.height, cfg.width, cfg.bands), np.uint8) if cube is None else cube
    (root / cfg.cube_file).parent.mkdir(parents=True)
    (root / "hsi/ground_truth").mkdir(parents=True)
    savemat(root / cfg.cube_file, {cfg.cube_key: cube}, do_compression=True)
    if cfg.labels_file:
        savemat(root / cfg.labels_file, {cfg.labels_key: labels})
    else:
        even = np.arange(cfg.height)[:, None] % 2 == 0
        train, test = np.where(even, labels, 0), np.where(even, 0, labels)
        savemat(root / cfg.train_labels_file, {cfg.train_labels_key: train, cfg.test_labels_key: test})
    return root


@pytest.fixture
def small(tmp_path):
    """A scene of 12 x 15 pixels, 6 bands and 3 classes: its config, and what to write where."""
    sizes = ("height=12", "width=15", "bands=6", "manifest=null", "class_names=[a,b,c]", "colours=[a,b,c]")
    cfg = data_config("pavia-university", *(f"data.{size}" for size in sizes))
    return cfg, tmp_path, np.arange(12 * 15 * 6, dtype=np.float64).reshape(12, 15, 6)


def test_every_config_has_the_same_keys_and_a_colour_for_each_class():
    keys = set()
    for name in ALL:
        cfg = data_config(name)
        keys.add((frozenset(cfg), frozenset(cfg.split)))
        assert len(set(cfg.colours)) == len(set(cfg.class_names)) == len(cfg.colours)
        assert cfg.split.kind != "disjoint" and cfg.split.block >= 20, "every scene can be split into blocks"
    assert len(ALL) == 8 and len(keys) == 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_runs_the_moment_files_of_the_right_shape_are_there(name, tmp_path):
    # Made-up files have no known checksum, hence no manifest.
    splits = [], ["data.split.kind=disjoint"]
    configs = [data_config(name, "data.manifest=null", *split) for split in splits]
    bring(configs[0], tmp_path)
    for cfg in configs:
        scene, split = load_scene(cfg, 0, 9, str(tmp_path))
        assert scene.cube.shape == (cfg.height, cfg.width, cfg.bands) and scene.cube.flags.c_contiguous
        assert split.train.any() and split.test.any() and not (split.train & split.test).any()
        assert (split.blocks is not None) == (cfg.split.kind == "disjoint")


def test_benchmark_cube_and_the_real_label_map_pass_the_manifest(tmp_path):
    cfg = data_config("indian-pines")
    truth = Path(real_data_root()) / "hsi/ground_truth"
    bring(cfg, tmp_path)
    (tmp_path / cfg.labels_file).write_bytes((truth / Path(cfg.labels_file).name).read_bytes())
    scene, split = load_scene(cfg, 0, 9, str(tmp_path))
    assert (scene.labels > 0).sum() == 10249 and split.train.sum() + split.test.sum() == 10249


@pytest.mark.parametrize("kind", ["percent", "disjoint"])
def test_synthetic_scene_needs_no_data_and_says_that_it_is_synthetic(kind):
    cfg = data_config("synthetic", f"data.split.kind={kind}")
    scene, split = load_scene(cfg, 0, 9, None)
    assert "synthetic" in scene.name and scene.cube.shape == (48, 48, 64)
    assert np.array_equal(scene.labels, scene.abundances.argmax(2) + 1)
    assert split.classes.all() and split.test.sum() > 300
    again, other = load_scene(cfg, 1, 9, None)
    assert np.array_equal(scene.cube, again.cube) and not np.array_equal(split.train, other.train)


def test_jasper_cube_and_abundances_have_the_same_pixel_order():
    root = real_data_root()
    cfg = data_config("jasper")
    scene, split = load_scene(cfg, 0, 9, root)
    assert np.bincount(scene.labels.ravel()).tolist() == [0, 3493, 3326, 2428, 753]
    members = loadmat(Path(root) / cfg.abundances_file)["M"]  # (bands, 4), for a cube scaled to a maximum of 1
    cube = scene.cube / scene.cube.max()
    assert np.linalg.norm(cube - scene.abundances @ members.T) < RESIDUAL * np.linalg.norm(cube)
    # Column-major pixels: the second pixel of the file lies below the first.
    stored = read_mat(Path(root) / cfg.cube_file, cfg.cube_key)
    assert np.array_equal(scene.cube[1, 0], stored[:, 1]) and np.array_equal(scene.cube[0, 1], stored[:, 100])
    assert split.train.sum() == 70 + 67 + 49 + 16


@pytest.mark.parametrize("kind", ["percent", "disjoint", "official"])
def test_no_training_pixel_of_indian_pines_resampled_holds_a_test_half_spectrum(kind):
    root = real_data_root()
    sides = "regions" if kind == "disjoint" else "pixels"
    cfg = data_config("ip-resampled", f"data.split.kind={kind}", f"data.resample.sides={sides}")
    scene, split = load_scene(cfg, 3, 9, root)
    assert (scene.labels > 0).sum() == 10366 and "resampled" in scene.name
    if kind == "official":
        assert (split.train.sum(), split.test.sum()) == (695, 9671)
    spectra = read_mat(Path(root) / cfg.cube_file, cfg.cube_key)
    own = read_mat(Path(root) / cfg.resample.labels_file, cfg.resample.labels_key).ravel()
    settings = cfg.resample.sigma, cfg.resample.noise
    side = pixel_sides(scene.labels, split, sides, 9)
    cube, _, mixing = resample_scene(scene.labels, side, spectra.astype(np.float32), own, *settings, 3)
    assert np.array_equal(cube, scene.cube)
    half = halve(own, 3)
    assert [(half[own == number] == 0).sum() for number in (1, 14, 15, 16)] == [25, 7, 7, 7]
    assert mixing[split.train.ravel()][:, half == 1].nnz == 0
    assert mixing[split.test.ravel()][:, half == 0].nnz == 0
    drawn = [(mixing[:, half == side].sum(1) > 0).reshape(145, 145) for side in (0, 1)]
    holds = [maximum_filter(one, size=9) for one in drawn]  # whether a pixel's own patch has a spectrum of that half
    if kind == "disjoint":
        assert not maximum_filter(drawn[0], size=17)[split.test].any()  # patches that are fused included
        assert 0.4 < holds[1][split.train].mean() < 0.6
    else:
        assert holds[0][split.test].mean() > 0.95


def test_labels_of_indian_pines_resampled_are_numbered_as_its_spectra_are():
    root = real_data_root()
    cfg = data_config("ip-resampled", "data.split.kind=official")
    scene, split = load_scene(cfg, 0, 9, root)
    own = read_mat(Path(root) / cfg.resample.labels_file, cfg.resample.labels_key).ravel()
    # The spectra come in the map's column-major order.
    assert np.array_equal(scene.labels.T[split.train.T], own)


def published(cfg, root, train, labels, classes=(2, 1, 3)):
    bring(cfg, root, labels=labels)
    savemat(root / "hsi/ground_truth/train.mat", {"train": train})
    split = {"kind": "published", "map_file": "hsi/ground_truth/train.mat", "map_key": "train", "map_classes": classes}
    return OmegaConf.merge(cfg, {"split": split})


def test_a_published_training_map_trains_under_its_own_labels_and_leaves_the_rest_to_be_scored(small):
    cfg, root, _ = small
    labels = striped(cfg)
    train = np.zeros_like(labels)
    train[:6] = np.choose(labels[:6], [0, 2, 1, 3])  # classes 1 and 2 change places in this map
    labels[2, 0] = 0  # the training map labels a pixel that the label map does not
    scene, split = load_scene(published(cfg, root, train, labels), 0, 3, str(root))
    assert np.array_equal(split.train, train > 0) and np.array_equal(split.test, (labels > 0) & (train == 0))
    assert scene.labels[2, 0] == 1 and np.array_equal(scene.labels[labels > 0], labels[labels > 0])
    assert split.classes.all() and split.blocks is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"map_file": None}, r"name it in data\.split\.map_file"),
        ({"map_classes": [1, 2]}, r"train\.mat: the training map has a class 3.*names 2"),
    ],
)
def test_a_published_training_map_that_does_not_fit_is_refused(small, change, sentence):
    cfg, root, _ = small
    cfg = published(cfg, root, striped(cfg) * (np.arange(12)[:, None] < 6), striped(cfg))
    with pytest.raises(UserError, match=sentence):
        load_scene(OmegaConf.merge(cfg, {"split": change}), 0, 3, str(root))


def neighbours(split, radius: int) -> int:
    """Return how many scored pixels have a training pixel within ``radius`` (Chebyshev)."""
    return int((split.test & maximum_filter(split.train, size=2 * radius + 1)).sum())


def test_rows_on_published_maps_have_their_pixels_and_no_guard_band():
    root = real_data_root()
    cfg = row_config("pdml", "ip-resampled-published-map-ssrn-plain", 0)
    scene, split = load_scene(cfg.data, 0, cfg.patch_size, root)
    assert (split.train.sum(), split.test.sum(), split.classes.sum()) == (5689, 4677, 15)
    assert (neighbours(split, 4), neighbours(split, 8)) == (3307, 4580)  # in its own patch; in one that is fused
    labels = np.bincount(scene.labels[split.train])[1:]  # the published counts, in this scene's numbering
    counts = np.array(load_manifest("indian_pines_disjoint").counts["indianpines_disjoint_dset"])
    assert np.array_equal(labels[np.array(cfg.data.split.map_classes) - 1], counts)


@pytest.mark.parametrize(
    ("row", "train", "scored", "near"),
    [
        ("indian-pines-published-map-ssrn-plain", 5689, 4711, (3358, 4623)),
        ("pavia-university-published-map-ssrn-plain", 3921, 40002, (5446, 11480)),
    ],
)
def test_full_rows_on_published_maps_are_ready_for_the_cube(row, train, scored, near, tmp_path):
    truth = Path(real_data_root()) / "hsi/ground_truth"
    cfg = row_config("pdml", row, 0)
    data = cfg.data
    cube = np.zeros((data.height, data.width, data.bands), np.uint8)
    (tmp_path / data.cube_file).parent.mkdir(parents=True)
    savemat(tmp_path / data.cube_file, {data.cube_key: cube}, do_compression=True)
    (tmp_path / "hsi/ground_truth").symlink_to(truth)
    scene, split = load_scene(data, 0, cfg.patch_size, str(tmp_path))
    assert (split.train.sum(), split.test.sum()) == (train, scored) and split.classes.all()
    assert (neighbours(split, 4), neighbours(split, 8)) == near
    if data.labels_file:
        truth_map = read_mat(truth / Path(data.labels_file).name, data.labels_key)
        both = split.train & (truth_map > 0)
        assert (scene.labels[both] != truth_map[both]).sum() == 10  # of 5,538: class 7 of the one, 11 of the other


def test_dropped_bands_are_gone_and_floats_become_float32(small):
    cfg, root, cube = small
    cfg.drop_bands, cfg.bands = [1, 4], 4
    scene, _ = load_scene(cfg, 0, 3, str(bring(cfg, root, cube)))
    assert scene.cube.dtype == np.float32 and np.array_equal(scene.cube, cube[:, :, [0, 2, 3, 5]])


def test_column_major_pixels_come_out_as_rows_and_columns_and_the_largest_abundance_is_the_label(tmp_path):
    sizes = "height=6", "width=20", "bands=2", "manifest=null", "class_names=[a,b]", "colours=[a,b]"
    cfg = data_config("jasper", *(f"data.{size}" for size in sizes))
    share = np.arange(120) % 6 < 2  # the first material fills the upper two of six rows
    (tmp_path / cfg.cube_file).parent.mkdir(parents=True)
    savemat(tmp_path / cfg.cube_file, {cfg.cube_key: np.arange(240).reshape(2, 120)})
    savemat(tmp_path / cfg.abundances_file, {cfg.abundances_key: np.where(share, [[0.9], [0.1]], [[0.3], [0.7]])})
    scene, _ = load_scene(cfg, 0, 3, str(tmp_path))
    assert scene.cube[1, 0].tolist() == [1, 121] and scene.cube[0, 1].tolist() == [6, 126]
    assert (scene.labels[:2] == 1).all() and (scene.labels[2:] == 2).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_first_bad_band_is_named_with_its_file(small, value):
    cfg, root, cube = small
    cube[3, 4, 2] = cube[0, 0, 5] = value
    with pytest.raises(UserError, match=r"PaviaU\.mat: band 2 \(.*2 such bands.*data\.drop_bands"):
        load_scene(cfg, 0, 3, str(bring(cfg, root, cube)))


def test_cube_and_labels_of_different_size_are_named_together(small):
    cfg, root, cube = small
    labels = striped(cfg)[:, :-1]
    with pytest.raises(UserError, match=r"PaviaU\.mat and .*paviaU_gt\.mat: .*12 x 15 pixels.*12 x 14"):
        load_scene(cfg, 0, 3, str(bring(cfg, root, cube, labels)))


def test_scene_of_another_size_than_the_config_says_is_refused(small):
    cfg, root, cube = small
    bring(cfg, root, cube)
    cfg.width = 16
    with pytest.raises(UserError, match=r"paviaU_gt\.mat: .*\(12, 15\), the config says \(12, 16\)"):
        load_scene(cfg, 0, 3, str(root))


def test_wrong_number_of_bands_is_refused(small):
    cfg, root, cube = small
    with pytest.raises(UserError, match=r"PaviaU\.mat: the cube has 5 bands.*keeps 6 and drops 0"):
        load_scene(cfg, 0, 3, str(bring(cfg, root, cube[:, :, :5])))


def test_label_map_with_fewer_classes_than_the_config_names_is_refused(small):
    cfg, root, cube = small
    labels = striped(cfg)
    labels[labels == 3] = 2
    with pytest.raises(UserError, match=r"paviaU_gt\.mat: the labels are \[1, 2\].*3 classes"):
        load_scene(cfg, 0, 3, str(bring(cfg, root, cube, labels)))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"cube_key": "other"}, r"PaviaU\.mat.*'other'.*paviaU"),
        ({"cube_file": "hsi/none.mat"}, r"none\.mat is missing"),
        ({"layout": "other"}, r"data\.layout"),
        ({"kind": "other"}, r"data\.kind"),
        ({"labels_from": "other"}, r"data\.labels_from"),
        ({"labels_from": "union"}, r"data\.train_labels_file"),
        ({"labels_from": "largest_abundance", "abundances_file": None}, r"data\.abundances_file"),
    ],
)
def test_config_that_does_not_fit_the_files_gives_one_sentence(small, change, sentence):
    cfg, root, cube = small
    bring(cfg, root, cube)
    with pytest.raises(UserError, match=sentence) as caught:
        load_scene(OmegaConf.merge(cfg, change), 0, 3, str(root))
    assert "\n" not in str(caught.value)


def test_truncated_file_even_patch_and_missing_data_root_are_refused(small):
    cfg, root, cube = small
    bring(cfg, root, cube)
    with pytest.raises(UserError, match="patch_size is 4: set an odd one"):
        load_scene(cfg, 0, 4, str(root))
    with pytest.raises(UserError, match="set DATA_ROOT"):
        load_scene(cfg, 0, 3, None)
    path = root / cfg.cube_file
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"PaviaU\.mat"):
        load_scene(cfg, 0, 3, str(root))

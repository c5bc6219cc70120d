"""PDML's training step and its batches: which labels it sees, and that a batch is a function of its key."""

import dataclasses

import numpy as np
import pytest
import torch

from pdml import train
from pdml.module import PatchBatches
from shared.claims.compose import compose
from shared.data.keyed import keyed_bits

SMALL = ["trainer.accelerator=cpu", "logger=none", "scale.steps=3", "optim.batch_size=8"]
P, R = 9, 4


def small_config(*overrides: str):
    return compose("pdml", [*SMALL, *overrides])


def noisy_outside_training(load_scene):
    """Wrap ``load_scene``: every label and abundance but those of training pixels becomes noise."""

    def load(*arguments):
        scene, split = load_scene(*arguments)
        height, width = scene.labels.shape
        pixel = np.arange(height * width).reshape(height, width)
        noise = (keyed_bits(77, pixel) % np.uint64(len(scene.class_names) + 1)).astype(np.int16)  # 0 as well
        labels = np.where(split.train, scene.labels, noise)
        assert (labels != scene.labels)[split.test].mean() > 0.5
        abundances = np.where(split.train[..., None], scene.abundances, noise[..., None])
        return dataclasses.replace(scene, labels=labels, abundances=abundances), split

    return load


def trained(cfg, folder) -> dict[str, torch.Tensor]:
    _, _, module, data = train.prepare(cfg)
    trainer = train.fit(cfg, module, data, folder)
    assert trainer.global_step == cfg.scale.steps and module.skipped_steps == 0
    return module.state_dict()


@pytest.mark.parametrize("split, method", [("percent", "pdml"), ("disjoint", "pdml"), ("percent", "every-pixel")])
def test_noise_for_validation_and_test_labels_leaves_the_weights_bit_identical(split, method, tmp_path, monkeypatch):
    cfg = small_config(f"data.split.kind={split}", f"method={method}")
    clean = trained(cfg, tmp_path / "clean")
    monkeypatch.setattr(train, "load_scene", noisy_outside_training(train.load_scene))
    noisy = trained(cfg, tmp_path / "noisy")
    assert clean.keys() == noisy.keys() and all(torch.equal(clean[name], noisy[name]) for name in clean)


def test_other_labels_of_training_pixels_do_change_the_weights(tmp_path, monkeypatch):
    cfg = small_config()
    clean, load_scene = trained(cfg, tmp_path / "clean"), train.load_scene

    def load(*arguments):
        scene, split = load_scene(*arguments)
        labels = np.where(split.train, scene.labels % len(scene.class_names) + 1, scene.labels)
        return dataclasses.replace(scene, labels=labels.astype(np.int16)), split

    monkeypatch.setattr(train, "load_scene", load)
    other = trained(cfg, tmp_path / "other")
    assert any(not torch.equal(clean[name], other[name]) for name in clean)


def windows(mask: np.ndarray, centres) -> list[np.ndarray]:
    """Return the P x P neighbourhoods in ``mask``, mirrored at the border as the patches are."""
    padded = np.pad(mask, R, mode="reflect")
    return [padded[row : row + P, column : column + P] for row, column in centres]


def step(cfg, indices, monkeypatch):
    """Run one training step; return what the loss received, what was logged, the scene, split and centres."""
    scene, split, module, data = train.prepare(cfg)
    received, logged = [], {}
    loss = module.model.loss
    monkeypatch.setattr(module.model, "loss", lambda *a: received.append(a) or loss(*a))
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    batch = data.batches[(0, indices)]
    assert module.training_step(batch, 0).isfinite()
    centres = np.argwhere(split.train)[indices]
    return received[0], logged, scene, split, centres, batch


@pytest.mark.parametrize("method", ["pdml", "every-pixel"])
def test_every_labelled_training_pixel_of_a_patch_enters_the_loss_and_no_other(method, monkeypatch):
    indices = [0, 3, 17, 40, 41, 60]  # training pixel 0 lies at the border: mirrored pixels count as well
    cfg = small_config(f"method={method}")
    (rows, labels, keys), logged, scene, split, centres, batch = step(cfg, indices, monkeypatch)
    masked = np.where(split.train, scene.labels, 0)
    expected = windows(masked, centres)
    count = [int((window > 0).sum()) for window in expected]
    assert len(rows) == len(labels) == len(keys) == sum(count) == logged["labelled_pixels"]
    assert sum(count) > 2 * len(indices) and sum(count) < 0.2 * len(indices) * P**2
    # Patch after patch, the same labels whatever its augmentation; classes begin at 0 in the loss.
    for part, window in zip(labels.split(count), expected, strict=True):
        assert sorted((part + 1).tolist()) == sorted(window[window > 0].tolist())
    # Each label is at the place of its own spectrum.
    spectra = scene.cube.reshape(-1, scene.cube.shape[2])
    for b, r, c in batch.labels.nonzero().tolist():
        pixel = np.flatnonzero((spectra == batch.patches[b, :, r, c].numpy()).all(1))
        assert batch.labels[b, r, c] == masked.reshape(-1)[pixel[0]] and len(pixel) == 1


def test_plain_trains_on_the_centres_alone(monkeypatch):
    indices = [0, 3, 17, 40]
    (rows, labels, _), _, scene, _, centres, _ = step(small_config("method=plain"), indices, monkeypatch)
    assert len(rows) == 4 and (labels + 1).tolist() == [scene.labels[r, c] for r, c in centres]


@pytest.fixture(scope="module")
def scene_and_split():
    cfg = compose("pdml", [])
    return train.load_scene(cfg.data, 0, P, None)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batch_is_a_function_of_seed_epoch_and_indices(scene_and_split):
    batches = PatchBatches(*scene_and_split, P, seed=5)
    batch = batches[(2, [3, 9, 1, 30])]
    batches[(7, [0, 1])]  # what was asked for in between does not matter
    assert equal(batch, PatchBatches(*scene_and_split, P, seed=5)[(2, [3, 9, 1, 30])])
    # A sample is the same in any batch, so ranks may share a batch out between them.
    assert equal([x[[1, 3]] for x in batch], batches[(2, [9, 30])])
    for seed, epoch in ((5, 3), (6, 2)):
        other = PatchBatches(*scene_and_split, P, seed)[(epoch, [3, 9, 1, 30])]
        assert not torch.equal(batch.keys, other.keys)
        middle = (slice(None), slice(None), R, R)  # augmentation turns about the centre pixel
        assert torch.equal(batch.patches[middle], other.patches[middle])
    epochs = [batches[(epoch, [3, 9, 1, 30])] for epoch in range(6)]
    assert any(not torch.equal(batch.patches, other.patches) for other in epochs)


def test_keys_are_distinct_and_negative_at_the_centres_only(scene_and_split):
    batch = PatchBatches(*scene_and_split, P, seed=0)[(0, list(range(64)))]
    assert [x.dtype for x in batch] == [torch.float32, torch.int64, torch.int64]
    assert batch.patches.shape == (64, 64, P, P) and batch.labels.shape == batch.keys.shape == (64, P, P)
    assert len(batch.keys.unique()) == batch.keys.numel()
    negative = torch.zeros(P, P, dtype=torch.bool)
    negative[R, R] = True
    assert torch.equal(batch.keys < 0, negative.expand(64, P, P))
    assert (batch.labels[:, R, R] > 0).all()

"""Score a checkpoint of PDML or of a baseline and draw its maps, without training.

    make evaluate-pdml ROW=synthetic-random-ssrn-pdml SEED=0 [CKPT=runs/.../last.ckpt]

The scene and the split come from the config, as in training. The weights are read with ``weights_only=True``.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdml.maps import draw_maps
from pdml.model import PatchModel, build_model
from pdml.scenes import Scene, Split, load_scene
from pdml.train import evaluate
from shared.errors import UserError

# Relative difference of the mean training spectrum in float32; another split changes it by 1e-3 and more.
SAME_PIXELS = 1e-4
PREFIX = "model."  # of the network's tensors among those of the LightningModule


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the network's tensors by name and the optimiser steps taken; UserError for a damaged file."""
    remedy = "give the last.ckpt of a run, or train it again"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): {remedy}") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "global_step" not in content:
        raise UserError(f"{path} is no checkpoint of a run (it has no state_dict and global_step): {remedy}")
    named = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return named, int(content["global_step"])


def load_weights(model: PatchModel, state: dict[str, Tensor], row: str, path: Path) -> None:
    """Put the tensors into the model; UserError where they are not those of this very arrangement."""
    own = model.state_dict()
    unfit = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if unfit:
        raise UserError(
            f"{path} does not fit row {row}: {len(unfit)} tensors are missing, unknown or of another shape, such "
            f"as {unfit[0]}; give the row and the overrides that it was trained with"
        )
    model.load_state_dict(state)


def require_same_pixels(model: PatchModel, scene: Scene, split: Split, cfg, path: Path) -> None:
    """Raise UserError where the model was fitted to other training pixels: its own may be scored here."""
    mean = scene.cube[split.train].mean(0, dtype=np.float64)
    if not np.allclose(model.spectral.centre.cpu().numpy(), mean, rtol=SAME_PIXELS, atol=0):
        raise UserError(
            f"{path} was trained on other pixels than those of row {cfg.row} with seed {cfg.seed}, some of which "
            "would be scored here; give the row and the seed that it was trained with"
        )


def evaluate_checkpoint(cfg, path: Path, folder: Path) -> dict:
    """Return the metrics of a checkpoint as a run records them, and draw its maps into ``folder``.

    Raises UserError, before anything is written, for a missing or damaged checkpoint and for one of another
    row, seed or arrangement.
    """
    state, steps = read_checkpoint(path)
    model = build_model(cfg, cfg.data.bands, len(cfg.data.class_names))
    load_weights(model, state, cfg.row, path)
    if cfg.trainer.accelerator != "cpu" and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    scene, split = load_scene(cfg.data, cfg.seed, cfg.patch_size, cfg.paths.data_root)
    require_same_pixels(model, scene, split, cfg, path)
    metrics, prediction = evaluate(cfg, scene, split, model)
    metrics["steps_trained"] = f"{steps} of {cfg.scale.steps}"
    if cfg.output.maps:
        draw_maps(folder, scene, split, prediction)
    return metrics

"""Score a checkpoint of PDML or of a baseline and draw its maps, without training.

    make evaluate-pdml ROW=synthetic-random-ssrn-pdml SEED=0 [CKPT=runs/.../last.ckpt]

The scene and the split come from the config, as in training. The weights are read with ``weights_only=True``.
"""

from pathlib import Path

import hydra
import numpy as np

from pdml.config import CONFIGS, PDMLConfig
from pdml.maps import draw_maps
from pdml.model import PatchModel, build_model
from pdml.scenes import Scene, Split, load_scene
from pdml.train import evaluate
from shared.errors import UserError
from shared.training.application import command, run_evaluation
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.checks import device_of

# Relative difference of the mean training spectrum in float32; another split changes it by 1e-3 and more.
SAME_PIXELS = 1e-4


def require_same_pixels(model: PatchModel, scene: Scene, split: Split, cfg: PDMLConfig, path: Path) -> None:
    """Raise UserError where the model was fitted to other training pixels: its own may be among the scored ones."""
    mean = scene.cube[split.train].mean(0, dtype=np.float64)
    if not np.allclose(model.spectral.centre.cpu().numpy(), mean, rtol=SAME_PIXELS, atol=0):
        raise UserError(
            f"{path} was trained on other pixels than those of row {cfg.row} with seed {cfg.seed}, some of which "
            "would be scored here; give the row and the seed that it was trained with"
        )


def evaluate_checkpoint(cfg: PDMLConfig, path: Path, folder: Path) -> dict:
    """Return the metrics of a checkpoint as a run records them, and draw its maps into ``folder``.

    Raises UserError, before anything is written, for a missing or damaged checkpoint and for one of another
    row, seed or arrangement.
    """
    state, steps = read_checkpoint(path)
    model = build_model(cfg, cfg.data.bands, len(cfg.data.class_names))
    load_weights(model, state, cfg.row, path)
    model.to(device_of(cfg))
    scene, split = load_scene(cfg.data, cfg.seed, cfg.patch_size, cfg.paths.data_root)
    require_same_pixels(model, scene, split, cfg, path)
    metrics, prediction = evaluate(scene, split, model, cfg.method.readout, cfg.output)
    metrics["steps_trained"] = f"{steps} of {cfg.scale.steps}"
    if cfg.output.maps:
        draw_maps(folder, scene, split, prediction)
    return metrics


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: PDMLConfig) -> None:
    run_evaluation(cfg, evaluate_checkpoint)


if __name__ == "__main__":
    main()

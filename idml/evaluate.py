"""Score a checkpoint of IDML or of a baseline and draw its uncertainty, without training.

    make evaluate-idml ROW=digits-idml-pa SEED=0 [CKPT=runs/.../best-test-epoch.ckpt]

The images come from the config, as in training. The weights are read with ``weights_only=True``.
"""

from pathlib import Path

import hydra

from idml import classification
from idml.config import CONFIGS, IDMLConfig
from idml.data import evaluation_batches
from idml.figures import draw_uncertainty
from idml.model import build_classification_network, build_embedding_network
from idml.module import parameters_of
from idml.scoring import embed, scores
from idml.sets import load_retrieval_set
from idml.train import check
from idml.uncertainty import ambiguous_uncertainties, uncertainty_scores
from shared.data.images import load_image_set
from shared.training.application import command, run_evaluation
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.checks import device_of


def evaluate_checkpoint(cfg: IDMLConfig, path: Path, folder: Path) -> dict:
    """Return the scores of a checkpoint, and draw its uncertainty into ``folder``.

    Raises UserError, before anything is written, for a missing or damaged checkpoint and for one of another row or
    arrangement.
    """
    cfg.model.pretrained = False  # the checkpoint holds every weight
    state, steps = read_checkpoint(path)
    device = device_of(cfg)
    if cfg.data.task == "classification":
        network = build_classification_network(cfg)
        load_weights(network, state, cfg.row, path)
        test = load_image_set(cfg.data.manifest, "test", cfg.paths.data_root)
        metrics = classification.score(cfg, network, test, device)
    else:
        network = build_embedding_network(cfg)
        load_weights(network, state, cfg.row, path)
        test = load_retrieval_set(cfg.data.manifest, "test", cfg.paths.data_root)
        batches = evaluation_batches(cfg, test)
        embedded = embed(network, batches, device, cfg.trainer.workers)
        metrics = scores(embedded, cfg.evaluation) | {"n_test": float(len(test))}
        if cfg.model.uncertainty_dim:
            changed = ambiguous_uncertainties(network, batches, device, cfg.trainer.workers)
            metrics |= uncertainty_scores(embedded, changed)
            if cfg.output.pictures:
                draw_uncertainty(folder, test, embedded.uncertainty, changed)
    metrics["parameters"] = float(parameters_of(network))
    metrics["steps_trained"] = float(steps)
    return metrics


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: IDMLConfig) -> None:
    run_evaluation(cfg, evaluate_checkpoint, check)


if __name__ == "__main__":
    main()

"""Score a checkpoint of the toy paper."""

import hydra
import torch

from shared.data.images import load_image_set
from shared.metrics.scores import top_hits, top_scores
from shared.training.application import command, run_evaluation
from shared.training.checkpoints import load_weights, read_checkpoint

from .config import CONFIGS
from .model import build_model


def network_input(images, samples):
    return images.batch(samples) / 255, torch.from_numpy(images.labels[samples])


def score(cfg, network):
    test, network = load_image_set(cfg.data.manifest, "test", cfg.paths.data_root), network.cpu().eval()
    images, labels = network_input(test, range(len(test)))
    logits = network(images.to(network[2].weight.dtype)).detach()
    return top_scores(top_hits(logits, labels)) | {"n_test": float(len(test))}


def evaluate_checkpoint(cfg, path, folder):
    network, (state, _) = build_model(cfg), read_checkpoint(path)
    load_weights(network, state, cfg.row, path)
    return score(cfg, network)


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg):
    run_evaluation(cfg, evaluate_checkpoint)


if __name__ == "__main__":
    main()

"""A pre-trained network as the backbone of the row's detector or segmenter, and the run that follows a pre-training."""

from pathlib import Path

from torch import nn

from opera.backbones import build_backbone
from opera.config import OPERAConfig
from opera.segmentation import resnet_maps, vit_maps
from shared.dense.config import check_dense
from shared.dense.model import Padded
from shared.errors import UserError

FOLDER = "dense"  # of the detector's or segmenter's checkpoint, inside a run's


def check(cfg: OPERAConfig) -> None:
    """Raise UserError where ``task`` and ``dense`` do not go together, and for what ``dense`` cannot be."""
    if (cfg.task.kind == "dense") != (cfg.dense is not None):
        recipe = "null" if cfg.dense is None else "a recipe"
        raise UserError(
            f"task.kind={cfg.task.kind} and dense={recipe}: set task=dense and dense=<recipe> together, or neither"
        )
    if cfg.dense is None:
        return
    if cfg.dense.weights is not None or cfg.dense.pretraining is not None:
        raise UserError("dense.weights is not read here: say task.weights, or leave the row's own pre-training")
    check_dense(cfg.dense)


def backbone_of(cfg: OPERAConfig, network: nn.Module) -> Padded:
    """Return a pre-trained network as a backbone, with the stochastic depth of ``dense``."""
    if cfg.dense.drop_path:
        tuned = build_backbone(cfg.model.backbone, cfg.data.image_size, cfg.dense.drop_path)
        tuned.load_state_dict(network.state_dict())
        network = tuned
    if hasattr(network, "blocks"):
        return vit_maps(network, list(cfg.dense.blocks))
    if not hasattr(network, "layer4"):
        raise UserError(f"model.backbone={cfg.model.backbone} has no maps of several sizes: choose a ResNet or a ViT")
    is_detection = cfg.dense.kind == "detection"
    return resnet_maps(network, cfg.dense.frozen_stages, norm_eval=is_detection, dilated=cfg.dense.dilated)


def folder_of(run: Path) -> Path:
    """Return where a run keeps the checkpoint of what follows its pre-training."""
    return run / FOLDER

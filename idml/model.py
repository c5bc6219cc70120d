"""From a configuration to a network, untrained or with the weights of a file that the user names.

Batch norms take their statistics from the batch of all ranks.
"""

import hashlib
from pathlib import Path

from torch import nn

from idml.backbones import build_backbone
from idml.classifier import ClassificationNetwork, IntrospectiveClassifier
from idml.config import IDMLConfig
from idml.embedding import EmbeddingNetwork, freeze_batchnorm
from idml.pyramidnet import pyramidnet
from shared.errors import UserError
from shared.training.ranks import with_global_batchnorm

PYRAMIDS = {"pyramidnet200": (200, 240)}  # depth, alpha


def weights_of(cfg: IDMLConfig) -> str | None:
    """Return the file of the pretrained weights, None where the row trains from scratch.

    Raises UserError without one, and for another file than the row is meant for: what is in it changes every number, so
    its digest is part of the configuration.
    """
    if cfg.model.pretrained and not cfg.paths.weights:
        raise UserError(
            f"row {cfg.row} starts from ImageNet's weights and nothing is fetched: give timm's or torchvision's "
            f"{cfg.model.backbone} as paths.weights=<file>"
        )
    if not cfg.model.pretrained:
        return None
    path, wanted = Path(cfg.paths.weights), cfg.model.weights_sha256
    if path.is_file():  # a missing file is reported where it is read
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(wanted or ""):
            raise UserError(
                f"{path} has the sha256 {digest[:8]}..., but row {cfg.row} starts from torchvision's "
                f"resnet50-{wanted}.pth: give that one, or set model.weights_sha256={digest[:8]} to measure with this"
            )
    return cfg.paths.weights


def build_embedding_network(cfg: IDMLConfig) -> EmbeddingNetwork:
    """Build images (B, 3, S, S) -> [semantic | uncertainty] for retrieval; UserError for wrong names and weights."""
    backbone = with_global_batchnorm(build_backbone(cfg.model.backbone, weights_of(cfg)))
    if cfg.model.freeze_batchnorm:
        freeze_batchnorm(backbone)
    return EmbeddingNetwork(
        backbone, cfg.model.semantic_dim, cfg.model.uncertainty_dim, cfg.model.pooling, cfg.model.uncertainty_init
    )


def build_classification_network(cfg: IDMLConfig) -> ClassificationNetwork:
    """Build images (B, 3, S, S) -> logits (B, classes); the metric acts where ``metric.name`` is introspective."""
    if cfg.model.backbone in PYRAMIDS:
        depth, alpha = PYRAMIDS[cfg.model.backbone]
        body = pyramidnet(depth, alpha)
    else:
        body = build_backbone(cfg.model.backbone, weights_of(cfg))
    body = with_global_batchnorm(body)
    if cfg.metric.name == "plain":
        return ClassificationNetwork(body, nn.Linear(body.num_features, cfg.data.classes))
    if cfg.metric.name != "introspective":
        raise UserError(f"metric.name={cfg.metric.name} is not one of classification: choose plain or introspective")
    head = IntrospectiveClassifier(
        body.num_features, cfg.data.classes, cfg.model.uncertainty_dim, cfg.metric.tau, cfg.metric.offset
    )
    return ClassificationNetwork(body, head)

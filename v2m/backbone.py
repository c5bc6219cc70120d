"""The network of a row as the backbone of its detector or segmenter, with the weights that ``dense`` names."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shared.claims.compose import row_config
from shared.dense.model import Padded
from shared.errors import UserError
from shared.training.checkpoints import PREFIX, read_file
from shared.training.config import has_evidence, run_folder

from .maps import features_of, maps_of
from .model import build_network
from .model_base import PAPER
from .schema import ClassificationConfig

UNTRAINED = "untrained"
NEW = "outnorm"  # the norms behind the stages, which no classifier has


def build_backbone(cfg: ClassificationConfig) -> Padded:
    """Return the backbone of a row; UserError for a network that has no maps of the sizes that a detector asks for."""
    torch.manual_seed(cfg.seed)
    network = features_of(cfg, build_network)
    if cfg.dense.weights != UNTRAINED:
        load_pretrained(cfg, network)
    return maps_of(cfg, network)


def weights_file(cfg: ClassificationConfig) -> Path:
    """Return the file of ``dense.weights``: one that it names, or the checkpoint of the row ``dense.pretraining``.

    Raises UserError where it is missing, or that row's run has not ended.
    """
    if cfg.dense.weights is not None:
        path, is_whole = Path(cfg.dense.weights), True
        remedy = "give the weights of its network as dense.weights"
    else:
        row, scale = cfg.dense.pretraining, cfg.scale.name
        pretraining = row_config(PAPER, row, cfg.seed)
        pretraining.paths = cfg.paths
        path, is_whole = run_folder(pretraining) / "last.ckpt", has_evidence(pretraining)
        train = f"make reproduce-{PAPER} SCALE={scale} ROWS={row} SEEDS={cfg.seed}"
        remedy = f"train it with `{train}`, or give a file as dense.weights"
    if not path.is_file():
        raise UserError(f"{path}, which {cfg.row} begins with, is missing: {remedy}")
    if not is_whole:
        raise UserError(f"{path}, which {cfg.row} begins with, is of a training that has no record yet: {remedy}")
    return path


def weights_name(cfg: ClassificationConfig) -> str:
    """Return what identifies the weights that a row begins with, whatever their path: "untrained", or a sha256."""
    if cfg.dense.weights == UNTRAINED:
        return UNTRAINED
    with weights_file(cfg).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_pretrained(cfg: ClassificationConfig, network: nn.Module) -> None:
    """Give a network without a classifier the weights of ``dense.weights``, of a run those of its last step.

    Raises UserError for a file that is missing, damaged or of another network. Norms behind stages begin as they are.
    """
    path, remedy = weights_file(cfg), "give the last.ckpt of a run, or a .safetensors file"
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): {remedy}") from error
    else:
        content = read_file(path, remedy)
        content = content.get("state_dict", {}) if isinstance(content, dict) else {}
        # Not the moving average beside them: VMamba's detectors read "model" of its files, the weights as trained.
        state = {name.removeprefix(PREFIX): value for name, value in content.items() if name.startswith(PREFIX)}
    state = {name: value for name, value in state.items() if not name.startswith(("classifier.", "head."))}
    own = {name: value.shape for name, value in network.state_dict().items() if not name.startswith(NEW)}
    unfit = sorted(name for name, _ in own.items() ^ {name: value.shape for name, value in state.items()}.items())
    if unfit:
        raise UserError(
            f"{path} does not fit row {cfg.row}: {unfit[0]} is missing, unknown or of another shape; give the "
            "weights of its own network"
        )
    network.load_state_dict(state, strict=False)

"""Checkpoints: written so that none is ever half there, read back with ``weights_only=True``."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from shared.errors import UserError
from shared.files import whole_file

PREFIX = "model."  # of the network's tensors among those of the LightningModule


def read_file(path: Path, remedy: str, map_location: str | torch.device = "cpu") -> Any:
    """Return what a checkpoint file holds; UserError, ending in the remedy, for one that is missing or damaged."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except Exception as error:  # the reader raises almost anything on damaged bytes
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}): {remedy}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the network's tensors by name and the optimiser steps taken; UserError for a damaged file."""
    remedy = "give the last.ckpt of a run, or train it again"
    content = read_file(path, remedy)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "global_step" not in content:
        raise UserError(f"{path} is no checkpoint of a run (it has no state_dict and global_step): {remedy}")
    named = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return named, int(content["global_step"])


def load_weights(network: nn.Module, state: dict[str, Tensor], row: str, path: Path) -> None:
    """Put the tensors into the network; UserError where they are not those of this very arrangement."""
    own, given = ({name: value.shape for name, value in tensors.items()} for tensors in (network.state_dict(), state))
    unfit = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if unfit:
        raise UserError(
            f"{path} does not fit row {row}: {len(unfit)} tensors are missing, unknown or of another shape, such "
            f"as {unfit[0]}; give the row and the overrides that it was trained with"
        )
    network.load_state_dict(state)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A reader finds the previous checkpoint or the new one, never half of one; UserError where a disk damaged it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        with whole_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict[str, Any]:
        return read_file(path, "move it away, and the run begins anew", map_location or "cpu")

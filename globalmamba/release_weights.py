"""Release weights: official checkpoints are read without running code of theirs, ours are written as safetensors."""

import argparse
import os
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shared.errors import UserError

CONVERTER = f"{__package__}.convert"
# Keys under which official files keep their tensors, and beside them the moving average of these (DeiT's and Vim's
# main.py, VMamba's utils; timm's own saver).
WRAPPERS = {"model": ("model", "state_dict"), "ema": ("model_ema", "state_dict_ema")}
NAMES = {"model": "the weights as trained", "ema": "the moving average of the weights"}


def read_checkpoint(path: str | Path, weights: str = "model") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: those under "model" or "state_dict" where it has such a key, or all of it.

    ``weights`` "ema": those of the moving average, under "model_ema" or "state_dict_ema". Raises UserError for a
    missing or unreadable file, for one that holds more than data, and for one without the average that was asked for.
    """
    # Vim's files hold their training arguments, VMamba's their settings (a yacs node): both are only data, read
    # as such without yacs and dropped.
    harmless = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"{path} holds objects that only running its code would restore: if you trust it, save its "
                "tensors alone, as {'model': state_dict}, and convert that file"
            ) from None
        raise UserError(f"{path} is no PyTorch checkpoint or is cut short: fetch it again") from None
    state = content
    if isinstance(content, dict):
        default = None if weights == "ema" else content
        state = next((content[key] for key in WRAPPERS[weights] if content.get(key) is not None), default)
    if state is None:
        raise UserError(
            f"{path} holds no moving average ({' or '.join(WRAPPERS['ema'])}): take its weights as trained, "
            "--weights model"
        )
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"{path} holds no state dict, alone or under {' or '.join(map(repr, WRAPPERS[weights]))}: give a "
            "checkpoint of the model"
        )
    return dict(state)


def state_dict_mismatch(expected: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Return the first difference of two state dicts in names or shapes, in words; "" where there is none."""
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if expected[name].shape != state[name].shape:
            return f"{name} is {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
    return ""


def write_weights(state: dict[str, Tensor], path: str | Path) -> None:
    """Write release weights, whole or not at all; raises UserError where the file exists or has no folder."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is there already: give a new name or move it away")
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise UserError(f"{path} cannot be written: give a name ending in .safetensors in a folder that exists")
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    try:
        save_file(
            {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()},
            draft,
        )
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load release weights into a network of the same names and shapes; raises UserError for any other."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a .safetensors file of {CONVERTER}") from None
    difference = state_dict_mismatch(network.state_dict(), state)
    if difference:
        raise UserError(
            f"{path} belongs to another network: {difference}; choose the row, image size and classes that it was "
            "made for"
        )
    network.load_state_dict(state)

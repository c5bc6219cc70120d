"""Official checkpoints of V2M, Vim, LocalVim and VMamba as release weights of this package.

    python -m v2m.tools.convert v2m SOURCE.pth OUT.safetensors [--image-size 224]
    python -m v2m.tools.convert vim SOURCE.pth OUT.safetensors [--image-size 224]
    python -m v2m.tools.convert local_vim SOURCE.ckpt OUT.safetensors [--image-size 224]
    python -m v2m.tools.convert vmamba SOURCE.pth OUT.safetensors

Sources: https://github.com/wangck20/V2M (what its scripts save, as it links no trained weights: bimamba2d, mean over
the tokens, div2), https://github.com/hustvl/Vim (vim_tiny and vim_small, patch 16, image 224, bimambav2, middle class
token, div2), https://github.com/hunto/LocalMamba (LocalVim, mean token) and https://github.com/MzeroMiko/VMamba. Every
tensor is taken or the file is refused. A checkpoint is read without running any code of it. Nothing that exists is
overwritten. ``--weights ema`` takes the moving average that Vim's, V2M's and VMamba's files hold beside the weights as
trained, which are the default.
"""

import argparse
import functools
import itertools
import logging
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from shared.errors import UserError
from v2m.local_vim import LocalVim, LocalVimMixer, rotation
from v2m.mixer import SECOND, ReleasedMixer
from v2m.release_weights import NAMES, read_checkpoint, state_dict_mismatch, write_weights
from v2m.vim import Vim, VimMixer
from v2m.vmamba import from_official as vmamba_from_official

log = logging.getLogger(__name__)

IMAGE_SIZE = 224  # of the official checkpoints
ROTATION_ERROR = 1e-4  # of a rotation's tables: float32 at angles of up to 13


def plain_from_official(
    state: dict[str, Tensor], cls: type[Vim], mixer: Callable, image_size: int, name: str, remedy: str, **choices
) -> dict[str, Tensor]:
    """Return ``state`` where it is whole one of ``cls``; UserError, beginning and ending with the words given, if not.

    ``mixer`` and ``choices`` are arguments of ``cls``; the rest is read from the shapes.
    """
    # The network itself, built from the sizes that the file shows, says which names and shapes there must be.
    try:
        width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
        with torch.device("meta"):
            network = cls(
                image_size=image_size,
                patch_size=patch_size,
                embed_dim=width,
                depth=sum(key.endswith(".mixer.out_proj.weight") for key in state),
                num_classes=len(state["head.weight"]),
                mixer=mixer,
                in_channels=channels,
                **choices,
            )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint is no {name} ({error} is not as in one): {remedy}") from None
    positions, expected = state.get("pos_embed"), network.pos_embed.shape
    if positions is not None and positions.shape != expected:
        raise UserError(
            f"the checkpoint's position embedding is {tuple(positions.shape)}, images of {image_size} in patches of "
            f"{patch_size} need {tuple(expected)}: give its own --image-size, or a checkpoint with as many class tokens"
        )
    difference = state_dict_mismatch(network.state_dict(), state)
    if difference:
        raise UserError(f"the checkpoint is no {name}: {difference}; {remedy}")
    return dict(state)


def mixer_sizes(state: dict[str, Tensor], name: str, suffix: str, remedy: str) -> dict[str, int]:
    """Return the sizes of a mixer as ``suffix`` tells its first pass's parameters; UserError where there is none."""
    first = "layers.0.mixer"
    try:
        inner, state_dim = state[f"{first}.A{suffix}_log"].shape
        width = state[f"{first}.in_proj.weight"].shape[1]
        conv_kernel = state[f"{first}.conv1d{suffix}.weight"].shape[-1]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"the checkpoint is no {name} ({error} is not as in one): {remedy}") from None
    return {"state_dim": state_dim, "expand": inner // width, "conv_kernel": conv_kernel}


def v2m_from_official(state: dict[str, Tensor], image_size: int = IMAGE_SIZE) -> dict[str, Tensor]:
    """Return the state dict of V2M's network as released from the release's own, every tensor taken.

    That is ``Vim(class_token="mean")`` with ``ReleasedMixer``. The names are the release's (v2m/models_mamba.py and
    mamba_simple.py at 3d30905, ``bimamba_type="2d"``): those of Vim, without a class token although the model's name
    has one, and the second pass under ``_2``; its constant B and C are no parameters. Arguments and errors as
    ``vim_from_official``.
    """
    words = {
        "name": "V2M as released",
        "remedy": "give one of wangck20/V2M's bimamba2d models, which have no class token",
    }
    # Sized by the second pass, which Vim's mixers do not have: theirs are refused by name.
    mixer = functools.partial(ReleasedMixer, **mixer_sizes(state, suffix=SECOND, **words))
    return plain_from_official(state, Vim, mixer, image_size, class_token="mean", **words)


def vim_from_official(state: dict[str, Tensor], image_size: int = IMAGE_SIZE) -> dict[str, Tensor]:
    """Return the state dict of ``Vim(class_token="middle")`` from an official one, every tensor taken.

    ``image_size`` is what the position embedding has to fit: it is never resized here. Width, depth, patch size and
    classes are those of the checkpoint. Raises UserError for another model's.
    """
    words = {
        "name": "Vim with the bidirectional mixer v2",
        "remedy": "give one of hustvl/Vim's bimambav2 models with a middle class token",
    }
    mixer = functools.partial(VimMixer, **mixer_sizes(state, suffix="", **words))
    return plain_from_official(state, Vim, mixer, image_size, class_token="middle", **words)


def local_vim_from_official(state: dict[str, Tensor], image_size: int = IMAGE_SIZE) -> dict[str, Tensor]:
    """Return the state dict of ``LocalVim`` from an official one, every tensor taken, the rotation's tables checked.

    Arguments and errors as ``vim_from_official``. Which directions its layers scan is not in a checkpoint.
    """
    words = {"name": "LocalVim", "remedy": "give one of hunto/LocalMamba's LocalVim models with a mean token"}
    ours = {re.sub(r"\.A_log_(\d+)$", r".A_\1_log", name): tensor for name, tensor in state.items()}
    tables = [ours.pop(f"rope.freqs_{name}", None) for name in ("cos", "sin")]
    sizes = mixer_sizes(ours, suffix="_0", **words)

    def mixer(width: int, layer: int, backend: str) -> LocalVimMixer:
        names = (f"layers.{layer}.mixer.A_{i}_log" for i in itertools.count())
        count = sum(1 for _ in itertools.takewhile(ours.__contains__, names))
        # Any names do: the parameters of a direction are the same for all.
        return LocalVimMixer(width, directions=[["h"] * count], backend=backend, **sizes)

    ours = plain_from_official(ours, LocalVim, mixer, image_size, **words)
    side, width = image_size // ours["patch_embed.proj.weight"].shape[-1], len(ours["norm_f.weight"])
    for own, table in zip(tables, rotation((side, side), width, torch.empty(0)), strict=True):
        expected = table.flatten(0, 1).repeat_interleave(2, 1)  # both channels of a pair
        if own is None or own.shape != expected.shape or (own - expected).abs().max() > ROTATION_ERROR:
            raise UserError(f"the checkpoint is no {words['name']}: its rotation is another; {words['remedy']}")
    return ours


CONVERTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "v2m": v2m_from_official,
    "vim": vim_from_official,
    "local_vim": local_vim_from_official,
    "vmamba": vmamba_from_official,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m v2m.tools.convert", description=__doc__.splitlines()[0])
    models = parser.add_subparsers(dest="model", required=True)
    for name in CONVERTERS:
        model = models.add_parser(name)
        model.add_argument("source", help="the official checkpoint")
        model.add_argument("out", help="the .safetensors file to write")
        model.add_argument(
            "--weights", choices=tuple(NAMES), default="model", help="as trained, or their moving average"
        )
        if name != "vmamba":
            model.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="side of its images")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert one file and return the exit code: 0, or 2 after one sentence on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    extra = {} if options.model == "vmamba" else {"image_size": options.image_size}
    try:
        state = CONVERTERS[options.model](read_checkpoint(options.source, options.weights), **extra)
        write_weights(state, options.out)
    except UserError as error:
        log.error("%s", error)
        return 2
    numbers = sum(tensor.numel() for tensor in state.values())
    log.info("%s: %s, %d tensors, %d numbers", options.out, NAMES[options.weights], len(state), numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

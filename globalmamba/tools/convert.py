"""Official checkpoints of Vim, VMamba and GlobalMamba's release as release weights of this package.

    python -m globalmamba.tools.convert vim SOURCE.pth OUT.safetensors [--tokens 196] [--causal]
    python -m globalmamba.tools.convert vim SOURCE.pth OUT.safetensors --tokens 255 --causal      (wangck20/GlobalMamba)
    python -m globalmamba.tools.convert vmamba SOURCE.pth OUT.safetensors

Sources: https://github.com/hustvl/Vim (vim_tiny and vim_small, patch 16, image 224, bimambav2, middle class
token, div2) and https://github.com/MzeroMiko/VMamba. Every tensor is taken or the file is refused. A checkpoint
is read without running any code of it. Nothing that exists is overwritten. ``--weights ema`` takes the moving average
that Vim's, both releases' and VMamba's files hold beside the weights as trained, which are the default.
"""

import argparse
import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from globalmamba.release_weights import NAMES, read_checkpoint, state_dict_mismatch, write_weights
from globalmamba.vim import Vim
from globalmamba.vmamba import from_official as vmamba_from_official
from shared.errors import UserError

log = logging.getLogger(__name__)

SMALL_TOKENS = 196  # of an image of 224 x 224 in patches of 16
BACKWARD = ("A_b_log", "D_b", "conv1d_b", "x_proj_b", "dt_proj_b")


class Slots(nn.Module):
    """The names and shapes of any tokens with one projection; ``num_tokens`` of them."""

    def __init__(self, num_tokens: int, projection: tuple[int, ...]):
        super().__init__()
        self.num_tokens = num_tokens
        self.proj = nn.Conv2d(projection[1], projection[0], projection[2:])


def vim_from_official(state: dict[str, Tensor], tokens: int = SMALL_TOKENS, causal: bool = False) -> dict[str, Tensor]:
    """Return the state dict of ``Vim(class_token="middle")`` from an official one, every tensor taken.

    ``tokens`` is the number of patch tokens that the position embedding has to fit: it is never resized. ``causal``
    gives the state dict of the forward direction alone: GlobalMamba's release has no other, of Vim's checkpoints the
    backward one is left out. Width, depth, patch size and classes are those of the checkpoint. Raises UserError for
    another model's.
    """
    is_backward = {name: any(part in BACKWARD for part in name.split(".")) for name in state}
    forward_only = bool(state) and not any(is_backward.values())
    if forward_only and not causal and "layers.0.mixer.A_log" in state:
        raise UserError(
            "the checkpoint holds the forward direction alone, as GlobalMamba's release makes it: convert it with "
            "--causal, for a row whose mixer is causal"
        )
    # The network itself, built from the sizes that the file shows, says which names and shapes there must be.
    try:
        width = len(state["norm_f.weight"])
        inner, state_dim = state["layers.0.mixer.A_log"].shape
        with torch.device("meta"):
            network = Vim(
                tokens=Slots(tokens, state["patch_embed.proj.weight"].shape),
                embed_dim=width,
                depth=sum(name.endswith(".mixer.out_proj.weight") for name in state),
                num_classes=len(state["head.weight"]),
                state_dim=state_dim,
                expand=inner // width,
                conv_kernel=state["layers.0.mixer.conv1d.weight"].shape[-1],
                mixer="causal" if forward_only else "bidirectional",
            )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint is no Vim ({error} is not as in one): give one of hustvl/Vim's bimambav2 models "
            "with a middle class token, or name the model that it belongs to"
        ) from None
    ours = {
        "tokens" + name.removeprefix("patch_embed") if name.startswith("patch_embed.") else name: tensor
        for name, tensor in state.items()
    }
    positions = ours.get("pos_embed")
    if positions is not None and positions.shape != (1, tokens + 1, width):
        raise UserError(
            f"the checkpoint's position embedding is {tuple(positions.shape)}, {tokens} tokens and a class token "
            f"need {(1, tokens + 1, width)}: give a checkpoint of that image and patch size, or its own --tokens"
        )
    difference = state_dict_mismatch(network.state_dict(), ours)
    if difference:
        raise UserError(
            f"the checkpoint is no Vim with the {'causal' if forward_only else 'bidirectional'} mixer v2: "
            f"{difference}; give one of {'wangck20/GlobalMamba' if forward_only else 'hustvl/Vim'}'s bimambav2 models "
            "with a middle class token"
        )
    if causal and not forward_only:
        log.info("the backward direction is left out: %d tensors", sum(is_backward.values()))
        ours = {name: tensor for name, tensor in ours.items() if not is_backward.get(name, False)}
    return ours


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m globalmamba.tools.convert", description=__doc__.splitlines()[0])
    models = parser.add_subparsers(dest="model", required=True)
    for name in ("vim", "vmamba"):
        model = models.add_parser(name)
        model.add_argument("source", help="the official checkpoint")
        model.add_argument("out", help="the .safetensors file to write")
        model.add_argument(
            "--weights", choices=tuple(NAMES), default="model", help="as trained, or their moving average"
        )
        if name == "vim":
            model.add_argument("--tokens", type=int, default=SMALL_TOKENS, help="patch tokens of the network")
            model.add_argument("--causal", action="store_true", help="leave out the backward direction")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert one file and return the exit code: 0, or 2 after one sentence on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    convert: Callable = vim_from_official if options.model == "vim" else vmamba_from_official
    extra = {"tokens": options.tokens, "causal": options.causal} if options.model == "vim" else {}
    try:
        state = convert(read_checkpoint(options.source, options.weights), **extra)
        write_weights(state, options.out)
    except UserError as error:
        log.error("%s", error)
        return 2
    numbers = sum(tensor.numel() for tensor in state.values())
    log.info("%s: %s, %d tensors, %d numbers", options.out, NAMES[options.weights], len(state), numbers)
    return 0


if __name__ == "__main__":
    sys.exit(main())

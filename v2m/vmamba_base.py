"""What the pyramids share: VMamba's stem, stages, head and start, with the mixer of its blocks as an argument.

Paper: "VMamba: Visual State Space Model", arXiv 2401.10166, section 4 and its appendix; the form ``v05_noz`` (one state
per channel, no gate) of the sizes that github.com/MzeroMiko/VMamba trains at 224 x 224. Parameters have the official
names, so an official checkpoint loads as it is; ``check_official`` says whether it is one.

Images may become several grids of tokens, of several levels; here they become one.
"""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UserError

STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # of the stem's two convolutions, by patch size
DIRECTIONS = 4  # rows, columns, rows backwards, columns backwards: the order of the official parameters
DELTA_RANGE = (1e-3, 1e-1)  # Mamba's, of the first step sizes


class ImageNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W), which stays channels last in memory."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between, on the last axis."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Mixer and MLP, each normalised before and added to its input."""

    def __init__(self, mixer: nn.Module, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm, self.op = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, round(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor, *layout) -> Tensor:
        """(B, ..., C) -> (B, ..., C); ``layout``: what else the mixer has to know of the tokens."""
        tokens = tokens + self.drop_path(self.op(self.norm(tokens), *layout))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Stage(nn.Module):
    """Blocks at one resolution, then the convolution that halves it (rounding up)."""

    def __init__(self, blocks: Sequence[Block], dim: int, next_dim: int | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if next_dim is None else _halving(dim, next_dim)


def _halving(dim: int, next_dim: int) -> nn.Sequential:
    # Identities keep the places that the official names count.
    return nn.Sequential(nn.Identity(), nn.Conv2d(dim, next_dim, 3, 2, 1), nn.Identity(), ImageNorm(next_dim))


def _stem(in_channels: int, dim: int, patch_size: int) -> nn.Sequential:
    if patch_size not in STRIDES:
        raise UserError(f"patch_size {patch_size} is not known to VMamba's stem: use 1, 2 or 4")
    first, second = STRIDES[patch_size]
    return nn.Sequential(
        nn.Conv2d(in_channels, dim // 2, 3, first, 1),
        nn.Identity(),
        ImageNorm(dim // 2),
        nn.Identity(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, second, 1),
        nn.Identity(),
        ImageNorm(dim),
    )


class VMambaBase(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, num_classes), or a list of stage outputs (B, C, h, w).

    ``depths`` are the blocks of each stage, ``dims`` its width (one number is doubled from stage to stage).
    ``mixer(dim)`` makes the mixer of a block, (B, h, w, C) -> (B, h, w, C).
    ``features_only`` leaves the classifier out and returns the normalised outputs of the stages in
    ``out_indices``; later stages are not built. ``num_classes`` 0 gives pooled features (B, C).
    Raises UserError for a size that cannot be built, and in ``forward`` for images smaller than a patch.
    """

    SECOND = ""  # suffix of the parameters of a mixer's second pass, where it has one

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_classes: int,
        depths: Sequence[int],
        dims: int | Sequence[int],
        mixer: Callable[[int], nn.Module],
        mlp_ratio: float = 4.0,
        patch_size: int = 4,
        drop_path: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ):
        super().__init__()
        dims = _widths(dims, len(depths))
        self.num_classes, self.num_features, self.patch_size = num_classes, dims[-1], patch_size
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}"} for i, dim in enumerate(dims)
        ]
        self.out_indices = tuple(sorted(out_indices)) if features_only else None
        self.patch_embed = _stem(in_channels, dims[0], patch_size)
        built = len(depths)
        if features_only:
            if not self.out_indices or not 0 <= self.out_indices[0] <= self.out_indices[-1] < built:
                raise UserError(f"out_indices {list(out_indices)} are not stages: use numbers from 0 to {built - 1}")
            built = self.out_indices[-1] + 1
        rates = _rates(drop_path, depths)
        self.layers = nn.ModuleList(
            Stage(
                [Block(mixer(dims[i]), dims[i], mlp_ratio, rate) for rate in rates[i]],
                dims[i],
                dims[i + 1] if i + 1 < built else None,
            )
            for i in range(built)
        )
        if features_only:
            for i in self.out_indices:
                self.add_module(f"outnorm{i}", ImageNorm(dims[i]))
        else:
            head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
            self.classifier = nn.ModuleDict({"norm": ImageNorm(dims[-1]), "head": head})
        self.apply(_initialise)

    def no_weight_decay(self) -> set[str]:
        """Return the names of what is not decayed: A, D, normalisations and every bias.

        The official code marks A and D so, but its optimiser goes by the number of axes and does decay A_logs and
        dt_projs_bias, which have two.
        """
        kept = ("A_logs", "Ds", "bias")
        names = {name: parameter.dim() for name, parameter in self.named_parameters()}
        return {n for n, axes in names.items() if axes == 1 or n.removesuffix(self.SECOND).endswith(kept)}

    def embed(self, images: Tensor) -> list[Tensor]:
        """Return the stem's grids (B, C, h, w), one for each level, the top level last."""
        height, width = images.shape[2:]
        if min(height, width) < self.patch_size:
            raise UserError(
                f"images of {height} x {width} are smaller than a patch of {self.patch_size}: "
                "use larger images or a smaller patch_size"
            )
        return [self.stem(images)]

    def stem(self, images: Tensor) -> Tensor:
        """Return the grid (B, C, h, w) of images (B, in_channels, H, W), channels last in memory."""
        return self.patch_embed(images.contiguous(memory_format=torch.channels_last))

    def run_blocks(self, stage: int, grids: list[Tensor]) -> list[Tensor]:
        """Return the grids (B, C, h, w) that leave the blocks of a stage, the top level last."""
        tokens = [grid.permute(0, 2, 3, 1) for grid in grids]
        for block in self.layers[stage].blocks:
            tokens = [block(grid) for grid in tokens]
        return [grid.permute(0, 3, 1, 2) for grid in tokens]

    def stage_outputs(self, grids: list[Tensor], stages: int | None = None) -> list[Tensor]:
        """Return the top level's grid (B, C, h, w) after each of the first ``stages`` stages."""
        outputs = []
        for index in range(len(self.layers))[:stages]:
            if index:
                grids = [self.layers[index - 1].downsample(grid) for grid in grids]
            grids = self.run_blocks(index, grids)
            outputs.append(grids[-1])
        return outputs

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the normalised output of the last stage, (B, C, h, w)."""
        return self.classifier["norm"](self.stage_outputs(self.embed(images))[-1])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of what ``forward_features`` gave, or its mean (B, C)."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.classifier["head"](pooled)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices is None:
            return self.forward_head(self.forward_features(images))
        outputs = self.stage_outputs(self.embed(images))
        return [getattr(self, f"outnorm{i}")(outputs[i]) for i in self.out_indices]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stage outputs that timm's feature extraction asks for, (B, C, h, w), by its rules."""
        if output_fmt != "NCHW":
            raise ValueError("features are NCHW")
        count = len(self.layers)
        chosen = range(count)[-indices:] if isinstance(indices, int) else indices
        take = [range(count)[i] for i in (range(count) if chosen is None else chosen)]
        early = stop_early and intermediates_only
        outputs = self.stage_outputs(self.embed(x), max(take) + 1 if early else None)
        final = self.classifier["norm"](outputs[-1]) if len(outputs) == count else None
        if norm and final is not None:
            outputs[-1] = final
        features = [outputs[i] for i in take]
        return features if intermediates_only else (final, features)

    def get_classifier(self) -> nn.Module:
        return self.classifier["head"]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one for ``num_classes``, or by none for 0."""
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifier["head"] = head.to(self.classifier["norm"].weight)
        head.apply(_initialise)


def _widths(dims: int | Sequence[int], stages: int) -> tuple[int, ...]:
    widths = tuple(dims * 2**i for i in range(stages)) if isinstance(dims, int) else tuple(dims)
    if len(widths) != stages or stages == 0 or min(widths) < 2:
        raise UserError(f"dims {dims} do not fit {stages} stages: give one width, or one for each entry of depths")
    return widths


def _rates(drop_path: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the rate of every block by stage: from 0 to ``drop_path`` in equal steps over the whole depth."""
    step, starts = drop_path / max(1, sum(depths) - 1), [sum(depths[:i]) for i in range(len(depths))]
    return [[step * (start + j) for j in range(depth)] for start, depth in zip(starts, depths, strict=True)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_official(state: dict, build: Callable[..., nn.Module]) -> dict:
    """Return the tensors of an official VMamba checkpoint, checked: names and shapes load whole.

    ``state`` is the checkpoint or what it holds under ``model``, ``build`` makes a VMamba from sizes. Raises UserError
    for another model's.
    """
    state = state.get("model", state)
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in build(**_size_of(state)).state_dict().items()}
    except (KeyError, IndexError) as error:
        raise UserError(
            f"the checkpoint is not a VMamba of the form v05_noz ({error} is not as in one): give an official "
            "vmambav2v classification checkpoint, or name the model that it belongs to"
        ) from None
    shapes = {name: tensor.shape for name, tensor in state.items()}
    wrong = {name for name, _ in expected.items() ^ shapes.items()}
    if wrong:
        raise UserError(
            f"the checkpoint is not a VMamba of the form v05_noz: {len(wrong)} parameters do not fit, "
            f"{min(wrong)} among them; give an official vmambav2v classification checkpoint"
        )
    return dict(state)


def _size_of(state: dict) -> dict:
    """Return the arguments of the VMamba that a state dict belongs to; raises KeyError where it is none."""
    counts = []
    while f"layers.{len(counts)}.blocks.0.norm.weight" in state:
        stage = f"layers.{len(counts)}.blocks"
        counts.append(next(j for j in range(len(state)) if f"{stage}.{j}.norm.weight" not in state))
    first = "layers.0.blocks.0"
    widths = [len(state[f"layers.{i}.blocks.0.norm.weight"]) for i in range(len(counts) or 1)]
    return {
        "in_channels": state["patch_embed.0.weight"].shape[1],
        "num_classes": len(state["classifier.head.weight"]),
        "depths": counts,
        "dims": widths,
        "ssm_ratio": len(state[f"{first}.op.out_norm.weight"]) / widths[0],
        "state_dim": state[f"{first}.op.A_logs"].shape[1],
        "mlp_ratio": len(state[f"{first}.mlp.fc1.weight"]) / widths[0],
    }

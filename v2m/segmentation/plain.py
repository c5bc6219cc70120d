"""What the mixers of four blocks of a plain network give, as the maps of a segmenter."""

from collections.abc import Sequence

from torch import Tensor, nn

from shared.dense.model import Padded


class PlainMaps(nn.Module):
    """Images (B, 3, H, W) -> maps (B, E, h, w): what the mixers of ``blocks`` give, each after a norm of its own.

    The mixers' outputs, not the sums that they are added to, are what LocalVim's and Vim's segmenters read.

    All have the grid of the patches, as in LocalVim's segmenter; with ``resize`` there are four, brought to four times,
    twice, once and half of it, as in Vim's (by transposed convolutions and a maximum).
    """

    def __init__(self, network: nn.Module, blocks: Sequence[int], resize: bool):
        super().__init__()
        self.network, self.blocks, width = network, tuple(blocks), network.num_features
        network.norm_f = nn.Identity()  # nobody reads what it gives here
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in blocks)
        self.resizes = nn.ModuleList(nn.Identity() for _ in blocks)
        if resize:
            up = [nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3)]
            four_times = nn.Sequential(up[0], nn.BatchNorm2d(width), nn.GELU(), up[1])
            self.resizes = nn.ModuleList([four_times, up[2], nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        streams: list[Tensor] = []
        hooks = [
            self.network.layers[block].mixer.register_forward_hook(lambda _mixer, _input, mixed: streams.append(mixed))
            for block in self.blocks
        ]
        try:
            self.network.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        dtype = self.norms[0].weight.dtype  # the streams may be kept in float32
        normed = (norm(stream.to(dtype)).permute(0, 3, 1, 2) for norm, stream in zip(self.norms, streams, strict=True))
        return tuple(resize(grid) for resize, grid in zip(self.resizes, normed, strict=True))


class PlainBackbone(Padded):
    """``PlainMaps`` for images of any size; ``layers_above`` says where a parameter is, for the decay of rates."""

    def __init__(self, network: nn.Module, blocks: Sequence[int], resize: bool):
        patch, count = network.patch_embed.patch_size, len(blocks)
        strides = [patch // 4, patch // 2, patch, patch * 2] if resize else [patch] * count
        super().__init__(PlainMaps(network, blocks, resize), patch, [network.num_features] * count, strides)

    def layers_above(self, name: str) -> int:
        """Return how many layers stand above a parameter: one more than all blocks for the embedding, 0 for maps."""
        depth, parts = len(self.network.network.layers), name.removeprefix("network.network.").split(".")
        if parts[0] == "layers":
            return depth - int(parts[1])
        return depth + 1 if parts[0] in ("patch_embed", "pos_embed", "cls_token") else 0

"""SSFTT: spectral-spatial feature tokenization transformer, in a dense form.

L. Sun, G. Zhao, Y. Zheng, Z. Wu, IEEE TGRS 60, 2022, https://doi.org/10.1109/TGRS.2022.3144158.
Layer table: 8 3-D kernels 3 x 3 x 3, 64 2-D kernels 3 x 3, batch normalisation and ReLU after each; Gaussian
weighted tokenizer (4 tokens: softmax over the pixels of a learned map weights a linear map of their
features); position embedding; one transformer encoder layer (width 64, hidden 8, dropout 0.1; 8 heads, the
number in the released code).

The dense form departs in two points: the 3 x 3 kernels are zero-padded in space (not along the spectrum); and
the class token, which in the paper reads the tokens once per patch, gives way to the pixels: the encoder runs
on the patch's tokens, then each pixel's feature reads them by one cross-attention and adds what it read to
itself. The tokens are weighted over all pixels, so every pixel sees the whole patch without a further layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdml.backbones.context import Backbone, crop

# Windows of a scene whose tokens are encoded together: bounds memory, the result does not depend on it.
WINDOWS = 4096


class TokenContext(nn.Module):
    """Tokens of a patch, encoded, and read by every pixel."""

    def __init__(self, width: int, tokens: int, heads: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.weights = nn.Linear(width, tokens, bias=False)
        self.values = nn.Linear(width, width, bias=False)
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.dropout = nn.Dropout(dropout)
        # initial values as in the paper's released code
        nn.init.xavier_normal_(self.weights.weight)
        nn.init.xavier_normal_(self.values.weight)
        nn.init.normal_(self.position, std=0.02)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, hidden, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm_pixels = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, heads, dropout, batch_first=True)

    def _read(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Pixels (N, L, F) and their patch's raw tokens (N, T, F) -> (N, L, F)."""
        tokens = self.dropout(tokens + self.position)
        for layer in self.encoder:
            tokens = layer(tokens)
        tokens = self.norm_tokens(tokens)
        return pixels + self.read(self.norm_pixels(pixels), tokens, tokens, need_weights=False)[0]

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, p, p) -> (B, F, p, p)."""
        pixels = features.flatten(2).transpose(1, 2)  # (B, p * p, F)
        weights = self.weights(pixels).softmax(1)  # (B, p * p, T)
        # the values are linear and the weights sum to one: mapping T means equals the mean of p * p maps
        tokens = self.values(weights.transpose(1, 2) @ pixels)
        return self._read(pixels, tokens).transpose(1, 2).unflatten(2, features.shape[2:])

    def scene(self, features: Tensor, patch_size: int) -> Tensor:
        """(1, F, H + p - 1, W + p - 1) -> (1, F, H, W): the softmax becomes window sums of exponentials."""
        logits = F.conv2d(features, self.weights.weight[:, :, None, None])
        # One shift for the whole scene keeps the exponentials finite and cancels in the quotient; float64,
        # since in float32 a window 88 below the scene's largest logit would vanish.
        weights = (logits - logits.amax((2, 3), keepdim=True)).double().exp()
        total = F.avg_pool2d(weights, patch_size, stride=1)  # (1, T, H, W)
        weighted = (features[0] * w for w in weights[0])
        sums = torch.stack([F.avg_pool2d(w, patch_size, stride=1) for w in weighted])
        tokens = (sums / total[0][:, None]).to(features.dtype)  # (T, F, H, W)
        size = tokens.shape[2:]
        tokens = tokens.flatten(2).permute(2, 0, 1)  # (H * W, T, F)
        centres = crop(features, patch_size // 2).flatten(2)[0].T[:, None]  # (H * W, 1, F)
        parts = [
            self._read(pixels, self.values(raw))
            for pixels, raw in zip(centres.split(WINDOWS), tokens.split(WINDOWS), strict=True)
        ]
        return torch.cat(parts)[:, 0].T.unflatten(1, size)[None]


class SSFTT(Backbone):
    """Dense SSFTT: (B, bands, p, p) -> (B, spatial_width, p, p)."""

    def __init__(
        self,
        bands: int,
        patch_size: int,
        spectral_width: int,
        spectral_kernel: int,
        spatial_width: int,
        tokens: int,
        heads: int,
        hidden: int,
        layers: int,
        dropout: float,
    ):
        super().__init__(bands, patch_size, spatial_width, fewest_bands=spectral_kernel, reach=2)
        self.spectral = nn.Sequential(
            nn.Conv3d(1, spectral_width, (spectral_kernel, 3, 3), padding=(0, 1, 1)),
            nn.BatchNorm3d(spectral_width),
            nn.ReLU(inplace=True),
        )
        length = bands - spectral_kernel + 1
        self.spatial = nn.Sequential(
            # the 2-D kernels over the flattened spectral axis, written without a copy
            nn.Conv3d(spectral_width, spatial_width, (length, 3, 3), padding=(0, 1, 1)),
            nn.Flatten(1, 2),
            nn.BatchNorm2d(spatial_width),
            nn.ReLU(inplace=True),
        )
        self.spectral.to(memory_format=torch.channels_last_3d)
        self.spatial.to(memory_format=torch.channels_last_3d)
        self.context = TokenContext(spatial_width, tokens, heads, hidden, layers, dropout)

    def local(self, image: Tensor) -> Tensor:
        """(B, bands, H, W) -> (B, spatial_width, H, W)."""
        return self.spatial(self.spectral(image[:, None]))

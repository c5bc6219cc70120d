"""The frequency serialization measured against the way the authors' release computes the same tokens.

The released way, written here from its formulas: one full cosine transform, K masked inverse ones, K convolutions
at full size, bilinear shrinking of the tokens. Transforms through the FFT, as the release's torch_dct does
(https://github.com/zh217/torch-dct), or as products with the whole matrix, for what the low rank alone brings.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from globalmamba.serialization import FrequencySerialization
from globalmamba.spectrum import band_masks, dct_matrix

WAYS = ("released", "whole matrices", "serialization")
PASSES = ("forward", "forward + gradient")


def _turn(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of pi k / (2 size), each (size,)."""
    angle = torch.arange(size, dtype=like.dtype, device=like.device) * (math.pi / (2 * size))
    return angle.cos(), angle.sin()


def fft_dct(x: Tensor) -> Tensor:
    """DCT-II along the last axis without normalisation: an FFT of the even places and the reversed odd ones."""
    cosine, sine = _turn(x.shape[-1], x)
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    return 2 * (spectrum.real * cosine + spectrum.imag * sine)


def fft_idct(spectrum: Tensor) -> Tensor:
    """The inverse of ``fft_dct``."""
    size = spectrum.shape[-1]
    cosine, sine = _turn(size, spectrum)
    real = spectrum / 2
    imaginary = -F.pad(real[..., 1:].flip(-1), (1, 0))
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    ordered = torch.fft.irfft(torch.view_as_complex(turned), n=size)
    x = torch.empty_like(ordered)
    x[..., ::2], x[..., 1::2] = ordered[..., : size - size // 2], ordered[..., size - size // 2 :].flip(-1)
    return x


def _both_axes(transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: transform(transform(x).mT.contiguous()).mT.contiguous()


def released_tokens(images: Tensor, weight: Tensor, bias: Tensor, masks: list[Tensor], matrix=None) -> Tensor:
    """Images (B, C, S, S) -> tokens (B, T, E) as the release does; ``matrix`` (S, S) replaces the FFT if given."""
    patch, levels = weight.shape[-1], len(masks)
    if matrix is None:
        transform, inverse = _both_axes(fft_dct), _both_axes(fft_idct)
    else:
        transform, inverse = (lambda x, m=m: m @ (x @ m.T) for m in (matrix, matrix.T))
    spectrum, tokens = transform(images), []
    for level, mask in enumerate(masks, start=1):
        full = F.conv2d(inverse(spectrum * mask), weight, bias, stride=patch)  # (B, E, S / p, S / p)
        side = images.shape[-1] // 2 ** (levels - level) // patch
        shrunk = F.interpolate(full, size=(side, side), mode="bilinear", align_corners=False)
        tokens.append(shrunk.flatten(2).transpose(1, 2))
    return torch.cat(tokens, 1)


def build_ways(batch: int, image_size: int, patch_size: int, embed_dim: int, levels: int, device: str):
    """Return WAYS as functions of nothing that give equal tokens (B, T, E) of one random batch, and the weight."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    module = FrequencySerialization(
        image_size=image_size, patch_size=patch_size, embed_dim=embed_dim, levels=levels, variant="as_released"
    ).to(device)
    masks = [torch.from_numpy(m).to(images) for m in band_masks(image_size, image_size, levels, "nested")]
    matrix = torch.from_numpy(dct_matrix(image_size)).to(images)
    weight, bias = module.proj.weight, module.proj.bias
    ways = {
        "released": lambda: released_tokens(images, weight, bias, masks),
        "whole matrices": lambda: released_tokens(images, weight, bias, masks, matrix),
        "serialization": lambda: module(images),
    }
    return ways, module.proj


def _seconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else (lambda: None)
    wait()
    begin = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begin


def _run(way: Callable[[], Tensor], of: str, gradient: Tensor, proj: torch.nn.Conv2d) -> None:
    """Run one of PASSES; the gradient goes to the convolution, as in training."""
    with torch.set_grad_enabled(of != "forward"):
        tokens = way()
    if of != "forward":
        proj.zero_grad()
        tokens.backward(gradient)


def measure_serialization(
    *, batch=32, image_size=224, patch_size=16, embed_dim=192, levels=4, repeats=7, threads=2, device="cpu"
) -> dict[str, dict[str, float]]:
    """Return times and error of the ways in WAYS, measured in turn on the same random images, float32.

    Per way: a median in milliseconds for each of PASSES, and ``error``, the relative L2 distance of its tokens
    from the released way's. ``threads`` counts for this call only.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways, proj = build_ways(batch, image_size, patch_size, embed_dim, levels, device)
        with torch.no_grad():
            tokens = {name: way() for name, way in ways.items()}
        released = tokens["released"]
        results = {n: {"error": ((t - released).norm() / released.norm()).item()} for n, t in tokens.items()}
        gradient = torch.randn_like(released)
        times = {(name, of): [] for name in WAYS for of in PASSES}
        for _ in range(repeats):
            for (name, of), seconds in times.items():
                seconds.append(_seconds(lambda n=name, o=of: _run(ways[n], o, gradient, proj), device))
        for (name, of), seconds in times.items():
            results[name][of] = 1e3 * statistics.median(seconds)
    finally:
        torch.set_num_threads(before)
    return results


def speed_up(results: dict[str, dict[str, float]], of: str, over: str = "released") -> float:
    """Return how many times faster than ``over`` the serialization is in one of PASSES."""
    return results[over][of] / results["serialization"][of]

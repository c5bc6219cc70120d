"""Score a checkpoint of GlobalMamba or of a baseline, time it and draw what it looks at, without training.

    make evaluate-globalmamba ROW=digits-gm SEED=0 [CKPT=runs/.../last.ckpt]

The images come from the config, as in training. The weights are read with ``weights_only=True``.
"""

import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from globalmamba import convert
from globalmamba.data import evaluation_batches
from globalmamba.machine import require_backend
from globalmamba.measure import resident_bytes
from globalmamba.model import CHANNELS, build_model, parameters_of
from globalmamba.receptive_field import draw_receptive_field
from shared.metrics.record import forget_peak
from shared.run.checkpoints import load_weights, read_checkpoint
from shared.run.machine import arithmetic, device_of, require_precision, synchronise

TOP = 5
TIMED = 3  # batches, after one that warms up; the median counts
PICTURED = 64  # images that the receptive field is averaged over


@torch.no_grad()
def score(cfg, network: nn.Module, device: torch.device) -> dict[str, float]:
    """Return top1, top5 (fractions), the mean cross-entropy ``loss`` and ``n_test`` over all test images."""
    network = network.to(device).eval()
    loader = DataLoader(evaluation_batches(cfg), batch_size=None, num_workers=cfg.trainer.workers)
    dtype = next(network.parameters()).dtype
    ranked, losses = [], []
    for batch in loader:
        images, labels = batch["images"].to(device, dtype), batch["labels"].to(device)
        with arithmetic(cfg, device):
            logits = network(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        best = logits.topk(min(TOP, logits.shape[1]), 1).indices  # (B, 5), best first
        ranked.append(best == labels[:, None])
    hits = torch.cat(ranked)
    return {
        "top1": float(hits[:, 0].double().mean()),
        "top5": float(hits.any(1).double().mean()),
        "loss": float(torch.cat(losses).double().mean()),
        "n_test": float(len(hits)),
    }


@torch.no_grad()
def speed(cfg, network: nn.Module, device: torch.device) -> dict[str, float]:
    """Return images per second of inference at ``output.batch_size`` and the peak memory of it in bytes.

    On a GPU the memory is what torch allocated there, on a CPU under Linux all that the process holds meanwhile.
    """
    network = network.to(device).eval()
    size, dtype = cfg.data.image_size, next(network.parameters()).dtype
    images = torch.zeros(cfg.output.batch_size, CHANNELS, size, size, device=device, dtype=dtype)
    forgotten = False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forgotten = forget_peak()
    times = []
    for _ in range(TIMED + 1):
        synchronise(device)
        begin = time.perf_counter()
        with arithmetic(cfg, device):
            network(images)
        synchronise(device)
        times.append(time.perf_counter() - begin)
    found = {"images_per_second": len(images) / sorted(times[1:])[TIMED // 2]}
    if device.type == "cuda":
        found["inference_memory"] = float(torch.cuda.max_memory_allocated(device))
    elif forgotten:
        found["inference_memory"] = float(resident_bytes("VmHWM"))
    return found


def evaluate_checkpoint(cfg, path: Path, folder: Path) -> dict:
    """Return scores, speed and memory of a checkpoint, and draw its receptive field into ``folder``.

    A ``.safetensors`` file holds weights alone, such as official ones that ``globalmamba.convert`` has renamed.
    Raises UserError, before anything is written, for a missing or damaged checkpoint, for one of another row or
    arrangement, and for a precision or a backend that this machine has not.
    """
    require_precision(cfg)
    require_backend(cfg)
    network, steps = build_model(cfg), None
    if path.suffix == ".safetensors":
        convert.load_weights(network, path)
    else:
        state, steps = read_checkpoint(path)
        load_weights(network, state, cfg.row, path)
    device = device_of(cfg)
    metrics: dict = score(cfg, network, device) | speed(cfg, network, device)
    metrics["parameters"] = float(parameters_of(network))
    if steps is not None:
        metrics["steps_trained"] = float(steps)
    if cfg.output.pictures:
        batch = evaluation_batches(cfg, PICTURED)[0]
        draw_receptive_field(folder / "receptive_field.png", network, batch["images"].to(device))
    return metrics

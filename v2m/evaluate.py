"""Score a checkpoint, time it and draw what it looks at, without training.

    python -m <paper>.evaluate +experiment=ROW seed=0 [ckpt=runs/.../last.ckpt]

The images come from the config, as in training. The weights are read with ``weights_only=True``.
"""

import math
import time
from pathlib import Path

import hydra
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from shared.dense import run as dense
from shared.environment import forget_peak, resident_bytes
from shared.errors import UserError
from shared.metrics.scores import top_hits, top_scores
from shared.training.application import command, run_evaluation
from shared.training.checkpoints import load_weights, read_checkpoint
from shared.training.checks import autocast_context, device_of, synchronise

from . import release_weights
from .checks import check
from .config import CONFIGS
from .data import evaluation_batches
from .maps import features_of, maps_of
from .model import build_model, build_network
from .model_base import CHANNELS, parameters_of
from .receptive_field import draw_receptive_field
from .schema import ClassificationConfig

TIMED = 3  # batches, after one that warms up; the median counts
PICTURED = 64  # images that the receptive field is averaged over


@torch.no_grad()
def score(cfg: ClassificationConfig, network: nn.Module, device: torch.device) -> dict[str, float]:
    """Return top1, top5 (fractions), the mean cross-entropy ``loss`` and ``n_test`` over all test images.

    UserError where the outputs are not finite: such scores would be those of no network.
    """
    network = network.to(device).eval()
    loader = DataLoader(evaluation_batches(cfg), batch_size=None, num_workers=cfg.trainer.workers)
    dtype = next(network.parameters()).dtype
    hits, losses = [], []
    for batch in loader:
        images, labels = batch["images"].to(device, dtype), batch["labels"].to(device)
        with autocast_context(cfg, device):
            logits = network(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        hits.append(top_hits(logits, labels))
    loss = float(torch.cat(losses).double().mean())
    if not math.isfinite(loss):
        raise UserError("the outputs of the network are not finite: the training diverged, lower optim.lr")
    return top_scores(torch.cat(hits)) | {"loss": loss, "n_test": float(sum(map(len, hits)))}


@torch.no_grad()
def speed(cfg: ClassificationConfig, network: nn.Module, device: torch.device) -> dict[str, float]:
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
        with autocast_context(cfg, device):
            network(images)
        synchronise(device)
        times.append(time.perf_counter() - begin)
    figures = {"images_per_second": len(images) / sorted(times[1:])[TIMED // 2]}
    if device.type == "cuda":
        figures["inference_memory"] = float(torch.cuda.max_memory_allocated(device))
    elif forgotten:
        figures["inference_memory"] = float(resident_bytes("VmHWM"))
    return figures


def evaluate_checkpoint(cfg: ClassificationConfig, path: Path, folder: Path) -> dict:
    """Return scores, speed and memory of a checkpoint, and draw its receptive field into ``folder``.

    A ``.safetensors`` file holds weights alone, such as official ones that ``tools/convert.py`` has renamed.
    Raises UserError, before anything is written, for a missing or damaged checkpoint, for one of another row or
    arrangement.
    """
    if cfg.dense is not None:
        return dense.evaluate_checkpoint(cfg, maps_of(cfg, features_of(cfg, build_network)), path, folder)
    network, steps = build_model(cfg), None
    if path.suffix == ".safetensors":
        release_weights.load_weights(network, path)
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


@command
@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: ClassificationConfig) -> None:
    run_evaluation(cfg, evaluate_checkpoint, check)


if __name__ == "__main__":
    main()

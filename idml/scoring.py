"""From a network and a set of images to the paper's metrics: retrieval and clustering of the semantic embedding alone.

The uncertainty takes no part: at test IDML compares semantic embeddings by the cosine, as its baselines do.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from idml.clustering import clustering_metrics
from idml.config import EvaluationConfig
from idml.data import EvaluationBatches
from idml.neighbours import nearest_neighbours
from idml.retrieval import neighbours_needed, retrieval_metrics


@dataclass
class Embedded:
    """Images after the network, on the CPU.

    semantic (n, S) of length 1, length (n,) that it had before, uncertainty ||u|| (n,), labels (n,) int64.
    """

    semantic: Tensor
    length: Tensor
    uncertainty: Tensor
    labels: Tensor


@torch.no_grad()
def embed_batch(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the semantic embedding (B, S) at length 1, its length (B,) and the uncertainty (B,), 0 without one."""
    rows = network(images.to(next(network.parameters()).dtype))
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    semantic, uncertainty = rows[:, : network.semantic_dim], rows[:, network.semantic_dim :]
    return F.normalize(semantic, dim=1), semantic.norm(dim=1), uncertainty.norm(dim=1)


@torch.no_grad()
def embed(network: nn.Module, batches: EvaluationBatches, device: torch.device, workers: int = 0) -> Embedded:
    """Return the embeddings of all images of a set, in order; the network is left in evaluation mode."""
    network = network.to(device).eval()
    loader = DataLoader(batches, batch_size=None, num_workers=workers)
    parts = []
    for batch in loader:
        embedded = embed_batch(network, batch["images"].to(device))
        parts.append((*(rows.cpu() for rows in embedded), batch["labels"]))
    return Embedded(*map(torch.cat, zip(*parts, strict=True)))


def recall_at_1(embedded: Embedded) -> float:
    """Return the fraction of images whose nearest other image is of their class, a fraction."""
    neighbours = nearest_neighbours(embedded.semantic, neighbours_needed(embedded.labels, [1]))
    return retrieval_metrics(neighbours, embedded.labels, [1])["recall@1"]


def chance_level(labels: Tensor) -> float:
    """Return R@1 of a random neighbour, the expected fraction of pairs of images that are of one class."""
    counts = np.bincount(labels.numpy()).astype(float)
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def scores(embedded: Embedded, evaluation: EvaluationConfig) -> dict[str, float]:
    """Return the paper's metrics as fractions, by our names: recall_at_k, r_precision, map_at_r, nmi, f1.

    NMI and F1 are means over ``kmeans_seeds`` seeds of k-means, their standard deviations beside them.
    """
    ks = list(evaluation.recall_at)
    neighbours = nearest_neighbours(embedded.semantic, neighbours_needed(embedded.labels, ks))
    retrieval = retrieval_metrics(neighbours, embedded.labels, ks)
    seeds = range(evaluation.kmeans_seeds)
    clusters = clustering_metrics(embedded.semantic, embedded.labels, seeds, evaluation.kmeans)
    return {
        **{f"recall_at_{k}": retrieval[f"recall@{k}"] for k in ks},
        "r_precision": retrieval["rp"],
        "map_at_r": retrieval["map@r"],
        **{name: value for name, value in clusters.items() if value == value},  # one start has no deviation
    }

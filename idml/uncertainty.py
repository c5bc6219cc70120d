"""What the uncertainty of an image measures: its length for clean images and for three ways of making them ambiguous.

    mixed      half of an image of another class, half of the image
    occluded   a square of half the sides is grey
    blurred    a Gaussian of a sixteenth of the side

The AUROC is that of the uncertainty as a detector of each against the clean images: 0.5 says that it sees nothing.
"""

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import gaussian_blur

from idml.data import EvaluationBatches
from idml.neighbours import nearest_neighbours
from idml.scoring import Embedded, embed_batch
from shared.data.keyed import keyed_permutation, keyed_uniform, stream

PARTNER = stream("idml.partner")
PLACE = stream("idml.place")
MIXUP_LAMBDA = 0.5  # of the image itself in a mixture


def occluded(images: Tensor, indices: np.ndarray) -> Tensor:
    """Return (B, 3, S, S) with a grey square of side S / 2, its place keyed by the index of the image."""
    images, side = images.clone(), images.shape[-1] // 2
    free = images.shape[-1] - side + 1
    draws = keyed_uniform(PLACE, np.asarray(indices)[:, None], np.arange(2))
    for image, (down, right) in zip(images, (draws * free).astype(int).tolist(), strict=True):
        image[:, down : down + side, right : right + side] = 0  # of normalised images the mean
    return images


def blurred(images: Tensor) -> Tensor:
    """Return (B, 3, S, S) blurred with a standard deviation of S / 16."""
    sigma = images.shape[-1] / 16
    return gaussian_blur(images, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)


def partners_of_another_class(labels: np.ndarray) -> np.ndarray:
    """Return for every image the index of one of another class, (n,) int64, a function of the labels alone."""
    order = keyed_permutation(len(labels), PARTNER)
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    for index in np.flatnonzero(labels[partner] == labels):
        others = np.flatnonzero(labels != labels[index])
        partner[index] = others[index % len(others)]
    return partner


@torch.no_grad()
def ambiguous_uncertainties(
    network, batches: EvaluationBatches, device: torch.device, workers: int = 0
) -> dict[str, Tensor]:
    """Return the uncertainty (n,) of every image of a set after each of the three changes."""
    network = network.to(device).eval()
    partner = partners_of_another_class(batches.batches.images.labels)
    uncertainties: dict[str, list[Tensor]] = {"mixed": [], "occluded": [], "blurred": []}
    for batch in DataLoader(batches, batch_size=None, num_workers=workers):
        clean, indices = batch["images"], batch["indices"].numpy()
        others = batches.batches[(0, partner[indices].tolist())]["images"]
        changed = {
            "mixed": torch.lerp(others, clean, MIXUP_LAMBDA),
            "occluded": occluded(clean, indices),
            "blurred": blurred(clean),
        }
        for name, ambiguous in changed.items():
            uncertainties[name].append(embed_batch(network, ambiguous.to(device))[2].cpu())
    return {name: torch.cat(parts) for name, parts in uncertainties.items()}


def hits_at_1(embedded: Embedded) -> Tensor:
    """Return whether an image's nearest other one is of its class, (n,) bool."""
    return embedded.labels[nearest_neighbours(embedded.semantic, 1)[:, 0]] == embedded.labels


def certain_half(uncertainty: Tensor) -> Tensor:
    """Return which images are among the half of the least uncertainty, (n,) bool."""
    chosen = torch.zeros(len(uncertainty), dtype=torch.bool)
    chosen[uncertainty.argsort(stable=True)[: len(uncertainty) // 2]] = True
    return chosen


def auroc(clean: Tensor, changed: Tensor) -> float:
    """Return the area under the ROC curve of "more uncertain" as a detector of the changed images."""
    truth = np.repeat([0, 1], [len(clean), len(changed)])
    return float(roc_auc_score(truth, torch.cat([clean, changed]).numpy()))


def uncertainty_scores(embedded: Embedded, changed: dict[str, Tensor]) -> dict[str, float]:
    """Return auroc_<change> for every change, R@1 of either half, mean, deviation, and what it has of a length.

    That is its rank correlation with the length of the semantic embedding before it was normalised: near 1 the
    uncertainty is one more measure of how strongly an image excites the network.
    """
    certain, hits = certain_half(embedded.uncertainty), hits_at_1(embedded).double()
    scores = {f"auroc_{name}": auroc(embedded.uncertainty, values) for name, values in changed.items()}
    scores["recall_at_1_certain_half"] = float(hits[certain].mean())
    scores["recall_at_1_uncertain_half"] = float(hits[~certain].mean())
    scores["uncertainty_length_correlation"] = float(spearmanr(embedded.uncertainty, embedded.length).statistic)
    scores["uncertainty_mean"] = float(embedded.uncertainty.double().mean())
    scores["uncertainty_std"] = float(embedded.uncertainty.double().std())
    return scores

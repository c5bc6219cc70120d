"""k-NN on frozen features: what they know of the classes without any training.

The weighted vote of Wu et al. (arXiv 1805.01978): each of the k nearest training images votes for its class with
exp(cosine / temperature).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**26  # similarities held at once


@torch.no_grad()
def knn_scores(
    train: Tensor, train_labels: Tensor, test: Tensor, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """Return the votes (m, classes) for test features (m, C) by training features (n, C) with labels (n,)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for rows in test.split(max(1, CHUNK // len(train))):
        similarity, index = (rows @ train.T).topk(min(neighbours, len(train)), 1)
        votes.append(
            rows.new_zeros(len(rows), classes).scatter_add_(1, train_labels[index], (similarity / temperature).exp())
        )
    return torch.cat(votes)

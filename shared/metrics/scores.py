"""Top-k accuracy of the ImageNet literature, as fractions; tables multiply by 100."""

from torch import Tensor


def top_hits(logits: Tensor, labels: Tensor, k: int = 5) -> Tensor:
    """Say which of the ``k`` largest logits (N, C) are of the label (N,): (N, min(k, C)) bool, the largest first."""
    return logits.topk(min(k, logits.shape[1]), 1).indices == labels[:, None]


def top_scores(hits: Tensor) -> dict[str, float]:
    """Return top1 and top5, fractions, of what ``top_hits`` says of all samples."""
    return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}

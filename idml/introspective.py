"""The introspective metric: how far apart two images are for a network that may say that it is not sure of them.

An embedding is [semantic m | uncertainty u]. With m of length 1,

    alpha^2 = ||m_1 - m_2||^2                                    in [0, 4]
    beta^2  = what u_1 and u_2 say together, see ``combination``
    D_IN^2  = alpha^2 exp(-(beta^2 + offset) / (tau alpha^2))    in [0, alpha^2]
    s_IN    = 1 - D_IN^2 / 2                                     the similarity that belongs to it

Two images of which the network is not sure are near to each other whatever they show, so that a loss no longer pulls
at them; of a network that is sure (u = 0, offset 0) it is the metric of the baseline. IDML (arXiv 2205.04449) says the
form in words and pictures; the exponential, tau = 5 and the offset 4 are those of the released code, where alpha^2 is
measured to un-normalised proxies and beta is constant (see ``released.py``). The release does not say how u is scaled
and how two of them combine: these are ours, as named values.
"""

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor
from torch.nn import functional as F

from shared.errors import UserError

SCALINGS = ("raw", "rms", "unit")
COMBINATIONS = ("sum", "difference", "product")
SMALLEST = 1e-12  # of a squared distance that is divided by, or whose root has a finite gradient


def squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(1)  # (B,)


class IntrospectiveMetric:
    """The formulas above for [semantic | uncertainty] rows; a mix-in of the two classes that losses take.

    A row of ``semantic_dim`` values has no uncertainty: a proxy, or an embedding of the baseline. In a pair with it
    the other's uncertainty counts alone, beta = ||u||, whatever the combination.

    scaling: of u, "raw": as it is; "rms": by 1 / sqrt(width), so that beta^2 is a mean over coordinates and does not
    grow with the width; "unit": to length 1, as released (beta to a proxy is then 1, and no gradient comes back).
    combination: beta^2 of a pair, "sum": ||u_1 + u_2||^2 (opposite ones cancel); "difference": ||u_1 - u_2||^2;
    "product": ||u_1|| ||u_2||.
    Raises UserError for other names, for tau <= 0 and for a negative offset.
    """

    def __init__(self, semantic_dim: int, tau: float, offset: float, scaling: str, combination: str, **kwargs):
        if scaling not in SCALINGS or combination not in COMBINATIONS:
            raise UserError(
                f"metric.scaling={scaling}, metric.combination={combination}: choose the scaling from "
                f"{', '.join(SCALINGS)}, the combination from {', '.join(COMBINATIONS)}"
            )
        if not tau > 0 or not offset >= 0:
            raise UserError(f"metric.tau={tau}, metric.offset={offset}: set tau above 0 and offset to 0 or more")
        super().__init__(**kwargs)
        self.semantic_dim, self.tau, self.offset = semantic_dim, tau, offset
        self.scaling, self.combination = scaling, combination

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs) -> Tensor:
        """Return rows whose semantic part has length 1 and whose uncertainty is scaled, (B, width)."""
        semantic, uncertainty = self.split(embeddings)
        if self.scaling == "unit":
            uncertainty = F.normalize(uncertainty, dim=1)
        elif self.scaling == "rms":
            uncertainty = uncertainty / max(uncertainty.shape[1], 1) ** 0.5
        return torch.cat([F.normalize(semantic, dim=1), uncertainty], 1)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the semantic part (B, S) and the uncertainty (B, U), U = 0 where there is none."""
        return rows[:, : self.semantic_dim], rows[:, self.semantic_dim :]

    def beta_squared(self, first: Tensor, second: Tensor) -> Tensor:
        """Return beta^2 of all pairs, (n, m) or a shape that broadcasts to it, from uncertainties (n, U), (m, V)."""
        if not second.shape[1]:
            return squared_norms(first)[:, None]
        if not first.shape[1]:
            return squared_norms(second)
        if self.combination == "product":
            return torch.outer(torch.linalg.vector_norm(first, dim=1), torch.linalg.vector_norm(second, dim=1))
        sign = 1 if self.combination == "sum" else -1
        both = squared_norms(first)[:, None] + squared_norms(second) + 2 * sign * first @ second.T
        return both.clamp_min(0)

    def squared(self, first: Tensor, second: Tensor) -> Tensor:
        """Return D_IN^2 of all pairs, (n, m), from rows that ``normalize`` gave."""
        (m_1, u_1), (m_2, u_2) = self.split(first), self.split(second)
        return self.introspected((2 - 2 * m_1 @ m_2.T).clamp_min(0), self.beta_squared(u_1, u_2))

    def introspected(self, alpha_squared: Tensor, beta_squared: Tensor) -> Tensor:
        """Return D_IN^2 from alpha^2 and beta^2."""
        exponent = (beta_squared + self.offset) / (self.tau * alpha_squared.clamp_min(SMALLEST))
        return alpha_squared * torch.exp(-exponent)


class IntrospectiveDistance(IntrospectiveMetric, LpDistance):
    """D_IN as a distance in [0, 2], where a loss takes the Euclidean one of normalised embeddings; ``power`` 2: D_IN^2.

    It is an LpDistance since FastAP and the margin loss's sampling insist on one.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.squared(query_emb, ref_emb).clamp_min(SMALLEST).sqrt()

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.compute_mat(query_emb, ref_emb).diagonal()


class IntrospectiveSimilarity(IntrospectiveMetric, BaseDistance):
    """s_IN in [-1, 1], where a loss takes the cosine."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, is_inverted=True, **kwargs)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return 1 - self.squared(query_emb, ref_emb) / 2

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.compute_mat(query_emb, ref_emb).diagonal()

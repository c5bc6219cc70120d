"""The introspective metric: how far apart two images are for a network that may say that it is not sure of them.

An embedding is [semantic m | uncertainty u]. With m of length 1,

    alpha = ||m_1 - m_2||                              in [0, 2]
    beta  = what u_1 and u_2 say together, see ``combination``
    D_IN  = alpha exp(-(beta + offset) / (tau alpha))  in [0, alpha]
    s_IN  = 1 - D_IN^2 / 2                             the similarity that belongs to it

Two images of which the network is not sure are near to each other whatever they show, so that a loss no longer pulls
at them; of a network that is sure (u = 0, offset 0) it is the baseline's metric. D_IN = alpha exp(-beta / alpha) is
printed in the figure "Motivation" of the authors' release (assets/motivation.png of github.com/wzzheng/IDML) for IDML
(arXiv 2205.04449), with alpha from 0 to 2. How u is scaled and how two of them combine is not printed anywhere: these
are ours, as named values.

The form "squared" is a reading between the printed and the released one (``released.py``, where alpha^2 is measured to
proxies of any length and beta is constant): D_IN^2 = alpha^2 exp(-(beta^2 + offset) / (tau alpha^2)). For no tau is it
the printed form.
"""

import torch
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from torch import Tensor
from torch.nn import functional as F

from shared.errors import UserError

FORMS = ("printed", "squared")
SCALINGS = ("raw", "rms", "unit")
COMBINATIONS = ("sum", "difference", "product")
SMALLEST = 1e-12  # of a squared distance that is divided by, or whose root has a finite gradient


def squared_norms(rows: Tensor) -> Tensor:
    return rows.square().sum(1)  # (B,)


def root(squares: Tensor) -> Tensor:
    """Return the square roots, 0 with a gradient of 0 below SMALLEST, where the root's own has no bound."""
    return torch.where(squares > SMALLEST, squares.clamp_min(SMALLEST).sqrt(), 0.0)


def single(rows: Tensor) -> Tensor:
    """Return the rows in float32 or float64: in half precision SMALLEST is 0, and 2 - 2 cos loses near images."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class IntrospectiveMetric:
    """The formulas above for [semantic | uncertainty] rows; a mix-in of the two classes that losses take.

    A row of ``semantic_dim`` values has no uncertainty: a proxy, or an embedding of the baseline. In a pair with it
    the other's uncertainty counts alone, beta = ||u||, whatever the combination.

    form: "printed" or "squared", as above.
    scaling: of u, "raw": as it is; "rms": by 1 / sqrt(width), so that beta^2 is a mean over coordinates and does not
    grow with the width; "unit": to length 1, as released (beta to a proxy is then 1, and no gradient comes back).
    combination: beta^2 of a pair, "sum": ||u_1 + u_2||^2 (opposite ones cancel); "difference": ||u_1 - u_2||^2;
    "product": ||u_1|| ||u_2||.
    Raises UserError for other names, for tau <= 0 and for a negative offset.
    """

    def __init__(
        self, semantic_dim: int, form: str, tau: float, offset: float, scaling: str, combination: str, **kwargs
    ):
        known = {"form": (form, FORMS), "scaling": (scaling, SCALINGS), "combination": (combination, COMBINATIONS)}
        for key, (value, names) in known.items():
            if value not in names:
                raise UserError(f"metric.{key}={value}: choose the {key} from {', '.join(names)}")
        if not tau > 0 or not offset >= 0:
            raise UserError(f"metric.tau={tau}, metric.offset={offset}: set tau above 0 and offset to 0 or more")
        super().__init__(**kwargs)
        self.semantic_dim, self.form, self.tau, self.offset = semantic_dim, form, tau, offset
        self.scaling, self.combination = scaling, combination

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs) -> Tensor:
        """Return rows (B, width), ``single``, whose semantic part has length 1 and whose uncertainty is scaled."""
        semantic, uncertainty = self.split(single(embeddings))
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
        if self.form == "printed":
            return self.distance(first, second).square()
        alpha_squared, beta_squared = self.parts(first, second)
        exponent = (beta_squared + self.offset) / (self.tau * alpha_squared.clamp_min(SMALLEST))
        return alpha_squared * torch.exp(-exponent)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Return D_IN of all pairs, (n, m), from rows that ``normalize`` gave."""
        if self.form == "squared":
            return self.squared(first, second).clamp_min(SMALLEST).sqrt()
        alpha_squared, beta_squared = self.parts(first, second)
        # Of two images at one place the exponent has no bound and D_IN is 0, as is its gradient.
        alpha = alpha_squared.clamp_min(SMALLEST).sqrt()
        return alpha * torch.exp(-(root(beta_squared) + self.offset) / (self.tau * alpha))

    def parts(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha^2 and beta^2 of all pairs."""
        (m_1, u_1), (m_2, u_2) = self.split(first), self.split(second)
        return (2 - 2 * m_1 @ m_2.T).clamp_min(0), self.beta_squared(u_1, u_2)


class IntrospectiveDistance(IntrospectiveMetric, LpDistance):
    """D_IN as a distance in [0, 2], where a loss takes the Euclidean one of normalised embeddings; ``power`` 2: D_IN^2.

    It is an LpDistance since FastAP and the margin loss's sampling insist on one.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.distance(query_emb, ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.compute_mat(query_emb, ref_emb).diagonal()


class IntrospectiveSimilarity(IntrospectiveMetric, CosineSimilarity):
    """s_IN in [-1, 1], where a loss takes the cosine.

    It is a CosineSimilarity since ArcFace, CosFace, Circle and TupletMargin insist on one.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return 1 - self.squared(query_emb, ref_emb) / 2

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.compute_mat(query_emb, ref_emb).diagonal()

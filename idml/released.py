"""Proxy-Anchor as the authors' release of IDML computes it (wzzheng/IDML, ``losses.py``), its defects included.

    s    = cos(m, p)
    d^2  = ||m||^2 + ||p||^2 - 2 m.p          m of length 1, the proxy p as it is
    s_IN = 1 - (1 - s) exp(-(||v||^2 + 4) / (5 d^2))

With v brought to length 1 as well, ||v||^2 = 1 whatever the network says: the uncertainty acts on nothing and its head
gets no gradient. What acts instead is the length of the proxies. Proxies, fixed at no length, drift.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idml.introspective import squared_norms


class ReleasedProxyAnchor(nn.Module):
    """Proxy-Anchor (Kim et al., arXiv 2003.13911) on the released similarity: [m | v] (B, 2 S), labels (B,) -> 0-d.

    ``normalize_uncertainty``: as released; without it the uncertainty has a gradient.
    """

    def __init__(
        self,
        classes: int,
        semantic_dim: int,
        alpha: float,
        margin: float,
        tau: float,
        offset: float,
        normalize_uncertainty: bool,
    ):
        super().__init__()
        self.proxies = nn.Parameter(torch.empty(classes, semantic_dim))  # (C, S)
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.alpha, self.margin, self.tau, self.offset = alpha, margin, tau, offset
        self.normalize_uncertainty = normalize_uncertainty

    def similarity(self, embeddings: Tensor) -> Tensor:
        """Return s_IN of every sample and proxy, (B, C)."""
        width = self.proxies.shape[1]
        semantic, uncertainty = F.normalize(embeddings[:, :width], dim=1), embeddings[:, width:]
        if self.normalize_uncertainty:
            uncertainty = F.normalize(uncertainty, dim=1)
        cosine = semantic @ F.normalize(self.proxies, dim=1).T
        inner = semantic @ self.proxies.T
        squared = squared_norms(semantic)[:, None] + squared_norms(self.proxies) - 2 * inner
        exponent = (squared_norms(uncertainty)[:, None] + self.offset) / (self.tau * squared)
        return 1 - (1 - cosine) * torch.exp(-exponent)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        similarity = self.similarity(embeddings)
        own = F.one_hot(labels, len(self.proxies)).bool()  # (B, C)
        pulled = (-self.alpha * (similarity - self.margin)).exp().where(own, 0).sum(0)  # (C,)
        pushed = (self.alpha * (similarity + self.margin)).exp().where(~own, 0).sum(0)
        return pulled.log1p().sum() / own.any(0).sum() + pushed.log1p().mean()

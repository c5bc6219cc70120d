"""The networks: one wrapper, PDML, around any dense backbone, and the baselines it is compared with.

Every model takes raw patches (B, bands, p, p): standardisation and principal components, fitted on training
pixels, are its buffers. For the read-outs every model gives a mean and a log-variance per pixel (``encode``)
and decides from a mean and a variance (``decide``). For the baselines the mean is the class probabilities
and the log-variance is 0, so that fusing over patches is averaging probabilities.
"""

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F

from pdml.config import PDMLConfig
from pdml.distributions import GaussianHeads
from pdml.objective import Objective
from shared.errors import UserError


class PrincipalComponents(nn.Module):
    """(B, bands, p, p) -> (B, k, p, p): principal components of standardised bands, fitted on training pixels."""

    def __init__(self, bands: int, components: int):
        super().__init__()
        self.register_buffer("centre", torch.zeros(bands))
        self.register_buffer("weight", torch.zeros(components, bands))

    def fit(self, spectra: np.ndarray) -> "PrincipalComponents":
        """Fit to ``spectra`` (n, bands) and return itself; UserError where n or bands is below the components."""
        components, bands = self.weight.shape
        if min(spectra.shape) < components:
            raise UserError(
                f"{components} principal components need as many training pixels and bands, there are "
                f"{len(spectra)} and {bands}: lower 'components' or draw more training pixels"
            )
        spectra = spectra.astype(np.float64)
        spread = spectra.std(0).clip(1e-12)
        pca = PCA(components, svd_solver="full").fit((spectra - spectra.mean(0)) / spread)
        # One scale for all components, the first one's: whitening would blow up the last ones, which are noise.
        weight = pca.components_ / spread / np.sqrt(pca.explained_variance_[0]).clip(1e-12)
        self.centre.copy_(torch.from_numpy(spectra.mean(0)))
        self.weight.copy_(torch.from_numpy(weight))
        return self

    def forward(self, patches: Tensor) -> Tensor:
        # The bands are the last axis in memory (scenes are stored pixel by pixel), so this is one product.
        return F.linear(patches.movedim(1, -1) - self.centre, self.weight).movedim(-1, 1)


def feature_count(backbone: nn.Module, components: int, patch_size: int) -> int:
    """Return F of a backbone that maps (B, components, p, p) to (B, F, p, p), as it says or as a patch of zeros shows.

    Raises UserError for a backbone that does not give a feature for every pixel.
    """
    if hasattr(backbone, "out_features"):
        return backbone.out_features
    training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, components, patch_size, patch_size))
    backbone.train(training)
    if features.ndim != 4 or features.shape[2:] != (patch_size, patch_size):
        raise UserError(
            f"the backbone turns (1, {components}, {patch_size}, {patch_size}) into {tuple(features.shape)}: give one "
            "that keeps a feature for every pixel, such as convolutions with padding='same'"
        )
    return features.shape[1]


class PatchModel(nn.Module):
    """What the read-outs need of every model; see the module docstring. ``rows`` and ``loss`` are the training."""

    dense = True  # whether every pixel of a patch can be read

    def __init__(self, spectral: PrincipalComponents, backbone: nn.Module, patch_size: int, classes: int):
        super().__init__()
        self.spectral, self.backbone = spectral, backbone
        self.patch_size, self.bands, self.num_classes = patch_size, len(spectral.centre), classes
        # The same for every method. Without it the pixels of a backbone that has no normalisation of its own
        # (HybridSN) are nearly alike at first, and a metric calibrated on them is off by orders of magnitude.
        self.out_features = feature_count(backbone, len(spectral.weight), patch_size)
        self.norm = nn.BatchNorm2d(self.out_features)

    def features(self, patches: Tensor) -> Tensor:
        """(B, bands, p, p) -> (B, F, p, p)."""
        return self.norm(self.backbone(self.spectral(patches)))

    def scene_features(self, image: Tensor) -> Tensor:
        """(1, bands, H, W) -> (1, F, H, W): what ``features`` gives at the centre of each pixel's patch."""
        return self.norm(self.backbone.forward_scene(self.spectral(image)))

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(B, bands, p, p) -> mean and log-variance, each (B, D, p, p)."""
        raise NotImplementedError

    def encode_centre(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(B, bands, p, p) -> mean and log-variance of the centre pixel, each (B, D)."""
        r = self.patch_size // 2
        mean, log_variance = self.encode(patches)
        return mean[:, :, r, r], log_variance[:, :, r, r]

    def rows(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what enters the loss, (N, K), and which pixels of ``labels`` (B, p, p) they are, boolean."""
        raise NotImplementedError

    def loss(self, rows: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """Return the loss, 0-d, of rows (N, K) with labels (N,) in 0..C-1 and keys (N,)."""
        raise NotImplementedError


class Probabilistic(PatchModel):
    """PDML: two heads give every pixel a Gaussian, read after features that see the whole patch.

    ``backbone`` is any module from (B, k, p, p) to (B, F, p, p), k the components of ``spectral``. The defaults are
    those of configs/method/pdml.yaml, for a use without the configuration; a run takes every value from there.
    ``encode_scene`` needs a backbone with ``forward_scene``.
    """

    def __init__(
        self,
        spectral: PrincipalComponents,
        backbone: nn.Module,
        patch_size: int = 9,
        *,
        classes: int,
        width: int = 32,
        metric: str = "mutual_likelihood",
        loss: str = "multi_similarity",
        pair_weight: float = 0.1,
        temperature: float = 10.0,
        pixels: int = 256,
    ):
        super().__init__(spectral, backbone, patch_size, classes)
        self.width = width
        self.heads = GaussianHeads(self.out_features, width)
        self.objective = Objective(metric, loss, pair_weight, temperature, pixels, classes, width)

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(self.features(patches))

    def encode_scene(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, bands, H, W) -> mean and log-variance (1, D, H, W) of every pixel as the centre of its patch."""
        return self.heads(self.scene_features(image))

    def decide(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(N, D), (N, D) -> log-probabilities (N, C)."""
        embedding = torch.cat([mean, variance.log()], 1)
        return self.objective.classes(embedding, self.objective.distance)

    def uncertainty(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(N, D), (N, D) -> (N,): the variance averaged over the D dimensions."""
        return variance.mean(1)

    def rows(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = labels > 0
        mean, log_variance = self.encode(patches)
        return torch.cat([mean, log_variance], 1).movedim(1, -1)[chosen], chosen

    def loss(self, rows: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return self.objective(rows, labels, keys)


class CrossEntropy(PatchModel):
    """The baselines: a linear classifier per pixel, trained at the centre (``plain``) or at every pixel."""

    def __init__(self, spectral, backbone, patch_size: int, classes: int, every_pixel: bool):
        super().__init__(spectral, backbone, patch_size, classes)
        self.width, self.every_pixel = classes, every_pixel
        self.classifier = nn.Conv2d(self.out_features, classes, 1)

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.classifier(self.features(patches)).softmax(1)
        return mean, torch.zeros_like(mean)

    def encode_scene(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.classifier(self.scene_features(image)).softmax(1)
        return mean, torch.zeros_like(mean)

    def decide(self, mean: Tensor, variance: Tensor) -> Tensor:
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def uncertainty(self, mean: Tensor, variance: Tensor) -> Tensor:
        """(N, C) -> (N,): the entropy of the class probabilities, in nats."""
        return torch.special.entr(mean).sum(1)

    def rows(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = labels > 0
        if not self.every_pixel:
            centre = torch.zeros_like(chosen)
            centre[:, self.patch_size // 2, self.patch_size // 2] = True
            chosen = chosen & centre
        return self.classifier(self.features(patches)).movedim(1, -1)[chosen], chosen

    def loss(self, rows: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return F.cross_entropy(rows, labels)


class Published(CrossEntropy):
    """A backbone as its own paper reads it: one pooled feature (B, F) per patch, decided at the centre only."""

    dense = False

    def __init__(self, spectral, backbone, patch_size: int, classes: int):
        super().__init__(spectral, backbone, patch_size, classes, every_pixel=False)
        self.norm = nn.Identity()
        self.classifier = nn.Linear(backbone.out_features, classes)

    def encode_centre(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.classifier(self.features(patches)).softmax(1)
        return mean, torch.zeros_like(mean)

    def rows(self, patches: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.zeros_like(labels, dtype=torch.bool)
        chosen[:, self.patch_size // 2, self.patch_size // 2] = True
        return self.classifier(self.features(patches)), chosen


def build_model(cfg: PDMLConfig, bands: int, classes: int) -> PatchModel:
    """Build the model of a run: ``cfg.model.backbone`` inside ``cfg.method.model``, untrained.

    Raises UserError for an even patch size, arguments that the named class does not take, and a method that
    cannot read the backbone.
    """
    if cfg.patch_size % 2 == 0:
        raise UserError(f"patch_size {cfg.patch_size} is even and has no centre pixel: use an odd patch_size")
    try:
        backbone = instantiate(cfg.model.backbone, bands=cfg.components, patch_size=cfg.patch_size)
        if backbone.dense != (cfg.method.name != "published"):
            raise UserError(
                f"method {cfg.method.name} does not fit model {cfg.model.name}: the method 'published' goes with "
                "a published form such as ssrn-published, every other method with a dense one"
            )
        return instantiate(
            cfg.method.model,
            spectral=PrincipalComponents(bands, cfg.components),
            backbone=backbone,
            patch_size=cfg.patch_size,
            classes=classes,
        )
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"model or method is configured wrongly ({reason}): fix the key in pdml/configs") from error

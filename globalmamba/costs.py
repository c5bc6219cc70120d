"""What whole detectors and segmenters count: VMamba's as published beside ours, and every row with ``dense``.

The rule is that of model.py: one multiply-add of a linear map or a convolution is 1, a scan is 9 B L D N for each of
its directions. Normalisation, resizing and the scan's skip, which VMamba's counter adds, are not counted.
"""

from shared.claims.compose import compose, dense_rows, row_config
from shared.claims.protocol import load_paper
from shared.claims.tables import Table
from shared.dense.count import COLUMNS, cost_cells
from shared.environment import repository_root

from .model import count, memory_of
from .model_base import PAPER

DEEPER = ["model.network.depths=[2,2,15,2]", "model.network.ssm_ratio=2.0"]
SIZES = {"T": [], "S": DEEPER, "B": [*DEEPER, "model.network.dims=128"]}
# Of MzeroMiko/VMamba: M and G of its README, then G in full as its script noted them (analyze/flops.py).
PUBLISHED = {
    ("mask-rcnn-1x", "T"): (50, 271, 271.163),
    ("mask-rcnn-1x", "S"): (70, 384, 348.922),
    ("mask-rcnn-1x", "B"): (108, 485, 485.496),
    ("upernet", "T"): (62, 949, 948.780),
    ("upernet", "S"): (82, 1028, 1028.405),
    ("upernet", "B"): (122, 1170, 1170.344),
}


def vmamba_counts(dense: str, size: str) -> dict[str, int]:
    """Return what VMamba of a size counts as a choice of the group ``dense``; keys as ``model.count``."""
    return count(compose(PAPER, ["model=vmamba-t", f"dense={dense}", *SIZES[size]]))


def tables() -> list[Table]:
    """Return VMamba's published numbers beside ours, and the costs of all rows."""
    columns = ["network", "M, README", "M", "G, README", "G, its script", "G", "G without scan"]
    lines = []
    for (dense, size), (millions, billions, exact) in PUBLISHED.items():
        counts, name = vmamba_counts(dense, size), "Mask R-CNN" if dense.startswith("mask") else "UPerNet"
        ours = [f"{counts[rule] / 1e9:.1f}" for rule in ("flops", "flops_without_scan")]
        numbers = [str(millions), f"{counts['parameters'] / 1e6:.2f}", str(billions), f"{exact:.1f}", *ours]
        lines.append([f"{name}, VMamba-{size}", *numbers])
    cfgs = [row_config(PAPER, row, 0) for row in dense_rows(load_paper(repository_root(), PAPER))]
    return [
        Table("VMamba, published and counted", columns, lines),
        Table("All rows", COLUMNS, cost_cells(cfgs, count, memory_of)),
    ]

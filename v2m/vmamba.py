"""VMamba, the base of V2M-S* and V2M-B*: a pyramid of blocks whose mixer is VMamba's or V2M's (vmamba_scan.py).

The network is ``vmamba_base.py``'s (arXiv 2401.10166); V2M, arXiv 2410.10382, changes the scan alone. Tokens are a
grid, channels last, (B, H, W, C).
"""

from collections.abc import Mapping

from torch import nn

from v2m.mixer import require_choice
from v2m.vmamba_base import VMambaBase, check_official
from v2m.vmamba_scan import SECOND, CornerScan, CrossScan

SCANS = {"cross": CrossScan, "v2m": CornerScan}


class VMamba(VMambaBase):
    """Images (B, in_channels, H, W) -> logits (B, num_classes), or a list of stage outputs (B, C, h, w).

    ``scan`` is "cross", VMamba's, or "v2m", with the options of ``CornerScan`` in ``scan_options``; the rest is
    ``VMambaBase``'s. Raises UserError for an unknown scan, and as ``VMambaBase``.
    """

    SECOND = SECOND

    def __init__(
        self,
        *,
        ssm_ratio: float,
        scan: str = "cross",
        scan_options: Mapping | None = None,
        state_dim: int = 1,
        backend: str = "auto",
        **pyramid,
    ):
        require_choice("scan", scan, tuple(SCANS))
        options = dict(scan_options or {})

        def mixer(dim: int) -> nn.Module:
            return SCANS[scan](dim, ssm_ratio, state_dim, backend, **options)

        super().__init__(mixer=mixer, **pyramid)


def from_official(state: dict) -> dict:
    """Return the tensors of an official VMamba checkpoint, checked; UserError for another model's."""
    return check_official(state, VMamba)

"""The interpretations of what the paper leaves open, each with its parameters and FLOPs, for INTERPRETATIONS.md.

``make claims`` calls ``tables``. The counting rule is that of model.py, the same for a row and its baseline.
"""

from globalmamba import costs
from globalmamba.model import count
from globalmamba.pyramid import interpretations_table
from shared.claims.compose import row_config
from shared.claims.tables import Table
from shared.dense.libraries import missing_modules

# Printed by the paper: millions of parameters, billions of FLOPs (arXiv 2410.10316, ImageNet table).
PRINTED = {
    "in1k-vim-t": ("Vim-T", 7, 1.5),
    "gm-in1k-m": ("GlobalMamba-M*", 7, 1.7),
    "gm-in1k-m-causal": ("GlobalMamba-M*, causal, class token last", 7, 1.7),
    "gm-in1k-m-released": ("GlobalMamba-M*, as released", 7, 1.7),
    "in1k-vim-s": ("Vim-S", 26, 5.1),
    "gm-in1k-tstar": ("GlobalMamba-T*", 26, 5.7),
    "gm-in1k-tstar-released": ("GlobalMamba-T*, as released", 26, 5.7),
    "in1k-vmamba-t": ("VMamba-T", 30, 4.9),
    "gm-in1k-t": ("GlobalMamba-T", 30, 5.3),
    "in1k-vmamba-s": ("VMamba-S", 50, 8.7),
    "gm-in1k-s": ("GlobalMamba-S", 50, 9.5),
    "in1k-vmamba-b": ("VMamba-B", 89, 15.4),
    "gm-in1k-b": ("GlobalMamba-B", 89, 17.0),
}
RULES = ("flops", "flops_without_scan", "flops_scan_once")


def _costs() -> Table:
    """Return what every network of the paper's table counts here."""
    columns = ["row", "network", "M, paper", "M", "G, paper", "G", "G without scan", "G, scan once a layer"]
    rows = []
    for row, (network, parameters, flops) in PRINTED.items():
        counted = count(row_config("globalmamba", row, 0))
        ours = [f"{counted[rule] / 1e9:.2f}" for rule in RULES]
        rows.append([row, network, str(parameters), f"{counted['parameters'] / 1e6:.2f}", str(flops), *ours])
    return Table("", columns, rows)


def _pyramids() -> Table:
    """Return the interpretations of how the levels pass VMamba's pyramid, and how far each is from the paper."""
    columns = ["levels apart in", *(f"{size}, G (paper {flops})" for size, flops in _claimed().items())]
    columns += ["mean distance from the paper"]
    by_stages: dict[int, dict[str, dict]] = {}
    for row in interpretations_table():
        by_stages.setdefault(row["separate_stages"], {})[row["size"]] = row
    rows = []
    for stages, sizes in by_stages.items():
        name = {0: "VMamba itself", 1: "stage 1", 4: "all stages"}.get(stages, f"stages 1 to {stages}")
        apart = [abs(row["flops"] / row["claim_flops"] - 1) for row in sizes.values()]
        cells = [f"{row['flops'] / 1e9:.2f}" for row in sizes.values()]
        rows.append([name, *cells, f"{sum(apart) / len(apart):.1%}"])
    own = ", ".join(f"{row['parameters'] / 1e6:.2f}" for row in by_stages[0].values())
    note = f"Parameters are VMamba's own in every interpretation: {own} M. The first line is held to VMamba's FLOPs."
    return Table("", columns, rows, [note])


def _claimed() -> dict[str, float]:
    """Return the FLOPs that the paper prints for GlobalMamba on VMamba, in billions, by size."""
    return {"T": 5.3, "S": 9.5, "B": 17.0}


def tables() -> dict[str, list[Table]]:
    """Return the tables of INTERPRETATIONS.md by marker name; without the extra, those of detection are left out."""
    dense = {} if missing_modules() else {"dense": costs.tables()}
    return {"costs": [_costs()], "interpretations": [_pyramids()]} | dense

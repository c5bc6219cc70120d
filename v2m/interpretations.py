"""The interpretations of what the paper leaves open, each with its parameters and FLOPs, for INTERPRETATIONS.md.

``make claims`` calls ``tables``. The counting rule is that of model.py, the same for a row and its baseline.
"""

import functools
import math
from collections.abc import Sequence

import torch
from omegaconf import DictConfig, OmegaConf

from shared.claims.compose import row_config
from shared.claims.tables import Table
from shared.dense.libraries import missing_modules
from v2m import costs
from v2m.model import build_model, count

# Printed by the paper: millions of parameters, billions of FLOPs (arXiv 2410.10382, ImageNet table).
PRINTED = {
    "v2m-in1k-vim-t": ("Vim-T", 7, 1.5),
    "v2m-in1k-t": ("V2M-T", 7, 1.9),
    "v2m-in1k-t-rotated": ("V2M-T, the input rotated", 7, 1.9),
    "v2m-in1k-t-joined": ("V2M-T, corners joined once", 7, 1.9),
    "v2m-in1k-t-released": ("V2M-T, as released", 7, 1.9),
    "v2m-in1k-localvim-t": ("LocalVim-T", 8, 1.5),
    "v2m-in1k-t-lw": ("V2M-T + local window", 8, 1.8),
    "v2m-in1k-vim-s": ("Vim-S", 26, 5.1),
    "v2m-in1k-s": ("V2M-S", 26, 5.9),
    "v2m-in1k-s-released": ("V2M-S, as released", 26, 5.9),
    "v2m-in1k-localvim-s": ("LocalVim-S", 28, 4.8),
    "v2m-in1k-s-lw": ("V2M-S + local window", 28, 5.4),
    "v2m-in1k-vmamba-t": ("VMamba-T", 30, 4.9),
    "v2m-in1k-sstar": ("V2M-S*", 30, 5.4),
    "v2m-in1k-vmamba-s": ("VMamba-S", 50, 8.7),
    "v2m-in1k-bstar": ("V2M-B*", 50, 9.6),
}
RULES = ("flops", "flops_without_scan", "flops_scan_once")
LOCAL = "model.network.mixer._target_"
# The framework figure: corners joined in front of the blocks, which then scan from one each (joined.py).
JOINED = {"model.network._target_": "v2m.joined.JoinedVim", "model.network.mixer.corners": 1}
BY_CHANNELS = JOINED | {"model.network.join": "channels"}
FIGURE = {"model.network.mixer.norm_between": True, "model.network.mlp_ratio": 4.0}
# By the rows that they belong to: the interpretations of each question, as changes of the rows' configurations. The
# first one of each question is the default.
INTERPRETATIONS: dict[tuple[str, str], dict[str, dict]] = {
    ("v2m-in1k-t", "v2m-in1k-s"): {
        "no norm between, no MLP": {},
        "norm between the passes": {"model.network.mixer.norm_between": True},
        "MLP in the block, ratio 4": {"model.network.mlp_ratio": 4.0},
        "norm and MLP": FIGURE,
        "rotated order": {"model.network.mixer.order": "rotated"},
        "corners joined once, as images": JOINED | {"model.network.join": "images"},
        "corners joined once, by channels": BY_CHANNELS,
        "corners joined once, by channels, norm and MLP": BY_CHANNELS | FIGURE,
        "one corner": {"model.network.mixer.corners": 1},
        "two corners": {"model.network.mixer.corners": 2},
    },
    ("v2m-in1k-t-lw", "v2m-in1k-s-lw"): {
        "column passes of their own, attention": {},
        "V2M's mixer alone, in windows": {LOCAL: "v2m.mixer.V2MMixer"},
        "V2M's mixer alone, 24 layers": {LOCAL: "v2m.mixer.V2MMixer", "model.network.depth": 24},
    },
    ("v2m-in1k-sstar", "v2m-in1k-bstar"): {
        f"{sets} sets, {'convolution' if taps else 'nothing'} between": {
            "model.network.scan_options.sets": sets,
            "model.network.scan_options.conv_between": taps,
        }
        for sets, taps in ((2, 4), (2, 0), (1, 4), (1, 0), (4, 4), (4, 0))
    },
}


def configured(row: str, changes: tuple[tuple[str, object], ...]) -> DictConfig:
    """Return a row's configuration with changes to it."""
    cfg = row_config("v2m", row, 0)
    OmegaConf.set_struct(cfg, False)  # another network has keys of its own; it refuses what it does not know
    for key, value in changes:
        group, *middle, name = key.split(".")
        node = cfg[group]
        for part in middle:
            node = node[part]
        if name == "depth" and "window" in cfg.model.network.mixer:
            # More layers than LocalVim has: the further ones see the whole grid.
            windows = list(cfg.model.network.mixer.window)
            cfg.model.network.mixer.window = windows + [0] * (value - len(windows))
        node[name] = value
    return cfg


@functools.cache
def counted(row: str, changes: tuple[tuple[str, object], ...]) -> dict[str, int]:
    """Return parameters and FLOPs of a row with changes to its configuration; keys as ``count_network``."""
    return count(configured(row, changes))


def distance(counts: Sequence[dict], rows: Sequence[str], rule: str) -> float:
    """Return the mean relative distance from the paper's parameters and FLOPs, these by one of ``RULES``."""
    apart = []
    for count_of_row, row in zip(counts, rows, strict=True):
        _, parameters, flops = PRINTED[row]
        apart.append(abs(count_of_row["parameters"] / (parameters * 1e6) - 1))
        apart.append(abs(count_of_row[rule] / (flops * 1e9) - 1))
    return sum(apart) / len(apart)


# Scans a layer in the printed counts: Vim's two, LocalVim's four, and for V2M its own six, and one for each corner.
SCANS = {
    "v2m-in1k-vim-t": (2,),
    "v2m-in1k-vim-s": (2,),
    "v2m-in1k-localvim-t": (4,),
    "v2m-in1k-localvim-s": (4,),
    "v2m-in1k-t": (6, 4),
    "v2m-in1k-s": (6, 4),
    "v2m-in1k-t-lw": (6, 4),
    "v2m-in1k-s-lw": (6, 4),
}
# Suffixes of the passes whose projections that counter takes, one of each kind: of LocalVim, of all others.
ONE_DIRECTION = (("_0",), ("", "_2"))


@functools.cache
def as_localmamba_counts(row: str, scans: int, changes: tuple[tuple[str, object], ...] = ()) -> float:
    """Return the FLOPs of a plain network, a row's with changes, as the counter in LocalMamba's code has them.

    A multiply-add of a linear map or a convolution is 1, but of the projections of several directions one alone counts;
    a scan is 5 L D N + 2 L D (github.com/hunto/LocalMamba).
    """
    with torch.device("meta"):
        network = build_model(configured(row, changes))
    patches = math.prod(network.grid_size)
    tokens = network.pos_embed.shape[1]
    total = patches * network.patch_embed.proj.weight.numel() + network.head.weight.numel()
    if hasattr(network, "corner_proj"):
        total += patches * network.corner_proj.weight.numel()
    for block in network.layers:
        mixer = block.mixer
        counted_once = [mixer.in_proj, mixer.out_proj]
        for suffix in ONE_DIRECTION[not hasattr(mixer, "x_proj_0")]:
            if hasattr(mixer, f"x_proj{suffix}"):
                counted_once += [getattr(mixer, f"{name}{suffix}") for name in ("x_proj", "dt_proj", "conv1d")]
        total += tokens * sum(layer.weight.numel() for layer in counted_once)
        total += scans * tokens * mixer.width * (5 * mixer.state_dim + 2)
        if hasattr(mixer, "attn"):
            total += sum(layer.weight.numel() for layer in (mixer.attn.global_reduce, mixer.attn.channel_select))
    return float(total)


def _printed() -> Table:
    """Return the paper's FLOPs beside those of the counter that LocalMamba's code has."""
    columns = ["network", "G, paper", "scans a layer", "G, as LocalMamba's code counts"]
    rows = []
    for row, choices in SCANS.items():
        name, _, flops = PRINTED[row]
        for scans in choices:
            rows.append([name, str(flops), str(scans), f"{as_localmamba_counts(row, scans) / 1e9:.2f}"])
    for row in ("v2m-in1k-t", "v2m-in1k-s"):
        name, _, flops = PRINTED[row]
        ours = as_localmamba_counts(row, 2, tuple(BY_CHANNELS.items()))
        rows.append([f"{name}, corners joined once, by channels", str(flops), "2", f"{ours / 1e9:.2f}"])
    return Table("", columns, rows)


def _costs() -> Table:
    """Return what every network of the paper's table counts here."""
    columns = ["row", "network", "M, paper", "M", "G, paper", "G", "G without scan", "G, each call once"]
    rows = []
    for row, (network, parameters, flops) in PRINTED.items():
        counts = count(row_config("v2m", row, 0))
        ours = [f"{counts[rule] / 1e9:.2f}" for rule in RULES]
        rows.append([row, network, str(parameters), f"{counts['parameters'] / 1e6:.2f}", str(flops), *ours])
    return Table("", columns, rows)


def _interpretations(rows: tuple[str, str], changes_of: dict[str, dict]) -> Table:
    """Return a question's interpretations for its two sizes, and how far each is from the paper."""
    names = [PRINTED[row][0] for row in rows]
    columns = ["interpretation"]
    for row, name in zip(rows, names, strict=True):
        _, parameters, flops = PRINTED[row]
        columns += [f"{name}, M (paper {parameters})", f"G (paper {flops})", "G, each call once"]
    columns += ["distance, each call once", "distance, in full"]
    cells = []
    for name, changes in changes_of.items():
        counts = [counted(row, tuple(changes.items())) for row in rows]
        line = [name]
        for each in counts:
            line.append(f"{each['parameters'] / 1e6:.2f}")
            line += [f"{each[rule] / 1e9:.2f}" for rule in ("flops", "flops_scan_once")]
        apart = [f"{distance(counts, rows, rule):.1%}" for rule in ("flops_scan_once", "flops")]
        cells.append([*line, *apart])
    return Table("", columns, cells)


def tables() -> dict[str, list[Table]]:
    """Return the tables of INTERPRETATIONS.md by marker name; without the extra, those of detection are left out."""
    dense = {} if missing_modules() else {"dense": costs.tables()}
    interpretations = [_interpretations(rows, each) for rows, each in INTERPRETATIONS.items()]
    return {"costs": [_costs()], "printed": [_printed()], "interpretations": interpretations} | dense

"""What training a detector or a segmenter takes on a GPU: seconds a step and peak memory, beside what was counted.

    make gpu-evidence OUT=FOLDER
    python -m commands.dense_evidence --out FOLDER [--rows v2m:v2m-coco-sstar-1x-ap,opera:opera-seg-r50-bs1024-pt150]

A row of every recipe is trained for a few steps on drawn images, resized by its own transforms, with the images that
one of its devices has, by the command that a lab types. Nothing here is a score: networks are untrained. The figures
go into ``FOLDER/dense.json``, which is written anew after every row. Exit code 1 where a row failed, 2 without a GPU.
"""

import sys
from argparse import Namespace
from pathlib import Path

from rich.table import Table

from shared.claims.compose import quoted, row_config
from shared.claims.protocol import load_paper
from shared.command_line import Parser, report, run_command
from shared.dense.libraries import require_dense
from shared.environment import repository_root
from shared.records import read_record, record_path

ROWS = (
    "v2m:v2m-coco-vmamba-t-1x,v2m:v2m-coco-sstar-1x-ap,v2m:v2m-coco-bstar-3x-ap,v2m:v2m-ade-sstar,v2m:v2m-ade-t-lw,"
    "v2m:v2m-ade-t,globalmamba:gm-coco-s-dir,globalmamba:gm-ade20k-s-delta,opera:opera-det-1x-bs1024-pt150-ap,"
    "opera:opera-seg-r50-bs1024-pt150,opera:opera-seg-vit-s-bs1024-pt150,opera:opera-seg-vit-b-bs1024-pt150"
)
STEPS = (3, 13)  # the difference is of ten steps without what begins a training
DRAWN = {"detection": "shapes", "segmentation": "shapes-labels"}


def overrides(cfg, steps: int, results: Path) -> list[str]:
    """Return what makes a row a few steps on drawn images, on one device with the images that it would have."""
    devices = cfg.trainer.devices * cfg.trainer.num_nodes
    weights = "task.weights" if "task" in cfg else "dense.weights"
    paths = {"paths.results": results, "paths.runs": results / f"runs-{steps}"}
    return [
        f"+experiment={cfg.row}",
        f"dense.data.source={DRAWN[cfg.dense.kind]}",
        f"{weights}=untrained",
        "dense.epochs=null",
        f"dense.steps={steps}",
        "dense.schedule.milestones=[]",
        "dense.ratios=[]",
        f"dense.optim.batch_size={max(cfg.dense.optim.batch_size // devices, 1)}",
        "trainer.devices=1",
        "trainer.strategy=auto",
        "trainer.workers=2",
        "output.validate_every=null",
        *(f"{key}={quoted(str(path.absolute()))}" for key, path in paths.items()),
    ]


def measured(name: str, out: Path) -> dict:
    """Return seconds a step, peak memory and counted memory of a row, "paper:row"; with "failed" where it did."""
    paper, row = load_paper(repository_root(), name.partition(":")[0]), name.partition(":")[2]
    cfg, seconds = row_config(paper, row, 0), []
    counted = paper.memory_of(cfg)
    for steps in STEPS:
        results = out / "dense" / f"{steps}-steps"
        code = run_command([*paper.command("train"), *overrides(cfg, steps, results)])
        if code:
            return {"row": name, "failed": code}
        record = read_record(record_path(results, cfg.scale.name, row, 0))
        seconds.append(record.metrics["train_seconds"])
    peak = record.metrics.get("train_memory", record.peak_memory_bytes)  # on a CPU what the whole process held
    step = (seconds[1] - seconds[0]) / (STEPS[1] - STEPS[0])
    return {"row": name, "seconds_per_step": step, "peak_bytes": int(peak), **counted}


def table_of(rows: list[dict]) -> Table:
    table = Table("row", "images", "seconds a step", "GiB, peak", "GiB, counted")
    for row in rows:
        if "failed" in row:
            table.add_row(row["row"], "failed", "", "", "")
            continue
        counted = (row["kept_bytes"] + row["state_bytes"]) / 2**30
        cells = f"{row['seconds_per_step']:.3f}", f"{row['peak_bytes'] / 2**30:.1f}", f"{counted:.1f}"
        table.add_row(row["row"], str(row["images"]), *cells)
    return table


def measure(options: Namespace) -> int:
    """Measure every row, writing the figures as they come; return the exit code."""
    from shared.bench.gpu import Figures, require_gpu  # torch, which the other commands do without

    require_dense()
    if not options.cpu:
        require_gpu()
    figures, rows = Figures(options.out / "dense.json"), []
    figures.add(checks=[])
    for name in options.rows.split(","):
        rows.append(measured(name, options.out))
        figures.add(rows=rows)
    figures.show(table_of(rows), [])
    return int(any("failed" in row for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 where a row failed, 2 after one sentence."""
    parser = Parser(prog="python -m commands.dense_evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the figures")
    parser.add_argument("--rows", default=ROWS, help="paper:row, several with commas")
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU, which says nothing of a GPU")
    try:
        return measure(parser.parse_args(arguments))
    except Exception as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())

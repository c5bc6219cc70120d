"""Scene inference measured: streaming against the reference, which makes all patches first, and one convolutional pass.

    python -m pdml.tools.bench [--height 610 --width 340 --bands 103 --patch 9 --repeat 1]
    python -m pdml.tools.bench --checkpoint runs/.../last.ckpt --row ROW --seed 0

PDML on SSRN over a random cube of the size of Pavia University. Every form runs in a process of its own, so
that its peak of memory is its own: the highest resident set, less that after imports, cube, model and a
warm-up on one patch, less the output maps. Memory is read from /proc (Linux). The second line compares the
convolutional pass with patches on trained weights, where the fraction of other labels means something.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pdml.inference import ScenePrediction, predict_scene, predict_scene_convolutional
from pdml.model import build_model
from pdml.patches import PatchSource
from pdml.scenes import load_scene
from pdml.tools import reference
from shared.claims.compose import compose, row_config
from shared.data.keyed import keyed_uniform
from shared.errors import UserError
from shared.training.checkpoints import load_weights, read_checkpoint

CLASSES = 9
FORMS = ("streaming", "reference", "convolutional")


def random_cube(height: int, width: int, bands: int) -> np.ndarray:
    """Return a cube (H, W, bands) float32, uniform on [0, 1), made row by row to leave no peak."""
    cube = np.empty((height, width, bands), np.float32)
    for row in range(height):
        cube[row] = keyed_uniform(0, row, np.arange(width * bands)).reshape(width, bands)
    return cube


def build_bench_model(spectra: np.ndarray, patch_size: int, backbone: str = "ssrn"):
    """Return untrained PDML on a backbone, components fitted on ``spectra`` (n, bands)."""
    cfg = compose("pdml", [f"model={backbone}", "method=pdml", f"patch_size={patch_size}"])
    torch.manual_seed(0)
    model = build_model(cfg, spectra.shape[1], CLASSES)
    model.spectral.fit(spectra)
    return model.eval()


def load_trained(checkpoint: Path, row: str, seed: int):
    """Return the model of a row with the weights of its run's ``last.ckpt``, and its cube (H, W, bands).

    Raises UserError for an unknown row, a missing or damaged file or weights of another row.
    """
    cfg = row_config("pdml", row, seed)
    scene, _ = load_scene(cfg.data, seed, cfg.patch_size, os.environ.get("DATA_ROOT"))
    model = build_model(cfg, scene.cube.shape[2], len(scene.class_names))
    load_weights(model, read_checkpoint(checkpoint)[0], row, checkpoint)
    return model.eval(), scene.cube


def memory_bytes(field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (highest so far) of this process."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{field}:") + 1]) * 1024


def run_form(form: str, model, cube: np.ndarray, wanted: np.ndarray | None = None):
    """Run one of FORMS over a cube: its maps (name -> array), and its cost in seconds and bytes."""
    predict_scene(model, cube, fused=False, wanted=np.arange(cube[..., 0].size).reshape(cube.shape[:2]) == 0)
    before, timer, begin = memory_bytes("VmRSS"), {}, time.perf_counter()
    if form == "convolutional":
        result = ScenePrediction(predict_scene_convolutional(model, cube, probabilities=True), None)
    elif form == "reference":
        result = reference.predict_scene(model, cube, probabilities=True, timer=timer)
    else:
        result = predict_scene(model, cube, wanted=wanted, probabilities=True, timer=timer)
    cost = {"end to end": time.perf_counter() - begin, **timer}
    readouts = {"centre": result.centre, "fused": result.fused}
    maps = {f"{of} {name}": a for of, maps in readouts.items() if maps for name, a in vars(maps).items()}
    cost["bytes"] = memory_bytes("VmHWM") - before - sum(array.nbytes for array in maps.values())
    return maps, cost


def run_in_process(form: str, shape: tuple[int, int, int], patch_size: int, folder: Path):
    """Run one of FORMS in a fresh process; returns what ``run_form`` does, NpzFile for dict."""
    height, width, bands = (str(n) for n in shape)
    command = [sys.executable, "-m", "pdml.tools.bench", "--height", height, "--width", width, "--bands", bands]
    command += ["--patch", str(patch_size), "--form", form, "--folder", str(folder)]
    subprocess.run(command, check=True)
    return np.load(folder / f"{form}.npz"), json.loads((folder / f"{form}.json").read_text())


def difference(maps, others, readout: str) -> dict:
    """Return the largest and mean absolute difference of two forms' maps and the fraction of other labels."""
    names = f"{readout} probabilities", f"{readout} uncertainty"
    apart = np.concatenate([np.abs(maps[name] - others[name]).reshape(-1) for name in names])
    labels = maps[f"{readout} prediction"] != others[f"{readout} prediction"]
    return {"largest": apart.max(), "mean": apart.mean(), "labels": labels.mean()}


def _streaming_table(costs: dict, maps: dict, shape: tuple[int, int, int]) -> Table:
    streaming, reference_cost = costs["streaming"], costs["reference"]
    table = Table("", "streaming", "reference", title="{} x {} x {}, centre and fused".format(*shape))
    for name in ("patches", "network", "readout", "end to end"):
        table.add_row(f"{name}, s", f"{streaming[name]:.1f}", f"{reference_cost[name]:.1f}")
    table.add_row("peak memory, MB", *(f"{cost['bytes'] / 1e6:.0f}" for cost in (streaming, reference_cost)))
    cube_bytes = 4 * np.prod(shape)
    table.add_row("x cube in float32", *(f"{cost['bytes'] / cube_bytes:.2f}" for cost in (streaming, reference_cost)))
    for readout in ("centre", "fused"):
        apart = difference(maps["streaming"], maps["reference"], readout)
        table.add_row(f"{readout}: largest difference", f"{apart['largest']:.1e}", "")
    return table


def _convolutional_table(costs: dict, maps: dict, title: str) -> Table:
    both = costs["streaming"]["end to end"], costs["convolutional"]["end to end"]
    pixels = maps["streaming"]["centre prediction"].size
    apart = difference(maps["convolutional"], maps["streaming"], "centre")
    table = Table("centre read-out", "by patches", "convolutional", title=title)
    table.add_row("end to end, s", *(f"{seconds:.1f}" for seconds in both))
    table.add_row("pixels / s", *(f"{pixels / seconds:.0f}" for seconds in both))
    table.add_row("largest difference", "", f"{apart['largest']:.2g}")
    table.add_row("mean difference", "", f"{apart['mean']:.2g}")
    table.add_row("other label", "", f"{apart['labels']:.2%}")
    return table


def _work(args, shape: tuple[int, int, int]) -> None:
    """Run one form in this process and leave its maps and cost in ``args.folder``."""
    cube = random_cube(*shape)
    maps, cost = run_form(args.form, build_bench_model(cube.reshape(-1, shape[2])[:1000], args.patch), cube)
    np.savez(args.folder / f"{args.form}.npz", **maps)
    (args.folder / f"{args.form}.json").write_text(json.dumps(cost))


def _compare_forms(args, shape: tuple[int, int, int], console: Console) -> None:
    """Run every form in a process of its own, best of ``args.repeat``, and print the tables."""
    costs, maps = {}, {}
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for turn, form in product(range(args.repeat), FORMS):
            status.update(f"{form}, run {turn + 1} of {args.repeat}")
            maps[form], cost = run_in_process(form, shape, args.patch, Path(folder))
            if form not in costs or cost["end to end"] < costs[form]["end to end"]:
                costs[form] = cost
        tables = _streaming_table(costs, maps, shape), _convolutional_table(costs, maps, "untrained weights")
    console.print(*tables)


def _compare_trained(args, console: Console) -> None:
    model, cube = load_trained(args.checkpoint, args.row, args.seed)
    runs = {form: run_form(form, model, cube) for form in ("streaming", "convolutional")}
    maps, costs = ({form: run[part] for form, run in runs.items()} for part in (0, 1))
    console.print(_convolutional_table(costs, maps, f"{args.row}, seed {args.seed}"))


def main() -> None:
    """Measure every form on a random cube, or the convolutional pass on a trained row; print the tables."""
    parser = argparse.ArgumentParser(prog="python -m pdml.tools.bench", description=__doc__.split("\n")[0])
    for name, default in {"height": 610, "width": 340, "bands": 103, "patch": 9, "repeat": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpoint", type=Path, help="last.ckpt of a run, its scene under DATA_ROOT")
    parser.add_argument("--row", default="jasper-disjoint-ssrn-pdml", help="the row of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the checkpoint")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = args.height, args.width, args.bands
    try:
        if args.form:
            _work(args, shape)
        elif args.checkpoint:
            _compare_trained(args, Console())
        else:
            # Before any process starts, so that bad arguments are one sentence and not three tracebacks.
            PatchSource(np.empty(shape, np.float32), args.patch)
            _compare_forms(args, shape, Console())
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the process has said why


if __name__ == "__main__":
    main()

"""Every paper's applications are Hydra's: its words work, one process is one run, and no run harms another."""

import importlib

import yaml
from omegaconf import OmegaConf

from shared.files import folder_lock
from shared.records import read_record
from shared.testing.applications import call_application
from shared.training.config import evidence_path, run_folder
from tests.contracts.papers import of_papers
from tests.contracts.processes import finish, run_application, start_command

CRASH = "of ours"


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def records(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("seed*.json"))


@of_papers("application", cases=lambda contract: [("train",), ("evaluate",)])
def test_help_lists_the_groups_and_every_row(contract, application):
    ended = run_application(contract.paper, application, "--help")
    assert ended.code == 0 and not ended.err
    assert contract.row in ended.out and "experiment" in ended.out and "optim" in ended.out


@of_papers()
def test_cfg_job_prints_the_configuration_of_the_row_and_runs_nothing(contract, tmp_path):
    ended = run_application(contract.paper, "train", *contract.overrides(tmp_path), "--cfg", "job")
    assert ended.code == 0, ended.err
    printed = yaml.safe_load(ended.out)
    assert printed["row"] == contract.row
    assert printed == yaml.safe_load(OmegaConf.to_yaml(contract.config(tmp_path)))
    assert files(tmp_path) == []


@of_papers()
def test_a_run_stands_where_its_configuration_says_whatever_the_working_folder(contract, tmp_path):
    where = tmp_path / "where"
    where.mkdir()
    ended = run_application(contract.paper, "train", *contract.overrides(tmp_path), cwd=where)
    assert ended.code == 0, ended.err
    cfg = contract.config(tmp_path)
    assert evidence_path(cfg).is_file() and not ended.err
    assert all(path.is_file() for path in contract.checkpoints(cfg))
    assert files(where) == []
    assert ended.out.count("\n") == 1 and f"{contract.row} seed 0: " in ended.out


@of_papers()
def test_evidence_that_is_there_is_not_measured_again_and_a_locked_folder_is_left_alone(contract, tmp_path):
    cfg, line = contract.config(tmp_path), contract.overrides(tmp_path)
    with folder_lock(run_folder(cfg)) as is_held:
        assert is_held
        ended = run_application(contract.paper, "train", *line)
        assert ended.code == 0 and f"{contract.row} seed 0: running elsewhere" in ended.out, ended.err
        assert records(tmp_path) == [] and not list(tmp_path.rglob("*.ckpt"))
    assert run_application(contract.paper, "train", *line).code == 0
    before = evidence_path(cfg).read_bytes(), contract.checkpoints(cfg)[0].stat().st_mtime_ns
    ended = run_application(contract.paper, "train", *line)
    assert ended.code == 0 and f"{contract.row} seed 0: already measured" in ended.out
    assert (evidence_path(cfg).read_bytes(), contract.checkpoints(cfg)[0].stat().st_mtime_ns) == before


@of_papers()
def test_a_multirun_runs_every_seed_and_one_that_is_refused_keeps_none_from_running(contract, tmp_path):
    damaged = contract.checkpoints(contract.config(tmp_path, "seed=1"))[0]
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"weights")
    ended = run_application(contract.paper, "train", "-m", *contract.overrides(tmp_path, "seed=0,1,2"))
    assert ended.code == 2
    assert records(tmp_path) == ["seed0.json", "seed2.json"]
    failed = (run_folder(contract.config(tmp_path, "seed=1")) / "failed.txt").read_text()
    assert str(damaged) in failed and "move it away" in failed and damaged.read_bytes() == b"weights"
    assert "Traceback" not in ended.out + ended.err
    assert f"{contract.row} seed 1 failed: {failed.strip()}" in ended.out
    ended = run_application(contract.paper, "train", "-m", *contract.overrides(tmp_path, "seed=0,2"))
    assert ended.code == 0 and ended.out.count("already measured") == 2


@of_papers()
def test_a_crash_of_one_job_keeps_none_from_running_and_gives_code_1(contract, tmp_path, monkeypatch):
    train = importlib.import_module(f"{contract.paper.name}.train")
    run = train.run

    def crashing(cfg, folder):
        if cfg.seed == 0:
            raise ZeroDivisionError(CRASH)
        return run(cfg, folder)

    monkeypatch.setattr(train, "run", crashing)
    ended = call_application(contract.paper, "train", "-m", *contract.overrides(tmp_path, "seed=0,1"))
    assert ended.code == 1 and records(tmp_path) == ["seed1.json"]
    failed = (run_folder(contract.config(tmp_path)) / "failed.txt").read_text()
    assert failed.startswith(f"ZeroDivisionError: {CRASH}\n") and "Traceback" in failed
    # By itself it ends the process so, with the trace.
    ended = call_application(contract.paper, "train", *contract.overrides(tmp_path))
    assert ended.code == 1 and ended.errors[-1] == f"ZeroDivisionError: {CRASH}"
    # Whole, it takes the note of its failure away.
    monkeypatch.setattr(train, "run", run)
    assert call_application(contract.paper, "train", *contract.overrides(tmp_path)).code == 0
    assert not list(tmp_path.rglob("failed.txt")) and records(tmp_path) == ["seed0.json", "seed1.json"]


@of_papers()
def test_a_sweep_over_rates_trains_each_and_says_what_replaces_what(contract, tmp_path):
    rates = [0.0011, 0.0012]
    sweep = f"optim.lr={','.join(map(str, rates))}"
    ended = run_application(contract.paper, "train", "-m", *contract.overrides(tmp_path, sweep))
    assert ended.code == 0, ended.err
    folders = [run_folder(contract.config(tmp_path, f"optim.lr={rate}")) for rate in rates]
    assert len(set(folders)) == 2 and all(folder.is_dir() for folder in folders)
    # Of one row and seed there is one record: the last measurement's. That it replaces another one is said.
    cfg = contract.config(tmp_path, f"optim.lr={rates[1]}")
    assert read_record(evidence_path(cfg)).config["optim"]["lr"] == rates[1] and len(records(tmp_path)) == 1
    assert f"{evidence_path(cfg)} held evidence of another configuration" in ended.out


@of_papers(slow=True)
def test_the_joblib_launcher_runs_a_multirun(contract, tmp_path):
    line = contract.overrides(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1")
    # From nothing: joblib's workers outlive a process that was forked.
    (ended,) = finish(start_command("-m", f"{contract.paper.name}.train", "-m", *line))
    assert ended.code == 0 and records(tmp_path) == ["seed0.json", "seed1.json"], ended.err


@of_papers("application", "key", cases=lambda c: [("train", c.unknown_keys[0]), ("evaluate", "ckpts")])
def test_an_unknown_key_is_one_line_and_code_2_and_nothing_is_written(contract, application, key, tmp_path):
    ended = run_application(contract.paper, application, *contract.overrides(tmp_path, f"{key}=1"), cwd=tmp_path)
    assert ended.code == 2 and ended.out == "" and len(ended.errors) == 1
    assert key.split(".")[-1] in ended.err and "fix the key or the value" in ended.err
    assert files(tmp_path) == []


@of_papers()
def test_an_unknown_row_or_group_is_one_line_and_code_2(contract, tmp_path):
    for override in (f"+experiment={contract.misspelt[0]}", "scale=huge"):
        ended = run_application(contract.paper, "train", override, f"paths.runs={tmp_path}", cwd=tmp_path)
        assert ended.code == 2 and ended.out == "" and len(ended.errors) == 1
        assert override.split("=")[1] in ended.err and files(tmp_path) == []

"""Every row of every paper: composed, in the ledger, run as the ledger says, and trainable at toy size."""

import importlib

import pytest
import torch
from omegaconf import DictConfig

from commands.reproduce import rows_of
from shared.claims.compose import SCALES, compose, row_config, row_names, row_overrides
from shared.claims.ledger import COUNTED, load_ledger
from shared.errors import UserError
from shared.records import BEST
from shared.testing.contract import Contract
from shared.training.config import hash_of
from tests.contracts.papers import of_papers


def ledger(contract: Contract):
    return load_ledger(contract.paper.root, contract.paper.name)


def composed(contract: Contract, row: str) -> DictConfig:
    return row_config(contract.paper, row, 0)


def rows(contract: Contract) -> list[tuple[str]]:
    return [(row,) for row in row_names(contract.paper)]


def claimed(contract: Contract) -> list[tuple[str]]:
    return [(model.Claim.Row,) for model in ledger(contract).Models]


def claim_of(contract: Contract, row: str):
    return next(model for model in ledger(contract).Models if row == model.Claim.Row)


def is_dense(contract: Contract, row: str) -> bool:
    """Say whether a row is of detection or segmentation, whose trainings are tested in ``tests/test_dense_rows.py``."""
    return composed(contract, row).get("dense") is not None


def experiments(contract: Contract) -> list[tuple[str]]:
    folder = contract.paper.folder / "configs" / "experiment"
    return [(path.stem,) for path in sorted(folder.glob("*.yaml"))]


def scale_of(contract: Contract, row: str) -> str:
    own = [scale for scale in SCALES if row in [other.Row for other in ledger(contract).rows_of_scale(scale)]]
    return own[0] if own else "full"


@of_papers()
def test_every_row_is_of_one_scale_and_only_claimed_rows_have_files(contract):
    files = {row for model in ledger(contract).Models for row in map(stem, model.configs)}
    assert {row for (row,) in experiments(contract)} == files
    runnable = [row for scale in SCALES for row in rows_of(contract.paper, scale)]
    runnable += [row.Row for row in ledger(contract).own_rows if not row.Default]
    names = row_names(contract.paper)
    assert len(set(names)) == len(names)
    assert set(runnable) == set(names)


def stem(config: str) -> str:
    return config.rsplit("/", 1)[-1].removesuffix(".yaml")


@of_papers("row", cases=rows)
def test_row_composes_to_itself_at_the_scale_of_the_ledger(contract, row):
    cfg = composed(contract, row)
    assert (cfg.row, cfg.paper, cfg.scale.name) == (row, contract.paper.name, scale_of(contract, row))


@of_papers()
def test_seed_reaches_the_configuration(contract):
    row = row_names(contract.paper)[0]
    assert composed(contract, row).seed == 0 and row_config(contract.paper, row, 3).seed == 3
    assert compose(contract.paper, row_overrides(contract.paper, row, 4, [])).seed == 4


@of_papers("row", cases=claimed)
def test_claimed_row_is_run_as_the_ledger_says(contract, row):
    model, cfg = claim_of(contract, row), composed(contract, row)
    claim, said = model.Claim, model.Metadata
    assert cfg.variant == claim.Variant
    if cfg.selection != claim.Selection:  # the run reports its last epoch, and the best one beside it
        assert (cfg.selection, cfg.output.validate_every) == ("last-epoch", 1) and claim.Selection in BEST
        assert claim.Selection != "best-ema-epoch" or cfg.optim.ema_decay is not None
    assert list(cfg.launcher.seeds) == claim.Seeds
    if is_dense(contract, row) and said["Training Data"] == cfg.dense.data.name.split()[0]:
        assert (cfg.dense.epochs, cfg.dense.optim.batch_size) == (said["Epochs"], said["Batch Size"])
        return  # elsewhere the ledger says what the pre-training is
    if contract.gives_epochs:
        assert (cfg.scale.epochs, cfg.optim.batch_size) == (said["Epochs"], said["Batch Size"])
    if contract.mixed:
        assert cfg.optim.batch_size % (2 * cfg.trainer.devices) == 0


@of_papers()
def test_what_a_claim_counts_the_paper_counts(contract):
    names = {name for model in ledger(contract).Models for name, value in model.Claim.Metrics.items() if value}
    counted = {name for name in names if name.removesuffix("_M").removesuffix("_G") in (*COUNTED, "params")}
    if not counted:
        assert not hasattr(importlib.import_module(f"{contract.paper.name}.train"), "count")
        return
    counts = contract.paper.count(contract.config(contract.paper.folder))
    assert set(COUNTED) <= set(counts) and all(value > 0 for value in counts.values())


@of_papers()
def test_the_cost_of_a_run_is_estimated(contract, tmp_path):
    assert 0 < contract.paper.seconds_of_run(contract.config(tmp_path)) < 1000


def pairs(contract: Contract) -> list[tuple[str, str]]:
    return [(row.Row, baseline) for row in ledger(contract).own_rows for baseline in row.Baseline]


@of_papers("row", "baseline", cases=pairs)
def test_row_differs_from_its_baseline_in_what_is_compared_only(contract, row, baseline):
    cfg, other = composed(contract, row), composed(contract, baseline)
    differing = {key for key in cfg if cfg[key] != other[key]}
    must, may = contract.differing
    assert must <= differing <= must | may


@of_papers()
def test_no_two_rows_are_the_same_measurement(contract):
    hashes = {row: hash_of(composed(contract, row))[0] for row in row_names(contract.paper)}
    assert all(hashes[row] == hashes[other] for row, other in contract.same.items())
    assert len(set(hashes.values())) == len(hashes) - len(contract.same)


@of_papers()
def test_how_and_where_a_run_is_computed_changes_no_hash_and_its_optimiser_does(contract):
    cfg = composed(contract, contract.row).copy()
    before = hash_of(cfg)
    cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.workers = 4, 2, 3
    cfg.paths.data_root, cfg.paths.runs, cfg.paths.results = "data", "runs elsewhere", "results elsewhere"
    cfg.logger, cfg.output.checkpoint_every = {}, 7
    if "backend" in cfg.trainer:
        cfg.trainer.backend = "reference"
    assert hash_of(cfg) == before
    cfg.optim.lr *= 2
    assert hash_of(cfg) != before
    cfg.optim.lr /= 2
    cfg.seed += 1
    assert hash_of(cfg) != before


@of_papers("key", cases=lambda contract: [(key,) for key in contract.unknown_keys])
def test_unknown_key_is_named_in_one_sentence(contract, key):
    with pytest.raises(UserError, match=key.split(".")[-1]) as error:
        compose(contract.paper, [f"{key}=1"])
    assert "\n" not in str(error.value)


@of_papers("key", cases=lambda c: [("trainer.devices",), ("optim.batch_size",)])
def test_value_of_the_wrong_type_is_named(contract, key):
    with pytest.raises(UserError, match=rf"'many'.*{key}=many|{key}=many.*'many'"):
        compose(contract.paper, [f"{key}=many"])


@of_papers()
def test_unknown_row_is_named_with_the_nearest_ones(contract):
    misspelt, meant = contract.misspelt
    with pytest.raises(UserError, match=f"'{misspelt}'.*did you mean.*{meant}"):
        row_overrides(contract.paper, misspelt, 0, [])


def trainable(contract: Contract) -> list[tuple[str]]:
    return [row for row in rows(contract) if contract.toy and not is_dense(contract, row[0])]


@of_papers("row", cases=trainable)
def test_row_takes_a_step_at_toy_size_and_every_parameter_gets_gradient(contract, row, tmp_path):
    cfg = composed(contract, row).copy()
    contract.toy(cfg)
    training = contract.prepare(cfg, tmp_path)
    module = training.module.train()
    batch = next(iter(training.data.train_dataloader()))
    loss = module.loss(batch, 0)
    loss.backward()
    assert loss.isfinite()
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    without = {name for name, p in trained.items() if p.grad is None or not p.grad.count_nonzero()}
    fewest, most = contract.dead(cfg, module.model)
    assert fewest <= without <= most
    if contract.moves_at_once and without != set(trained):
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = module.configure_optimizers()["optimizer"]
        optimizer.step()
        assert not all(torch.equal(before[name], p) for name, p in trained.items() if name not in without)

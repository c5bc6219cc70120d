"""What a run is computed on: ranks that were started elsewhere are joined, what cannot be computed is refused."""

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import OmegaConf

from shared.errors import UserError
from shared.training.checks import check_machine, cluster_environment, is_rank, process_rank

ON_CPU = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1}
STARTERS = ("SLURM_NTASKS", "SLURM_JOB_NAME", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "LOCAL_RANK", "NODE_RANK")


@pytest.fixture(autouse=True)
def nothing_was_started(monkeypatch):
    for name in STARTERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torchrun(monkeypatch):
    """Four ranks on two nodes, of which this is the last."""
    values = {"TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def srun(monkeypatch):
    """Four tasks of srun, of which this is the third."""
    values = {"SLURM_NTASKS": 4, "SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NAME": "train", "SLURM_PROCID": 2}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def settings(precision: str = "32-true", **trainer):
    return OmegaConf.create({"trainer": ON_CPU | trainer, "optim": {"precision": precision}})


def test_ranks_that_torchrun_started_are_joined(torchrun):
    cfg = settings()
    check_machine(cfg)
    assert (cfg.trainer.devices, cfg.trainer.num_nodes) == (2, 2)
    assert isinstance(cluster_environment(cfg.trainer), TorchElasticEnvironment)
    assert process_rank(cfg.trainer) == 3 and is_rank()


@pytest.mark.parametrize("key", ["devices", "num_nodes"])
def test_numbers_that_are_not_torchruns_are_refused(torchrun, key):
    with pytest.raises(UserError, match=f"trainer.{key}=3, but torchrun started 2: leave the key to torchrun"):
        check_machine(settings(**{key: 3}))


def test_tasks_of_srun_are_joined_without_requeueing(srun):
    cfg = settings(devices=2, num_nodes=2)
    check_machine(cfg)
    ranks = cluster_environment(cfg.trainer)
    assert isinstance(ranks, SLURMEnvironment) and not ranks.auto_requeue
    assert process_rank(cfg.trainer) == 2 and is_rank()


def test_another_number_of_tasks_than_ranks_is_refused(srun):
    with pytest.raises(UserError, match="need 2 ranks, but srun started 4: set"):
        check_machine(settings(devices=2))


def test_tasks_that_were_not_asked_for_by_node_are_refused(srun, monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="set --ntasks-per-node=2 and --nodes=2"):
        check_machine(settings(devices=2, num_nodes=2))


def test_a_run_on_one_device_ignores_what_a_batch_job_left_in_the_environment(srun):
    cfg = settings()
    check_machine(cfg)
    assert isinstance(cluster_environment(cfg.trainer), LightningEnvironment)
    assert process_rank(cfg.trainer) == 0 and cfg.trainer.devices == 1


def test_one_task_of_a_batch_job_starts_its_ranks_as_lightning_does(srun, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    cfg = settings(devices=2)
    check_machine(cfg)
    assert isinstance(cluster_environment(cfg.trainer), LightningEnvironment) and not is_rank()


def test_ranks_that_lightning_started_know_theirs(monkeypatch):
    cfg = settings(devices=2, num_nodes=2)
    assert process_rank(cfg.trainer) == 0 and not is_rank()
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_rank(cfg.trainer) == 3 and is_rank()


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"devices": 0}, "set 1 or more of each"),
        ({"num_nodes": 0}, "set 1 or more of each"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 is not implemented yet"),
    ],
)
def test_what_no_machine_can_compute_is_refused(trainer, words):
    with pytest.raises(UserError, match=words):
        check_machine(settings(**trainer))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is here")
@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"accelerator": "gpu"}, "trainer.accelerator=gpu, but PyTorch sees no GPU here"),
        ({"accelerator": "auto", "devices": 2}, "trainer.devices=2, but PyTorch sees no GPU here"),
    ],
)
def test_devices_that_are_not_here_are_refused(trainer, words):
    with pytest.raises(UserError, match=words):
        check_machine(settings(**trainer))


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "fp8"])
def test_a_precision_that_does_not_go_with_skipped_steps_is_refused(precision):
    with pytest.raises(UserError, match=f"optim.precision={precision} is not supported: choose one of 32-true"):
        check_machine(settings(precision))


def test_bfloat16_is_refused_where_the_processor_has_none_of_it(monkeypatch):
    supported = []
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bool(supported), raising=False)
    with pytest.raises(UserError, match="no bfloat16 arithmetic: set optim.precision=32-true"):
        check_machine(settings("bf16-mixed"))
    supported.append(1)
    check_machine(settings("bf16-mixed"))

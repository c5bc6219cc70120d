"""What the scans' GPU evidence is made with, where there is neither a GPU nor a peer."""

import importlib.util

import pytest
import torch

from shared.errors import UserError

from ..tools import scan_evidence


def test_a_peer_that_cannot_be_built_is_a_reason_and_no_failure(monkeypatch):
    def broken(source):
        raise RuntimeError("ninja is\nmissing")

    monkeypatch.setattr(scan_evidence, "mamba_ssm", broken)
    assert scan_evidence.mamba_ssm_or_reason(None) == "could not be built: ninja is missing"


@pytest.mark.skipif(importlib.util.find_spec("selective_scan_cuda") is not None, reason="mamba-ssm is here")
def test_a_peer_that_is_not_here_is_a_reason():
    assert scan_evidence.mamba_ssm_or_reason(None) == "not installed, and no source folder was given"


def test_a_wrong_source_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="selective_scan is missing: give the folder of mamba-ssm's source"):
        scan_evidence.mamba_ssm_or_reason(tmp_path)


def filled(size: int) -> dict:
    return {"size": size, "green": bool(torch.empty(size).isnan().all())}


@pytest.mark.parametrize("processes", [1, 2])
def test_checks_keep_their_order_and_see_nan_in_fresh_memory(processes, monkeypatch):
    monkeypatch.setattr(scan_evidence, "CHECKERS", processes)
    results = scan_evidence.checks_of(filled, [{"size": size} for size in (3, 1, 2)])
    assert results == [{"size": size, "green": True} for size in (3, 1, 2)]
    assert not torch.are_deterministic_algorithms_enabled()

"""The peers of our kernels, where there is none."""

import importlib.util

import pytest

from shared.bench import peers
from shared.errors import UserError


def test_a_peer_that_cannot_be_built_is_a_reason_and_no_failure(monkeypatch):
    def broken(source):
        raise RuntimeError("ninja is\nmissing")

    monkeypatch.setattr(peers, "mamba_ssm", broken)
    assert peers.mamba_ssm_or_reason(None) == "could not be built: ninja is missing"


@pytest.mark.skipif(importlib.util.find_spec("selective_scan_cuda") is not None, reason="mamba-ssm is here")
def test_a_peer_that_is_not_here_is_a_reason():
    assert peers.mamba_ssm_or_reason(None) == "not installed, and no source folder was given"


def test_a_wrong_source_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="selective_scan is missing: give the folder of mamba-ssm's source"):
        peers.mamba_ssm_or_reason(tmp_path)

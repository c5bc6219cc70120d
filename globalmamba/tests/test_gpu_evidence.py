"""The measuring script of GPUs, as far as a machine without one can tell."""

import pytest
import torch

from globalmamba import gpu_evidence
from globalmamba.kernels.selective_scan import op


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, it would be measured")
def test_without_a_gpu_it_says_so_in_one_sentence_and_writes_nothing(tmp_path, capsys):
    assert gpu_evidence.main(["--out", str(tmp_path / "figures")]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: no GPU is visible to PyTorch: run this on a machine with one"
    )
    assert not (tmp_path / "figures").exists()


def test_a_red_check_is_reported_and_nothing_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(op, "_unavailable", lambda name: "")
    monkeypatch.setattr(gpu_evidence, "CHECKED", [{"length": 1}, {"length": 2}])
    monkeypatch.setattr(gpu_evidence, "check", lambda length: {"length": length, "green": length == 1})
    monkeypatch.setattr(gpu_evidence, "timed", lambda *shape: pytest.fail("timed behind a red check"))
    assert gpu_evidence.main(["--out", str(tmp_path)]) == 1
    text = (tmp_path / "selective_scan.json").read_text()
    assert '"green": false' in text and "milliseconds" not in text


def test_cases_cover_every_type_direction_and_layout():
    kinds = {(case["dtype"], case["reverse"], case["transposed"]) for case in gpu_evidence.CHECKED}
    assert len(kinds) == 6
    assert {case["length"] for case in gpu_evidence.CHECKED} >= {1, 7, 14, 63, 197, 255, 1023}

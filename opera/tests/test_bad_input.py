"""Features that are not numbers end a run with one line (other bad input: ``contract.py``)."""

import torch

from opera import train
from opera.tests.contract import CONTRACT
from shared.testing.applications import call_application


def test_weights_that_are_not_numbers_are_one_line(tmp_path, monkeypatch):
    def broken(*arguments):
        return torch.full((10, 4), torch.nan), torch.zeros(10, dtype=torch.long)

    monkeypatch.setattr(train, "outputs", broken)
    ended = call_application(CONTRACT.paper, "train", *CONTRACT.overrides(tmp_path))
    assert ended.code == 2 and len(ended.errors) == 1
    assert "not finite" in ended.err and "lower optim.lr" in ended.err
    assert not list(tmp_path.rglob("seed0.json"))

"""Two gloo ranks measure the conflict of the objectives' gradients as one process does (the rest: the contracts)."""

import pytest

from opera.tests.small import small_config
from opera.train import measured_conflict, prepare
from shared.testing.gloo import on_ranks


def cosine(rank: int, folder: str) -> float:
    """Return the measured conflict, of parts of a batch that are unequal where there are two ranks."""
    cfg = small_config(folder, "optim.batch_size=31")
    module, data = prepare(cfg)
    return measured_conflict(cfg, module.double(), data)


@pytest.mark.slow
def test_two_ranks_measure_the_conflict_of_one_process(tmp_path):
    single = cosine(0, str(tmp_path))
    assert 0.01 < abs(single) < 1
    assert on_ranks(2, cosine, tmp_path, str(tmp_path)) == pytest.approx([single, single], rel=1e-8)

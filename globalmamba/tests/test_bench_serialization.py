"""The serialization is the release's computation, several times faster."""

import numpy as np
import pytest
import torch

from globalmamba.spectrum import dct_matrix
from globalmamba.tools.bench_serialization import PASSES, WAYS, fft_dct, fft_idct, measure_serialization, speed_up

SAME_TOKENS = 2e-6  # relative L2 in float32: what the transforms' rounding leaves
EXACT = 1e-12  # float64
HALF_OF_THE_PROMISE = 2.5  # 5 times on a quiet machine; half of it where others run too


@pytest.mark.parametrize("size", [7, 8, 21, 32])
def test_transforms_of_the_baseline_are_the_cosine_transform_and_its_inverse(size):
    x = torch.randn(3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = np.full(size, np.sqrt(2 * size))  # from the orthonormal transform to the bare sum, doubled
    scale[0] = np.sqrt(4 * size)
    assert torch.allclose(fft_dct(x), x @ torch.from_numpy(dct_matrix(size).T * scale), rtol=0, atol=size * EXACT)
    assert torch.allclose(fft_idct(fft_dct(x)), x, rtol=0, atol=EXACT)


def test_every_way_gives_the_same_tokens_and_a_time_for_every_pass():
    results = measure_serialization(batch=1, image_size=64, patch_size=8, embed_dim=4, repeats=1, threads=1)
    assert set(results) == set(WAYS) and all(set(r) == {"error", *PASSES} for r in results.values())
    assert all(r["error"] < SAME_TOKENS and min(r.values()) >= 0 for r in results.values())


@pytest.mark.slow
def test_the_serialization_is_several_times_faster_than_the_released_way_and_equal_to_it():
    for last in (False, True):
        results = measure_serialization(repeats=3)
        assert results["serialization"]["error"] < SAME_TOKENS
        ratios = [speed_up(results, of) for of in PASSES]
        if min(ratios) > HALF_OF_THE_PROMISE or last:
            break
    assert min(ratios) > HALF_OF_THE_PROMISE

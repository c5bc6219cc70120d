"""Neighbours are the exact ones, in one order, on every backend."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idml import neighbours
from idml.neighbours import nearest_neighbours, unit_rows
from shared.errors import UserError

faiss = pytest.importorskip("faiss")

CASES = [("faiss", torch.float32), ("torch", torch.float32), ("torch", torch.float64)]
IDS = ["faiss", "torch", "torch-float64"]


def brute(embeddings: torch.Tensor, k: int) -> torch.Tensor:
    """Sort all similarities, float64; a step of 1e-9 hides rounding, a stable sort keeps lower indices first."""
    rows = embeddings.double()
    similarity = (rows @ rows.T) / (rows.norm(dim=1)[:, None] * rows.norm(dim=1))
    similarity = (similarity * 2**30).round().fill_diagonal_(-torch.inf)
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, : min(k, len(rows) - 1)]


def whole_numbers(n: int, d: int, largest: int, seed: int) -> torch.Tensor:
    """Rows of few different whole numbers, of which many are equal or tie, none zero, times a common scale."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(-largest, largest + 1, (n, d), generator=draw).double()
    rows[(rows == 0).all(1)] = 1
    return 0.37 * rows


@pytest.mark.parametrize("backend, dtype", CASES, ids=IDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(2, 60), d=st.integers(1, 8), k=st.integers(1, 70), largest=st.integers(1, 3), seed=st.integers(0))
def test_neighbours_are_those_of_brute_force_with_ties_by_index(backend, dtype, n, d, k, largest, seed):
    embeddings = whole_numbers(n, d, largest, seed % 2**32).to(dtype)
    actual = nearest_neighbours(embeddings, k, backend)
    assert actual.dtype == torch.int64 and actual.shape == (n, min(k, n - 1))
    assert torch.equal(actual, brute(embeddings, k))


@pytest.mark.parametrize("backend, dtype", CASES, ids=IDS)
@pytest.mark.parametrize("k", [1, 5, 29, 100])
def test_ties_across_the_border_of_the_last_place_go_to_lower_indices(backend, dtype, k):
    # Far more rows tie at every border than candidates are searched beyond it.
    embeddings = whole_numbers(400, 3, 1, seed=0).to(dtype)
    assert torch.equal(nearest_neighbours(embeddings, k, backend), brute(embeddings, k))


@pytest.mark.parametrize("backend, dtype", CASES, ids=IDS)
def test_equal_rows_name_the_lowest_other_indices(backend, dtype):
    actual = nearest_neighbours(torch.full((300, 7), 0.3, dtype=dtype), 4, backend)
    expected = torch.arange(5).repeat(300, 1)
    for row in range(300):
        assert actual[row].tolist() == [index for index in expected[row].tolist() if index != row][:4]


@pytest.mark.parametrize("backend, dtype", CASES, ids=IDS)
def test_order_holds_where_float32_cannot_tell_similarities_apart(backend, dtype):
    # An untrained network gives nearly the same row for every image. Here similarities differ by 1e-8.
    draw = torch.Generator().manual_seed(0)
    embeddings = (1 + 1e-4 * torch.randn(500, 64, generator=draw)).to(dtype)
    assert torch.equal(nearest_neighbours(embeddings, 20, backend), brute(embeddings, 20))


@pytest.mark.parametrize("backend, dtype", CASES, ids=IDS)
def test_backends_agree_on_random_rows_whatever_their_lengths(backend, dtype):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(2500, 48, generator=draw)
    lengths = 2.0 ** torch.randint(-40, 40, (2500, 1), generator=draw)
    expected = brute(rows, 25)
    assert torch.equal(nearest_neighbours((rows * lengths).to(dtype), 25, backend), expected)
    # the place of a row and the number of queries at once change nothing
    some = torch.tensor([2499, 3, 77])
    assert torch.equal(nearest_neighbours(rows.to(dtype), 25, backend, some), expected[some])


def test_chunks_change_nothing(monkeypatch):
    embeddings = whole_numbers(300, 4, 2, seed=3).float()
    expected = brute(embeddings, 6)
    monkeypatch.setattr(neighbours, "CHUNK_BYTES", 7 * 4 * 300)
    monkeypatch.setattr(neighbours, "FAISS_ROWS", 7)
    monkeypatch.setattr(neighbours, "PAIRS", 5)
    for backend in ("faiss", "torch"):
        assert torch.equal(nearest_neighbours(embeddings, 6, backend), expected)


def test_reduced_precision_of_matrix_products_is_not_taken_over():
    embeddings = torch.randn(400, 32, generator=torch.Generator().manual_seed(4))
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            actual = nearest_neighbours(embeddings, 10, "torch")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(actual, brute(embeddings, 10))


def test_extreme_lengths_are_directions_all_the_same():
    rows = whole_numbers(50, 4, 2, seed=5) / 0.37
    lengths = torch.tensor([1e-200, 1.0, 1e200, 2e-308, 1e300], dtype=torch.float64)
    scaled = rows * lengths[torch.arange(50) % 5, None]
    assert torch.equal(unit_rows(scaled[1::5]), unit_rows(rows[1::5]))
    torch.testing.assert_close(unit_rows(scaled), unit_rows(rows), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_one_sentence(value):
    embeddings = torch.ones(9, 3)
    embeddings[4, 1] = embeddings[7, 2] = value
    sentence = r"^2 of 9 embeddings \(the first is row 4\) hold NaN or infinity: the training diverged, .*optim\.lr"
    with pytest.raises(UserError, match=sentence):
        nearest_neighbours(embeddings, 2)


def test_rows_of_zeros_too_few_rows_and_unknown_backends_are_one_sentence():
    with pytest.raises(UserError, match=r"1 of 5 embeddings \(the first is row 3\) are all zeros"):
        nearest_neighbours(torch.ones(5, 2) * torch.tensor([1, 1, 1, 0, 1.0])[:, None], 1)
    for n in (0, 1):
        with pytest.raises(UserError, match=f"{n} embeddings have no neighbours"):
            nearest_neighbours(torch.ones(n, 2), 1)
    with pytest.raises(UserError, match="no backend 'annoy' .*choose auto, faiss or torch"):
        nearest_neighbours(torch.ones(3, 2), 1, "annoy")
    with pytest.raises(UserError, match="backend=faiss needs .* float32 embeddings on the CPU"):
        nearest_neighbours(torch.ones(3, 2).double(), 1, "faiss")


def test_without_faiss_torch_searches(monkeypatch):
    monkeypatch.setattr(neighbours, "faiss", None)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert nearest_neighbours(torch.eye(3), 2).tolist() == [[1, 2], [0, 2], [0, 1]]
    with pytest.raises(UserError, match="faiss-cpu"):
        nearest_neighbours(torch.eye(3), 2, "faiss")


@pytest.fixture
def one_thread():
    """Give torch and faiss one thread each: their CPU time is then what they need, whatever else the machine does."""
    kept = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(kept[0])
    faiss.omp_set_num_threads(kept[1])


def cpu_seconds(call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


@pytest.mark.slow
@pytest.mark.parametrize("k", [12, 100])
def test_search_is_no_slower_than_a_flat_index_plus_a_fifth(one_thread, k):
    """The bar is of 60,502 samples (bench.py): what settles the order is linear in n and weighs more in few."""
    rows = torch.randn(28672, 512, generator=torch.Generator().manual_seed(6))
    normed = unit_rows(rows).float().numpy()
    index = faiss.IndexFlatIP(512)
    index.add(normed)

    def ratio():
        ours = min(cpu_seconds(lambda: nearest_neighbours(rows, k)) for _ in range(2))
        return ours / min(cpu_seconds(lambda: index.search(normed, k + 1)) for _ in range(2))

    assert ratio() <= 1.2 or ratio() <= 1.2

"""The exact nearest neighbours of every embedding, in chunks, the same ones on every backend.

Retrieval is scored by cosine similarity, as in the release, which orders samples as the Euclidean distance
on the unit sphere does. A fast search in the embeddings' own precision proposes a few more candidates than asked for.
Whatever its rounding leaves in doubt is settled in float64: the order among candidates from the doubtful pairs alone,
a border that candidates beyond the last may cross from the query's similarity to all rows. So the answer depends
neither on backend, threads, chunks nor the place of a row, and ties go to the lower index.
"""

import functools
import time
import warnings
from contextlib import contextmanager

import torch
from torch.nn.functional import pad

from shared.errors import UserError

try:
    import faiss
except ImportError:  # the torch backend does the same work
    faiss = None

# A similarity counts as that many steps from -1 to 1 twice over: float64 rounds far below a step, so what is equal in
# exact arithmetic ties, and steps and index fit one integer that sorts both.
STEPS, INDEX_BITS = 2**30, 31
LAST_INDEX = 2**INDEX_BITS - 1
NEVER = -(2**62)  # below every key: the query itself
FAISS_ROWS = 4096  # the number of queries that faiss itself takes at once
CHUNK_BYTES = 2**27  # of one tensor (queries, n); up to four such tensors live at once
PAIRS = 1024  # pairs of rows compared in float64 at once, on a GPU
NORMED = 1024  # rows brought to length 1 at once
SMALL, TRIAL = 8192, 256  # samples of a trial, and of the least set that is worth one; its queries


def unit_rows(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the rows of embeddings (n, d) at length 1, float64, without their history.

    Raises UserError for rows with NaN or infinity, and for rows of zeros, which have no direction.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (n, d), not {tuple(embeddings.shape)}")
    finite = torch.isfinite(embeddings).all(1)
    if not finite.all():
        raise UserError(
            f"{_count(~finite)} hold NaN or infinity: the training diverged, lower optim.lr or give another checkpoint"
        )
    rows = embeddings.detach().to(torch.float64, copy=True)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
    if not largest.all():
        raise UserError(
            f"{_count(largest[:, 0] == 0)} are all zeros and have no direction: "
            "the network's output died, lower optim.lr or give another checkpoint"
        )
    # A part at a time, which stays in the cache.
    for some, most in zip(rows.split(NORMED), largest.split(NORMED), strict=True):
        # By a power of two, which rounds nothing: squares of very large or small values would leave float64.
        some /= torch.exp2(torch.frexp(most).exponent.double() - 1)
        some /= torch.linalg.vector_norm(some, dim=1, keepdim=True)
    return rows


def _count(bad: torch.Tensor) -> str:
    return f"{int(bad.sum())} of {len(bad)} embeddings (the first is row {int(bad.nonzero()[0])})"


def nearest_neighbours(
    embeddings: torch.Tensor, k: int, backend: str = "auto", queries: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the indices of the k nearest other samples of every sample, int64 (n, min(k, n - 1)).

    ``embeddings``: (n, d), float32 or float64; other types are converted to float32. The order is by decreasing inner
    product of the rows at length 1, ties (to 1e-9) by increasing index; a sample is never its own neighbour, a
    duplicate of it may be. ``backend``: "faiss" (CPU, float32), "torch" (any device), or "auto": the faster one.
    ``queries``: indices (q,) of the samples whose neighbours are wanted, among all others; the result is then (q, ...).
    Extra memory is about 12 n d bytes and 0.5 GiB. Raises UserError for fewer than two rows, rows with NaN, infinity or
    only zeros, and a backend that this machine cannot run.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    unit = unit_rows(embeddings)
    n, d = unit.shape
    if n < 2:
        raise UserError(f"{n} embeddings have no neighbours: give a test set of at least two samples")
    rough = unit if embeddings.dtype == torch.float64 else unit.float()
    propose, rows_at_once = _backend(backend, rough)
    k = min(k, n - 1)
    width = min(n, k + 1 + max(8, k // 10))  # + 1: the query is among them
    # No sum of d products of unit rows is further off than d + 8 half units, whatever its order; two are compared.
    doubt = (d + 8) * torch.finfo(rough.dtype).eps + 4 / STEPS
    queries = torch.arange(n, device=unit.device) if queries is None else queries.to(unit.device)
    with torch.no_grad(), _full_precision(unit.device):
        parts = [_settle(unit, part, *propose(rough, part, width), k, doubt) for part in queries.split(rows_at_once)]
    return torch.cat(parts)


def _backend(name: str, rough: torch.Tensor):
    """Return the function that proposes candidates and the number of queries to hand it at once."""
    fits = faiss is not None and rough.device.type == "cpu" and rough.dtype == torch.float32
    if name == "faiss" and not fits:
        raise UserError("backend=faiss needs the package faiss-cpu and float32 embeddings on the CPU: choose torch")
    if name not in ("auto", "faiss", "torch"):
        raise UserError(f"there is no backend {name!r} for neighbours: choose auto, faiss or torch")
    if name == "auto":
        large = fits and len(rough) >= SMALL
        name = _faster(rough.shape[1], torch.get_num_threads()) if large else "torch"
    if name == "faiss":
        return _propose_faiss, FAISS_ROWS
    return _propose_torch, max(1, CHUNK_BYTES // (len(rough) * rough.element_size()))


@functools.cache
def _faster(width: int, threads: int) -> str:
    """Return the backend that is faster on this machine, by one trial per process.

    The neighbours are the same either way. The backends multiply matrices by different libraries, each of which needs
    half the other's time on some CPU.
    """
    seconds, rough = {}, torch.randn(SMALL, width, generator=torch.Generator().manual_seed(0))
    for name, propose in (("torch", _propose_torch), ("faiss", _propose_faiss)):
        for _ in range(2):  # the first one warms up
            begin = time.perf_counter()
            propose(rough, torch.arange(TRIAL), TRIAL)
            seconds[name] = time.perf_counter() - begin
    return min(seconds, key=seconds.get)


def _propose_faiss(rough: torch.Tensor, queries: torch.Tensor, width: int):
    proposals = faiss.knn(rough[queries].numpy(), rough.numpy(), width, metric=faiss.METRIC_INNER_PRODUCT)
    return tuple(torch.from_numpy(array) for array in proposals)


def _propose_torch(rough: torch.Tensor, queries: torch.Tensor, width: int):
    return (rough[queries] @ rough.T).topk(width)


def _settle(unit, queries, similarity, index, k: int, doubt: float) -> torch.Tensor:
    """Return the k nearest (q, k) from candidates (q, width): similarities in decreasing order, and indices.

    Two similarities that differ by more than ``doubt`` are in their true order.
    """
    # The first k + 1, the query maybe among them, are surely nearer than all that is not among the candidates.
    settled = similarity[:, k] - similarity[:, -1] > doubt
    if similarity.shape[1] == len(unit):
        settled = torch.ones_like(settled)
    close = (similarity[:, :-1] - similarity[:, 1:] <= doubt) & settled[:, None]
    row, place = (pad(close, (1, 0)) | pad(close, (0, 1))).nonzero(as_tuple=True)
    similarity = similarity.double()
    similarity[row, place] = _products(unit, queries, row, index[row, place])
    nearest = _ordered(similarity, index, queries, k)
    everyone = torch.arange(len(unit), device=unit.device)
    for rows in (~settled).nonzero()[:, 0].split(max(1, CHUNK_BYTES // (8 * len(unit)))):
        nearest[rows] = _ordered(unit[queries[rows]] @ unit.T, everyone, queries[rows], k)
    return nearest


def _products(unit: torch.Tensor, queries: torch.Tensor, row: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return unit[queries[row]] . unit[other], (p,) float64, for ``row`` (p,) and ``other`` (p,)."""
    if unit.device.type != "cpu":
        pairs = zip(row.split(PAIRS), other.split(PAIRS), strict=True)
        return torch.cat([row.new_zeros(0, dtype=unit.dtype)] + [(unit[queries[i]] * unit[j]).sum(1) for i, j in pairs])
    # A product of matrices at some places alone: nothing is copied, which would take most of the time. Its rows are the
    # samples, each read once for all queries that it is compared with; the queries stay in the cache.
    order = (other * len(queries) + row).argsort()
    starts = torch.searchsorted(other[order], torch.arange(len(unit) + 1))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # sparse tensors are said to be new
        pattern = torch.sparse_csr_tensor(
            starts, row[order], unit.new_zeros(len(row)), (len(unit), len(queries)), check_invariants=False
        )
        products = torch.sparse.sampled_addmm(pattern, unit, unit[queries].T, beta=0.0).values()
    return torch.empty_like(products).index_copy_(0, order, products)


def _ordered(similarity, index, queries, k: int) -> torch.Tensor:
    """Return the k indices of largest similarity of each row, ties by increasing index, the query left out."""
    keys = (similarity * STEPS).round_().long().mul_(2**INDEX_BITS).add_(LAST_INDEX - index)
    keys.masked_fill_(index == queries[:, None], NEVER)
    return LAST_INDEX - (keys.topk(k).values & LAST_INDEX)


@contextmanager
def _full_precision(device: torch.device):
    """Keep matrix products out of TF32, bfloat16 and autocast, whose rounding ``doubt`` does not cover."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(kept)

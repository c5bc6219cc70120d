"""What this paper promises about speed: retrieval and clustering scored at the size of SOP's test set.

    python -m idml.tools.bench [--threads 2] [--samples 60502] [--queries N] [--reference-queries N] [--k 100]

Synthetic embeddings, 512 wide, in classes of 2 to 12 samples, 11,316 classes in 60,502 samples. Search, scores and
k-means are measured apart, each in a process of its own: seconds of one call (search and scores: median of 3) and the
rise of the peak of resident memory during it (Linux). Search counts everything from raw embeddings on;
``faiss.IndexFlatIP`` gets normalised rows in a finished index, and may order ties as it likes. The reference
(reference.py, in loops) scores the same neighbours and clusters; with ``--reference-queries`` its retrieval is timed on
that many and scaled, as its row says.
"""

import argparse
import importlib.util
import platform
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from idml.clustering import clustering_scores, kmeans
from idml.neighbours import nearest_neighbours, unit_rows
from idml.retrieval import neighbours_needed, retrieval_metrics
from idml.tools import reference
from shared.bench.measure import Measured, measured

SAMPLES, CLASSES, WIDTH = 60502, 11316, 512
SMALLEST, LARGEST = 2, 12  # samples in a class
SEARCHES = 3  # by the default backend and its peer, in turn
WARM_UP = 64  # queries, so that what is loaded on first use does not count


def synthetic(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (n, WIDTH) float32 around class centres and labels (n,) int64, of exactly n samples."""
    draw = torch.Generator().manual_seed(0)
    classes = max(1, round(samples * CLASSES / SAMPLES))
    # Every class has the smallest size and a number of places beyond, of which as many are used as samples are left.
    places = torch.randperm(classes * (LARGEST - SMALLEST), generator=draw)[: samples - SMALLEST * classes]
    sizes = SMALLEST + torch.bincount(places % classes, minlength=classes)
    labels = torch.repeat_interleave(torch.arange(classes), sizes)
    labels = labels[torch.randperm(len(labels), generator=draw)]
    centres = torch.randn(classes, WIDTH, generator=draw)
    return centres[labels] + 2 * torch.randn(len(labels), WIDTH, generator=draw), labels


def search_call(backend: str, samples: int, queries: int, k: int):
    """Return a call that finds the k nearest of the first queries with one of our backends."""
    embeddings, _ = synthetic(samples)
    nearest_neighbours(embeddings[: 2 * WARM_UP], k, backend)
    return lambda: nearest_neighbours(embeddings, k, backend, torch.arange(queries))


def flat_call(samples: int, queries: int, k: int):
    """Return a call that searches ``faiss.IndexFlatIP``, the query itself among its k + 1 neighbours."""
    import faiss  # only the peer needs it

    rows = unit_rows(synthetic(samples)[0]).float().numpy()
    index = faiss.IndexFlatIP(WIDTH)
    index.add(rows)
    index.search(rows[:WARM_UP], k + 1)
    return lambda: index.search(rows[:queries], k + 1)[0].shape


def retrieval_call(neighbours, labels, ks):
    """Return a call that scores neighbours of the first samples."""
    queries = torch.arange(len(neighbours))
    retrieval_metrics(neighbours[:WARM_UP], labels, ks, queries[:WARM_UP])
    return lambda: retrieval_metrics(neighbours, labels, ks, queries)


def retrieval_reference_call(neighbours, labels, ks, queries: int):
    """Return a call that scores the first queries by the reference."""
    neighbours, labels = neighbours.numpy(), labels.numpy()
    return lambda: reference.retrieval_metrics(neighbours, labels, ks, range(queries))


def clustering_call(labels, assignment):
    """Return a call that scores clusters."""
    clustering_scores(labels[:WARM_UP], assignment[:WARM_UP])
    return lambda: clustering_scores(labels, assignment)


def clustering_reference_call(labels, assignment):
    """Return a call that scores clusters by the reference."""
    labels = labels.numpy()
    return lambda: reference.clustering_scores(labels, assignment)


def kmeans_call(samples: int):
    """Return a call that makes as many clusters as classes."""
    embeddings, labels = synthetic(samples)
    return lambda: kmeans(embeddings, len(labels.unique()), seed=0)


class Rows:
    """The table as it grows: every part's seconds and memory, its peer's seconds, and how often faster."""

    def __init__(self, title: str):
        self.table = Table("part", "ours, s", "peer", "peer, s", "peer / ours", "extra memory, MB", title=title)
        for column in self.table.columns[1:2] + self.table.columns[3:]:
            column.justify = "right"

    def add(self, part: str, ours: Measured, peer: str = "–", peer_seconds: float | None = None) -> None:
        """Add one row; a part without a peer leaves its cells empty."""
        memory = "–" if ours.extra_bytes is None else f"{ours.extra_bytes / 1e6:.0f}"
        peer_cell = "–" if peer_seconds is None else f"{peer_seconds:.2f}"
        ratio = "–" if peer_seconds is None else f"{peer_seconds / ours.seconds:.2f}"
        self.table.add_row(part, f"{ours.seconds:.3f}", peer, peer_cell, ratio, memory)


def add_search(rows: Rows, samples: int, queries: int, k: int, threads: int) -> torch.Tensor:
    """Measure the search by every backend that this machine can run and return the neighbours that they agree on.

    The default backend and its peer in turn, medians of SEARCHES, so that both meet the same moods of the
    machine; the others once.
    """
    flat: list[float] = []
    chosen: list[Measured] = []
    for _ in range(SEARCHES):
        if importlib.util.find_spec("faiss"):
            flat.append(measured(flat_call, samples, queries, k, threads=threads).seconds)
        chosen.append(measured(search_call, "auto", samples, queries, k, threads=threads))
    seconds = statistics.median(measurement.seconds for measurement in chosen)
    ours = {"auto": chosen[0]._replace(seconds=seconds)}
    for backend in ("torch", "faiss") if flat else ("torch",):
        ours[backend] = measured(search_call, backend, samples, queries, k, threads=threads)
    for backend, measurement in ours.items():
        peer = statistics.median(flat) if flat else None
        rows.add(f"search, k {k}, {backend}", measurement, "faiss.IndexFlatIP", peer)
    neighbours = [measurement.result for measurement in ours.values()]
    if not all(torch.equal(neighbours[0], other) for other in neighbours):
        raise AssertionError("the backends found different neighbours")
    return neighbours[0]


def add_scores(rows: Rows, neighbours, labels, ks, assignment, reference_queries: int | None, threads: int) -> None:
    """Measure the scores of retrieval and clustering beside the reference, apart and together."""
    reference_queries = min(reference_queries or len(neighbours), len(neighbours))
    ours = measured(retrieval_call, neighbours, labels, ks, threads=threads, repeats=3)
    reference_seconds = measured(
        retrieval_reference_call, neighbours, labels, ks, reference_queries, threads=threads
    ).seconds
    reference_seconds *= len(neighbours) / reference_queries
    peer = (
        "reference" if reference_queries == len(neighbours) else f"reference, scaled from {reference_queries} queries"
    )
    rows.add(f"recall@{ks}, RP, MAP@R", ours, peer, reference_seconds)
    clusters = measured(clustering_call, labels, assignment, threads=threads, repeats=3)
    cluster_reference_seconds = measured(clustering_reference_call, labels, assignment, threads=threads).seconds
    rows.add("NMI, F1", clusters, "reference", cluster_reference_seconds)
    measured_memory = ours.extra_bytes is not None
    both = max(ours.extra_bytes, clusters.extra_bytes) if measured_memory else None
    rows.add(
        "all scores",
        Measured(ours.seconds + clusters.seconds, both, None),
        "reference",
        reference_seconds + cluster_reference_seconds,
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m idml.tools.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="size of the set")
    parser.add_argument("--queries", type=int, help="samples whose neighbours are searched among all (default: all)")
    parser.add_argument("--reference-queries", type=int, help="queries that the reference scores (default: all)")
    parser.add_argument("--k", type=int, default=100, help="recall is scored at powers of ten up to this")
    args = parser.parse_args()
    queries = min(args.queries or args.samples, args.samples)
    _, labels = synthetic(args.samples)
    ks = [k for k in (1, 10, 100, 1000) if k <= args.k]
    classes = len(labels.unique())
    console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width
    capability = torch.backends.cpu.get_cpu_capability()
    console.print(f"{platform.machine()} {capability}, {args.threads} threads, torch {torch.__version__}")
    rows = Rows(f"{queries} queries among {args.samples} x {WIDTH} float32, {classes} classes")
    k = neighbours_needed(labels, ks)
    neighbours = add_search(rows, args.samples, queries, k, args.threads)
    clusters = measured(kmeans_call, args.samples, threads=args.threads)
    add_scores(rows, neighbours, labels, ks, clusters.result, args.reference_queries, args.threads)
    rows.add("k-means as scored, one seed", clusters)
    console.print(rows.table)


if __name__ == "__main__":
    main()

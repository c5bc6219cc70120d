"""How a paper describes itself to the contract tests: ``<paper>/tests/contract.py`` holds one ``CONTRACT``.

The functions of a contract stand at the top of that file, because processes of a test get them by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from shared.claims.compose import compose
from shared.claims.protocol import Paper
from shared.training.config import run_folder


@dataclass
class Training:
    """What a run trains with. ``fit(callbacks)`` trains; ``state()`` is what must be kept beside the weights."""

    module: Any
    data: Any
    fit: Callable[[list], Any]
    state: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Bad:
    """Overrides that a run is refused for, what the one sentence says is wrong, and its remedy."""

    overrides: list[str]
    wrong: str
    remedy: str
    row: str | None = None  # in place of the contract's


# Defaults with a name, by which a process of a test gets them.


def _nothing_follows(module) -> None:
    pass


def _labels(batch) -> int:
    return len(batch["labels"])


def _all_have_gradients(cfg, network) -> tuple[set[str], set[str]]:
    return set(), set()


def own_checkpoint(cfg: DictConfig) -> list[Path]:
    """Return the checkpoints of a run that trains once."""
    return [run_folder(cfg) / "last.ckpt"]


@dataclass(frozen=True)
class Contract:
    """A paper's small runs, and what its contract tests need to know of it."""

    paper: Paper
    row: str  # of the demo scale; composed with ``small`` it takes seconds on a CPU
    small: list[str]
    length: Callable[[int], list[str]]  # overrides for that many steps
    prepare: Callable[[DictConfig, Path], Training]
    checkpoints: Callable[[DictConfig], list[Path]] = own_checkpoint  # in the order in which they are trained
    # Resumption: overrides that turn on all that is random or kept beside the weights, and the steps of a run.
    random: list[str] = field(default_factory=list)
    steps_per_epoch: int = 1
    steps: int = 1
    copies: tuple[str, str] | None = None  # prefixes of weights and of the average that a checkpoint keeps of them
    stops: list[tuple[int, int]] = field(default_factory=list)  # (training, step) where a signal ends an application
    # Ranks: cases of overrides; the loss and whatever goes with it, of which the first is minimised.
    rank_cases: dict[str, list[str]] = field(default_factory=dict)
    losses: Callable[[Any, Any, int], Tensor] | None = None
    after_step: Callable[[Any], None] = _nothing_follows
    labelled: Callable[[Any], int] = _labels
    rate: float = 0.1
    is_share: bool = False  # a rank's loss is its share, times the ranks
    mixed: list[str] = field(default_factory=list)  # a batch of mixed images that three ranks can share, and two not
    rank_run: list[str] = field(default_factory=list)  # overrides of an application on ranks
    rank_tolerance: float = 1e-9
    # Rows and keys.
    named_by: tuple[str, ...] = ("seed", "hash", "row")  # what a folder of checkpoints is named by
    unfit: list[str] = field(default_factory=list)  # overrides of a network that the row's checkpoint does not fit
    misspelt: tuple[str, str] = ("", "")  # an unknown row, and one that is meant by it
    unknown_keys: tuple[str, ...] = ("optim.lrr", "nothing")
    gives_epochs: bool = True  # the ledger's Metadata of a claim that is not blocked
    same: dict[str, str] = field(default_factory=dict)  # rows that are the same measurement
    differing: tuple[set[str], set[str]] = (set(), set())  # keys in which a row must, and may, differ from a baseline
    toy: Callable[[DictConfig], None] | None = None  # makes any row tiny, on embedded data
    dead: Callable[[DictConfig, Any], tuple[set[str], set[str]]] = _all_have_gradients
    moves_at_once: bool = True  # the first step's rate is above 0
    # Bad input by name; pictures that an evaluation leaves.
    bad: dict[str, Bad] = field(default_factory=dict)
    bad_evaluation: dict[str, Bad] = field(default_factory=dict)
    scores: tuple[str, ...] = ("top1",)  # fractions that a run and the evaluation of its checkpoint have alike
    draw: list[str] = field(default_factory=list)  # overrides that ask for the pictures
    pictures: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.paper.name

    def overrides(self, folder: Path, *more: str, steps: int = 3, row: str | None = None) -> list[str]:
        """Return the command line of a small run with its paths under ``folder``."""
        paths = [f"paths.runs={folder}/runs", f"paths.results={folder}/results"]
        small = [part for part in self.small if row in (None, self.row) or not part.startswith("model")]
        return [f"+experiment={row or self.row}", *small, *self.length(steps), *paths, *more]

    def config(self, folder: Path, *more: str, steps: int = 3, row: str | None = None) -> DictConfig:
        """Return the configuration of a small run."""
        return compose(self.paper, self.overrides(folder, *more, steps=steps, row=row))

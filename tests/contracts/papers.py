"""The contracts of all papers, and of the toy paper among the tests of ``shared``."""

import importlib
import sys

import pytest

from shared.claims.protocol import Paper, paper_names
from shared.environment import repository_root
from shared.testing.contract import Contract
from tests.contracts.processes import preload

TOYS = repository_root() / "shared" / "tests" / "papers"
if str(TOYS) not in sys.path:
    sys.path.insert(0, str(TOYS))
PAPERS = [*(Paper(name, repository_root()) for name in paper_names(repository_root())), Paper("toy", TOYS)]
CONTRACTS: list[Contract] = [importlib.import_module(f"{paper.name}.tests.contract").CONTRACT for paper in PAPERS]
preload(PAPERS)


def of_papers(*arguments: str, cases=lambda contract: [()], slow: bool = False, twins: bool = True):
    """Parametrise a test over ``contract`` and, beside it, over the arguments of its cases.

    Without ``twins`` V2M is left out, whose applications are GlobalMamba's to the byte (tests/test_twins.py).
    """
    marks = [pytest.mark.slow] if slow else []
    parameters = [
        pytest.param(contract, *case, id="-".join([str(contract), *map(str, case)]), marks=marks)
        for contract in CONTRACTS
        for case in cases(contract)
        if twins or str(contract) != "v2m"
    ]
    return pytest.mark.parametrize(["contract", *arguments], parameters)

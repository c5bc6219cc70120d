"""Every tool of a paper starts: `python -m <paper>.tools.<tool> --help` says how it is used."""

import importlib
import logging
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.glob("*/tools/*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def test_there_are_tools():
    assert {"opera.tools.export", "idml.tools.gpu_evidence", "pdml.tools.bench"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_says_how_it_is_used(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(tool).main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {tool} ")
    assert logging.root.manager.disable == 0, "a tool silences by logger: what holds for a process outlives its caller"

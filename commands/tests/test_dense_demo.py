"""The demo of detection and segmentation, by the command of its page."""

import json
import os
import subprocess
import sys

import pytest

from shared.dense import libraries
from shared.environment import repository_root

ROWS = {"gm-shapes": ("ap_box", 0.5), "gm-shapes-labels": ("miou", 0.3)}  # of background alone: mIoU 0.2


@pytest.mark.slow
@pytest.mark.skipif(
    bool(libraries.missing_modules()), reason="the extra for detection and segmentation is not here: make setup-dense"
)
def test_the_demo_ends_with_both_scores(tmp_path):
    command = [sys.executable, "-m", "commands", "reproduce", "globalmamba", "--rows", ",".join(ROWS)]
    environment = os.environ | {"PYTHONPATH": str(repository_root())}
    done = subprocess.run([*command, "--results", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for row, (metric, least) in ROWS.items():
        (file,) = tmp_path.glob(f"**/{row}/seed0.json")
        assert json.loads(file.read_text())["metrics"][metric] > least, row

"""A comparative step in a CUDA graph: it either replays as an eager step, with other masks each time, or says that it
cannot be captured. Captures run in processes of their own, since a failed one can leave the generators unusable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["sequential"], ["sequential", "1"], ["stacked"], ["low memory"]], ids=" ".join)
def test_a_step_in_a_cuda_graph_replays_as_an_eager_one_or_is_refused(arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "scripts" / "capture_step.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        assert "captur" in found["error"].lower(), found["error"]
        return
    for replayed, eager in zip(found["replayed"], found["eager"], strict=True):
        assert flat(replayed) == pytest.approx(flat(eager), rel=1e-4)
    assert ablated(found["replayed"][0]) != pytest.approx(ablated(found["replayed"][1]), rel=1e-4)
    assert ablated(found["next"]) != pytest.approx(ablated(found["replayed"][1]), rel=1e-4)


def flat(losses):
    """Task losses `(batch, parts, variants)` one after the other."""
    return [loss for parts in losses for variants in parts for loss in variants]


def ablated(losses):
    """The same of the ablated variants."""
    return [loss for parts in losses for variants in parts for loss in variants[1:]]

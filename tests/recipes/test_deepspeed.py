"""DeepSpeed shards what DistributedDataParallel copies, and trains the same weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import free_port
from tests.scripts import train_with_deepspeed as script

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("deepspeed")

STAGES = [2, 3]


def launched(folder, stage):
    """What each of two processes saved."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, script.__file__, str(folder), str(stage)],
        env={**os.environ, **on_cpu, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Trained under DistributedDataParallel."""
    return launched(tmp_path_factory.mktemp("copied"), 0)


@pytest.fixture(scope="module", params=STAGES, ids="stage {}".format)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def sharded(stage, tmp_path_factory):
    """Trained under DeepSpeed."""
    return launched(tmp_path_factory.mktemp("sharded"), stage)


@pytest.mark.parametrize("setting", [*script.SETTINGS, *script.ACCUMULATED])
def test_deepspeed_trains_as_distributed_data_parallel(setting, sharded, copied):
    for ours, expected in zip(sharded, copied, strict=True):
        assert (ours[setting]["kind"], expected[setting]["kind"]) == ("DeepSpeedEngine", "DistributedDataParallel")
        torch.testing.assert_close(ours[setting]["weights"], expected[setting]["weights"])


@pytest.mark.parametrize("setting", ["sequential", "stacked", "sequential, accumulated"])
def test_logs_under_deepspeed_are_those_of_distributed_data_parallel(setting, sharded, copied):
    for ours, expected in zip(sharded[0][setting]["logs"], copied[0][setting]["logs"], strict=True):
        assert {"loss", "loss_full", "loss_ablated_1", "loss_ablated_2"} <= ours.keys()
        assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulated", ["", ", accumulated"], ids=["one batch", "accumulated"])
def test_the_full_loss_alone_trains_under_deepspeed_as_without_the_plugin(accumulated, sharded):
    for result in sharded:
        ours, plain = (result[name + accumulated]["weights"] for name in ("full alone", "without the plugin"))
        torch.testing.assert_close(ours, plain)
        assert not all(torch.equal(ours[name], weight) for name, weight in script.tiny_model().named_parameters())


def test_stage_3_holds_no_parameter_between_steps(stage, sharded):
    for result in sharded:
        assert (result["sequential"]["held"] == 0) == (stage == 3)


def test_variants_are_evaluated_where_parameters_are_not_sharded(stage, sharded, copied):
    for ours, expected in zip(sharded, copied, strict=True):
        if stage == 3:
            assert "--cmp_eval_ablations" in ours["evaluated"]
        else:
            assert "eval_loss_ablated_2" in ours["evaluated"]["metrics"]
            assert ours["evaluated"]["metrics"] == pytest.approx(expected["evaluated"]["metrics"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [("low memory", "leave it out"), ("reentrant checkpointing", "'{\"use_reentrant\": false}'")],
)
def test_what_needs_several_backwards_is_refused_under_deepspeed(setting, message, sharded):
    for result in sharded:
        assert message in result[setting]
        assert "DeepSpeed" in result[setting]

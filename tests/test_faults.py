"""What goes wrong on the way: runs that are killed, losses that are no numbers, errors inside of a forward."""

import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional as F

from cmp_trainer.reports.loss_log import LossLog
from tests.helpers import batch_of, cmp_trainer, tiny_bert, token_data
from tests.scripts import train_and_die

# Kills


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory):
    """Final weights of runs killed and resumed and of one that never stopped, by moment, and what was said."""
    root = tmp_path_factory.mktemp("killed")
    project = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project)}
    command = [sys.executable, train_and_die.__file__, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(root / "weights.pt"), done.stderr


@pytest.mark.xdist_group("killed runs")
@pytest.mark.parametrize("moment", train_and_die.MOMENTS)
def test_a_killed_run_resumes_to_the_weights_of_one_that_never_stopped(moment, killed_runs):
    weights, _ = killed_runs
    assert all(torch.equal(weights[moment][name], value) for name, value in weights["never"].items())


@pytest.mark.xdist_group("killed runs")
def test_the_checkpoint_whose_save_was_killed_is_skipped_by_name(killed_runs):
    _, said = killed_runs
    assert "in a save/checkpoint-8 is incomplete" in said
    assert said.count("is incomplete") == 1


# Losses that are no numbers


class Logarithm(nn.Module):
    """Of a dropout of ones: infinite where something is dropped, zero in the full model."""

    def forward(self, hidden):
        return hidden + F.dropout(torch.ones_like(hidden[:, :1]), 0.5, self.training).log()


@pytest.fixture
def infinite_ablations(tmp_path):
    """A trainer whose first ablation has infinite task losses for some examples, at a learning rate of 0."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.dropout = nn.Sequential(model.dropout, Logarithm())
    return cmp_trainer(tmp_path, model, cmp_num_ablations=1, learning_rate=0.0, max_steps=2)


def test_the_variant_with_losses_that_are_no_numbers_is_named_and_the_logs_stay_finite(infinite_ablations, caplog):
    infinite_ablations.train()
    assert "of ablated_1; first in ablated_1. They are left out of the means" in caplog.text
    log = infinite_ablations.state.log_history[0]
    assert all(math.isfinite(log[key]) for key in ("loss", "loss_full", "loss_ablated_1", "violation_rate"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_loss_that_is_no_number_is_left_out_of_the_mean_of_its_variant_alone(bad, caplog):
    log = LossLog(["full", "ablated_1"])
    log.add(torch.tensor([[[1.0, bad]], [[2.0, 3.0]]]), torch.ones(2, 1))
    means = log.pop()
    assert (means["loss_full"], means["loss_ablated_1"]) == (1.5, 3.0)
    assert "NaN or infinite since the last log: 1 of ablated_1; first in ablated_1." in caplog.text


def test_the_variants_it_began_with_are_told_from_those_that_followed(caplog):
    log = LossLog(["full", "ablated_1", "ablated_2"])
    log.add(torch.tensor([[[1.0, 1.0, 1.0]]]), torch.ones(1, 1))
    log.add(torch.tensor([[[1.0, 1.0, math.inf]]]), torch.ones(1, 1))
    log.add(torch.tensor([[[math.nan, math.nan, math.nan]]]), torch.ones(1, 1))
    log.pop()
    assert "1 of full, 1 of ablated_1, 2 of ablated_2; first in ablated_2." in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_an_example_with_a_loss_that_is_no_number_has_no_part_in_the_violation_rate(bad):
    log = LossLog(["full", "ablated_1"])
    log.add(torch.tensor([[[1.0, bad]], [[3.0, 2.0]]]), torch.ones(2, 1))
    assert log.pop()["violation_rate"] == 1.0


def test_a_variant_without_any_number_is_logged_as_nan_not_as_zero():
    log = LossLog(["full", "ablated_1"])
    log.add(torch.tensor([[[1.0, math.nan]]]), torch.ones(1, 1))
    means = log.pop()
    assert means["loss_full"] == 1.0
    assert math.isnan(means["loss_ablated_1"]) and math.isnan(means["violation_rate"])
    assert log.pop() == {}  # the next window begins anew


def test_examples_without_a_label_make_no_nan():
    log = LossLog(["full", "ablated_1"])
    log.add(torch.zeros(2, 1, 2), torch.zeros(2, 1))
    assert not any(math.isnan(value) for value in log.pop().values())


# Errors inside of a forward


def crops_data():
    """Rows of two segments that may be cut."""
    rows = token_data().to_list()
    return Dataset.from_list([{**row, "crop_segments": [0, 0, 1, 1, 2, 2, 0, 0]} for row in rows])


def randomness():
    return random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# Forwards of a step with a crop and a drop: the cropped variants share theirs when stacked; with low memory the others
# run in backward.
FORWARDS = {"sequential": 3, "stacked": 2, "low memory": 3}


@pytest.mark.parametrize("mode, forward", [(mode, forward) for mode, n in FORWARDS.items() for forward in range(n)])
def test_an_error_in_a_forward_leaves_model_modes_and_random_state(mode, forward, tmp_path):
    trainer, batch = trainer_with_crops(tmp_path, mode)
    trainer.compute_loss(trainer.model, dict(batch)).backward()  # the checks of the first step are behind us
    step = partial(trainer.compute_loss, trainer.model, dict(batch))
    assert forwards_until_an_error_that_leaves_no_trace(trainer.model, forward, step) == forward + 1


@pytest.mark.parametrize("forward", range(2))
def test_an_error_in_a_forward_of_the_backward_of_low_memory_leaves_no_trace(forward, tmp_path):
    trainer, batch = trainer_with_crops(tmp_path, "low memory")
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert forwards_until_an_error_that_leaves_no_trace(trainer.model, forward, loss.backward) == forward + 1


# The checks run the full model in several ways, then variants one by one and stacked.
@pytest.mark.parametrize("forward", range(7))
def test_an_error_in_a_forward_of_the_first_steps_checks_leaves_no_trace_either(forward, tmp_path):
    trainer, batch = trainer_with_crops(tmp_path, "stacked")
    step = partial(trainer.compute_loss, trainer.model, dict(batch))
    assert forwards_until_an_error_that_leaves_no_trace(trainer.model, forward, step) > forward


def trainer_with_crops(folder, mode):
    """A trainer with one crop and one drop, its model in train mode, and a batch with something to crop."""
    settings = {"cmp_low_memory": True} if mode == "low memory" else {"cmp_forward": mode}
    data = crops_data()
    trainer = cmp_trainer(folder, data=data, cmp_num_ablations=2, cmp_num_crops=1, **settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, batch_of(data)


def forwards_until_an_error_that_leaves_no_trace(model, forward, step):
    """The number of forwards of a step in which forward number `forward`, from 0 on, and later ones raise."""
    forwards = []

    def fail(module, inputs):
        forwards.append(module)
        if len(forwards) > forward:
            raise RuntimeError("in a forward")

    before = randomness(), {name: value.clone() for name, value in model.state_dict().items()}
    hook = model.classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a forward"):
        step()
    hook.remove()
    assert randomness() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled() and torch._dynamo.eval_frame._stance.stance == "default"
    return len(forwards)


def test_an_error_while_ablations_are_evaluated_leaves_modes_and_random_state(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, cmp_eval_ablations=True)
    model = trainer.model.eval()

    def fail(module, inputs):
        if model.bert.training:
            raise RuntimeError("in a forward")
        states.append(randomness())  # of the plain evaluation of this batch

    states = []
    model.classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a forward"):
        trainer.evaluate()
    assert randomness() == states[-1]
    assert not any(module.training for module in model.modules())

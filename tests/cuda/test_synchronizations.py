"""How often a step waits for the GPU: never in a sequential step, and rarely in others. What is counted is a step
after the checks of the first batch, of a model that never waits by itself."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from cmp_trainer import CmpCrop, CmpDrop, ComparativeStep
from tests.cuda.steps import DEVICE, EXECUTIONS, all_or_top_layers, batch, bert

# Upper bounds, of a forward and backward with two drops.
STACKED = 2  # the sign test, and whether part of the loss belongs to no example
LOW_MEMORY = 2
CROP = 1  # whether it loses a label, and its length

CHECKED_AFTER = 2  # steps


class WithoutMask(nn.Module):
    """A classifier that ignores the attention mask: to see whether it masks anything, transformers waits."""

    def __init__(self):
        super().__init__()
        self.model = bert(attn_implementation="eager")

    def forward(self, input_ids, labels, attention_mask=None):
        return self.model(input_ids=input_ids, labels=labels)


def batches():
    """Different batches, made before anything is counted."""
    return [batch(range(first, first + 4)) for first in range(0, 4 * (CHECKED_AFTER + 1), 4)]


@contextmanager
def synchronizations_are(mode):
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronizations_of(run):
    """Where `run()` waited for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with synchronizations_are("warn"):
            run()
    found = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
    return [f"{one.filename}:{one.lineno}" for one in found]


def after_the_checks(step):
    """A function that makes one more step, forward and backward."""
    *first, last = batches()
    for one in first:
        step(one).backward()
    torch.cuda.synchronize()
    return lambda: step(last).backward()


def test_a_number_that_is_read_is_counted():
    number = torch.ones((), device=DEVICE)
    assert len(synchronizations_of(lambda: float(number))) == 1
    with pytest.raises(RuntimeError, match="synchronizing"), synchronizations_are("error"):
        float(number)


def test_the_model_itself_never_waits():
    model = WithoutMask()
    run = after_the_checks(lambda inputs: model(**inputs).loss)
    assert synchronizations_of(run) == []


@all_or_top_layers
def test_a_sequential_step_never_waits(layers):
    step = ComparativeStep(WithoutMask(), [CmpDrop()] * 2, ablated_layers=layers, **EXECUTIONS["sequential"])
    run = after_the_checks(step)
    with synchronizations_are("error"):
        run()
    assert step.log()["loss_ablated_2"] > 0


@all_or_top_layers
@pytest.mark.parametrize(("execution", "bound"), [("stacked", STACKED), ("low memory", LOW_MEMORY)])
def test_a_step_of_another_execution_rarely_waits(execution, bound, layers):
    step = ComparativeStep(WithoutMask(), [CmpDrop()] * 2, ablated_layers=layers, **EXECUTIONS[execution])
    where = synchronizations_of(after_the_checks(step))
    assert len(where) <= bound, where


@all_or_top_layers
def test_a_crop_rarely_waits(layers):
    ablations = [CmpCrop(pad_values={"input_ids": 0}), CmpDrop(), CmpDrop()]
    step = ComparativeStep(WithoutMask(), ablations, ablated_layers=layers, **EXECUTIONS["sequential"])
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]] * 4, device=DEVICE)

    def with_segments(inputs):
        mask = torch.ones_like(inputs["attention_mask"])
        return step({**inputs, "attention_mask": mask, "crop_segments": segments})

    where = synchronizations_of(after_the_checks(with_segments))
    assert len(where) <= CROP, where

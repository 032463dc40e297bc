"""Losses that are not a sum over the examples are rejected on the first step, with the reason."""

import pytest
import torch
from torch.nn import functional as F

from cmp_trainer import ComparativeStep, plan
from cmp_trainer.losses.shares import CannotCompare
from tests.helpers import batch_of, tiny_bert, token_data


def logits_of(model, batch):
    return model(input_ids=batch["input_ids"]).logits


def root(model, batch):
    return F.cross_entropy(logits_of(model, batch), batch["labels"]).sqrt()


def logarithm(model, batch):
    return F.cross_entropy(logits_of(model, batch), batch["labels"]).log1p()


def between_neighbours(model, batch):
    logits, labels = logits_of(model, batch), batch["labels"].float()
    smooth = (logits[1:, 0] - logits[:-1, 0]) * (labels[1:] - labels[:-1])
    return F.cross_entropy(logits, batch["labels"]) + smooth.pow(2).mean()


def worst_example(model, batch):
    return F.cross_entropy(logits_of(model, batch), batch["labels"], reduction="none").max()


REJECTED = {
    root: "not a weighted sum of the examples' losses",
    logarithm: "not a weighted sum of the examples' losses",
    between_neighbours: "part of the loss depends on the model's outputs and the labels",
    worst_example: "no part of the loss belongs to single examples",
}


@pytest.mark.parametrize(("loss_fn", "reason"), REJECTED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_loss_that_is_no_sum_over_the_examples_is_rejected_with_the_reason(loss_fn, reason):
    model, batch = tiny_bert().train(), batch_of(token_data(), range(8))
    with pytest.raises(CannotCompare, match=reason):
        ComparativeStep(model, plan(2))(batch, loss_fn)


def test_a_root_of_each_examples_loss_is_compared():
    model, batch = tiny_bert().train(), batch_of(token_data(), range(8))

    def roots(model, batch):
        return F.cross_entropy(logits_of(model, batch), batch["labels"], reduction="none").sqrt().mean()

    step = ComparativeStep(model, plan(2))
    step(batch, roots).backward()
    with torch.no_grad():
        assert step.log()["loss_full"] == pytest.approx(roots(model.eval(), batch).item(), rel=1e-5)

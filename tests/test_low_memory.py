"""Low memory: the same loss and gradients, with the graph of one variant at a time."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cmp_trainer import CmpTrainer
from tests.helpers import batch_of, cmp_trainer, gradients, tiny_bert, token_data

OBJECTIVES = [
    {},
    {"cmp_baseline": "first"},
    {"cmp_ranking": "listwise", "cmp_temperature": 2.0},
    {"cmp_objective": "regularized", "cmp_primary": "mean"},
    {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0},
]


def step(tmp_path, model=None, around=nullcontext, **changes):
    """Loss, gradients, number of forwards with a graph and logged losses of one training step."""
    model = tiny_bert(hidden_dropout_prob=0.3) if model is None else model
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=3, cmp_forward="sequential", **changes)
    trainer.current_gradient_accumulation_steps = changes.get("gradient_accumulation_steps", 1)
    trainer.create_optimizer()
    trainer.training_step(model, batch_of(token_data(), range(8)))  # with the checks of a first step
    trainer.comparative_step().log()
    model.zero_grad()
    rows_with_graph = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            rows_with_graph.append(len(kwargs["input_ids"])) if torch.is_grad_enabled() else None
        ),
        with_kwargs=True,
    )
    torch.manual_seed(5)
    with around():
        loss = trainer.training_step(model, batch_of(token_data(), range(8)))
    return loss, gradients(model), rows_with_graph, trainer.comparative_step().log()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_gradients_and_logs_are_those_of_the_plain_step(objective, accumulation, tmp_path):
    changes = {**objective, "gradient_accumulation_steps": accumulation}
    plain_loss, plain_gradients, _, plain_log = step(tmp_path, **changes)
    loss, found, _, log = step(tmp_path, cmp_low_memory=True, **changes)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(found, plain_gradients, rtol=1e-4, atol=1e-7)
    assert log == pytest.approx(plain_log)


@pytest.mark.parametrize(("processes", "runs"), [(1, 2), (2, 4)])
def test_variants_without_weight_are_not_run_again(processes, runs, tmp_path, monkeypatch):
    """In several processes they are: under FSDP a forward exchanges weights, and others would wait for it."""
    monkeypatch.setattr("cmp_trainer.step.num_processes", lambda: processes)
    _, _, rows, _ = step(
        tmp_path, cmp_low_memory=True, cmp_objective="regularized", cmp_primary="full", cmp_weight=0.0
    )
    assert rows == [8] * runs


def with_batch_norm(model):
    model.classifier = nn.Sequential(nn.BatchNorm1d(16), model.classifier)
    return {}


def with_losses_of_a_batch(model):
    def function(outputs, inputs):
        own = F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")
        return own + outputs.logits.mean(0).square().sum()

    return {"per_example_loss_func": function}


@pytest.mark.parametrize("change", [with_batch_norm, with_losses_of_a_batch])
def test_gradients_are_exact_also_where_examples_see_each_other(change, tmp_path):
    found = []
    for low_memory in (False, True):
        model = tiny_bert(hidden_dropout_prob=0.3)
        settings = {"cmp_low_memory": low_memory, "cmp_baseline": "first", **change(model)}
        _, ours, _, log = step(tmp_path, model, **settings)
        assert 0 < log["violation_rate"] < 1  # some full models are already best, and get no push of their own
        found.append(ours)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_users_loss_in_which_examples_see_each_other_is_planned_once(tmp_path, caplog):
    model, forwards = tiny_bert(hidden_dropout_prob=0.3), []
    model.register_forward_pre_hook(lambda *_: forwards.append(None))
    trainer = cmp_trainer(
        tmp_path, model, cmp_num_ablations=2, cmp_forward="sequential", **with_losses_of_a_batch(model)
    )
    batch = batch_of(token_data())
    for _ in range(3):
        forwards.clear()
        trainer.compute_loss(model.train(), dict(batch))
    assert len(forwards) == 3
    assert caplog.text.count("an example's loss also depends on other rows of the batch") == 1


def test_every_step_drops_what_the_plain_step_drops(tmp_path):
    """Not the same in all steps: the random state goes on as in the plain step."""
    models, states = [], []
    for low_memory in (False, True):
        trainer = cmp_trainer(
            tmp_path, cmp_num_ablations=2, cmp_forward="sequential", cmp_low_memory=low_memory, optim="sgd"
        )
        trainer.train()
        models.append(dict(trainer.model.named_parameters()))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.testing.assert_close(models[1], models[0], rtol=1e-4, atol=1e-6)


class Halved(CmpTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) / 2


class CountLost(CmpTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("kind", [Halved, CountLost])
def test_a_loss_that_is_scaled_afterwards_is_scaled_in_every_variant(kind, tmp_path):
    settings = {"cmp_num_ablations": 2, "cmp_low_memory": True, "gradient_accumulation_steps": 2, "optim": "sgd"}
    trainer = cmp_trainer(tmp_path, kind=kind, **settings)
    trainer.train()
    plain = cmp_trainer(tmp_path, kind=kind, **{**settings, "cmp_low_memory": False, "cmp_forward": "sequential"})
    plain.train()
    torch.testing.assert_close(
        dict(trainer.model.named_parameters()), dict(plain.model.named_parameters()), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_every_backward_are_refused(optimizer, tmp_path):
    with pytest.raises(ValueError, match=f"--cmp_low_memory makes several backwards a step, and --optim {optimizer}"):
        cmp_trainer(tmp_path, cmp_num_ablations=1, cmp_low_memory=True, optim=optimizer)


def test_no_more_than_one_graph_is_alive(tmp_path):
    """What autograd saves for backward, at its highest: one variant's, not 1 + c times that."""

    def peak(**changes):
        held = {"now": 0, "peak": 0}

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                held["now"] += self.size
                held["peak"] = max(held["peak"], held["now"])

            def __del__(self):
                held["now"] -= self.size

        step(tmp_path, around=lambda: torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor), **changes)
        return held["peak"]

    plain = peak(cmp_objective="regularized", cmp_primary="mean") / 4  # 1 + c variants
    assert peak(cmp_objective="regularized", cmp_primary="mean", cmp_low_memory=True) < 1.1 * plain


def test_a_loss_of_the_users_works_too(tmp_path):
    def function(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    plain = step(tmp_path, per_example_loss_func=function)
    low = step(tmp_path, per_example_loss_func=function, cmp_low_memory=True)
    torch.testing.assert_close(low[1], plain[1], rtol=1e-4, atol=1e-7)


def test_low_memory_and_stacking_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--cmp_forward stacked holds all variants at once"):
        cmp_trainer(tmp_path, cmp_num_ablations=1, cmp_low_memory=True, cmp_forward="stacked")

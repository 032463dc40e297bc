"""CmpTrainer: the promises of a training step, on a tiny BERT classifier."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from cmp_trainer import CmpTrainer
from cmp_trainer.losses.comparative import comparative_loss, regularized_loss
from tests.helpers import batch_of, cmp_trainer, gradients, same_weights, tiny_bert, token_data, training_arguments


def step_loss(trainer, batch, **arguments):
    """One loss of the trainer's own step, with a gradient."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), **arguments)
    trainer.model.zero_grad()
    loss.backward()
    return loss


def variant_losses(trainer, batch):
    """The examples' losses of every variant, (batch, parts, 1 + c), from the random state of seed 0."""
    torch.manual_seed(0)
    return trainer.comparative_step().losses(batch).values


# Promise 1: without ablations nothing is different.


@pytest.mark.parametrize("args_kind", [TrainingArguments, None], ids=["plain arguments", "cmp arguments"])
def test_without_ablations_losses_logs_and_weights_are_those_of_trainer(args_kind, tmp_path):
    cmp_args = training_arguments(tmp_path) if args_kind is None else training_arguments(tmp_path, args_kind)
    runs = []
    for kind, args in ((CmpTrainer, cmp_args), (Trainer, training_arguments(tmp_path, TrainingArguments))):
        runs.append(cmp_trainer(tmp_path, kind=kind, args=args))  # a trainer sets the seed when it is made
        runs[-1].train()
        runs[-1].evaluate()
    ours, plain = runs
    assert same_weights(ours.model, plain.model)
    timing = ("runtime", "per_second")
    for our_log, plain_log in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert our_log.keys() == plain_log.keys()
        assert all(our_log[key] == plain_log[key] for key in our_log if not key.endswith(timing))


def test_that_comparative_loss_is_off_is_said(tmp_path, caplog):
    cmp_trainer(tmp_path, max_steps=1).train()
    assert "comparative loss is off (--cmp_num_ablations 0)" in caplog.text


# Promise 4: the published scheme computes the same.


def published_step(model, batch, num_ablations):
    """The published scheme: walk the dropout modules, set their rates, restore the random state, loop."""
    dropouts = [(module, "p", module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    # transformers 4 keeps the rate of SDPA attention beside the module, where the published walk missed it.
    dropouts += [(module, "dropout_prob", 0.1) for module in model.modules() if hasattr(module, "dropout_prob")]
    state, losses = torch.get_rng_state(), []
    for drops in range(num_ablations + 1):
        torch.set_rng_state(state)
        for module, name, p in dropouts:
            setattr(module, name, 1 - (1 - p) ** drops)
        losses.append(F.cross_entropy(model(**batch).logits, batch["labels"], reduction="none"))
    for module, name, p in dropouts:
        setattr(module, name, p)
    return comparative_loss(torch.stack(losses, 1)).mean()


@pytest.mark.parametrize("forward", ["sequential", "stacked"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("num_ablations", [1, 2, 4])
def test_loss_and_gradients_equal_the_published_scheme(num_ablations, attention, forward, tmp_path):
    model = tiny_bert(attn_implementation=attention)
    batch = batch_of(token_data())
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=num_ablations, cmp_forward=forward)
    torch.manual_seed(5)
    ours = step_loss(trainer, batch)
    our_gradients = gradients(model)
    torch.manual_seed(5)
    model.zero_grad()
    published = published_step(model, batch, num_ablations)
    published.backward()
    torch.testing.assert_close(ours, published, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_gradients, gradients(model), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cmp_baseline": "first", "cmp_temperature": 2.0},
        {"cmp_ranking": "listwise"},
        {"cmp_objective": "regularized", "cmp_primary": "mean", "cmp_weight": 0.5},
        {"cmp_objective": "regularized", "cmp_loss_threshold": 0.1},
    ],
    ids=str,
)
def test_every_objective_reaches_the_loss(arguments, tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, **arguments)
    batch = batch_of(token_data())
    trainer.model.train()
    torch.manual_seed(0)
    found = trainer.compute_loss(trainer.model, dict(batch))
    losses = variant_losses(trainer, batch)
    expected_arguments = {name.removeprefix("cmp_"): value for name, value in arguments.items()}
    expected_arguments["threshold"] = expected_arguments.pop("loss_threshold", None)
    if expected_arguments.pop("objective", None) is None:
        del expected_arguments["threshold"]
        expected = comparative_loss(losses, **expected_arguments)
    else:
        expected = regularized_loss(losses, **expected_arguments)
    torch.testing.assert_close(found, expected.mean())


# Promise 5: a step leaves no trace.


def test_a_step_changes_no_attribute_hook_or_flag_of_the_model(tmp_path):
    def fingerprint(model):
        return [
            (
                name,
                module.training,
                {key: repr(value) for key, value in vars(module).items() if not key.startswith("_p")},
            )
            for name, module in model.named_modules()
        ]

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    trainer.model.config.problem_type = "single_label_classification"  # the model's own forward would note it
    trainer.model.train()
    before = fingerprint(trainer.model)
    step_loss(trainer, batch_of(token_data()))
    trainer.model.zero_grad()
    assert fingerprint(trainer.model) == before


def test_random_state_after_a_step_is_where_one_forward_leaves_it(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=3)
    batch = batch_of(token_data())
    torch.manual_seed(5)
    step_loss(trainer, batch)
    after_step = torch.rand(1)
    torch.manual_seed(5)
    trainer.model(**batch)
    assert torch.equal(after_step, torch.rand(1))


def test_an_error_in_a_forward_leaves_random_state_and_modes_as_they_were(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, cmp_forward="sequential")
    batch = batch_of(token_data())
    step_loss(trainer, batch)  # the first step's checks are behind us
    calls = []

    def fail(module, args):
        calls.append(module)
        torch.rand(1), np.random.rand(), random.random()
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = trainer.model.classifier.register_forward_pre_hook(fail)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(RuntimeError, match="out of memory"):
        step_loss(trainer, batch)
    hook.remove()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert (F.dropout(torch.ones(99), 0.5) == 0).any()  # no CmpDrop is left on


# Promise 7: examples do not leak into each other.


def test_an_example_without_label_counts_nothing_and_makes_no_nan(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.3)
    batch = batch_of(token_data(), range(4))
    unlabelled = {**batch, "labels": torch.where(torch.arange(4) < 3, batch["labels"], -100)}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2)
    model.train()
    losses = variant_losses(trainer, batch)
    torch.manual_seed(0)
    loss = step_loss(trainer, unlabelled)
    torch.testing.assert_close(loss, comparative_loss(losses)[:3].mean())


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=str)
def test_a_batch_without_any_label_is_zero_with_zero_gradients(num_items, tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    batch = {**batch_of(token_data()), "labels": torch.full((4,), -100)}
    assert step_loss(trainer, batch, num_items_in_batch=num_items) == 0
    assert all((gradient == 0).all() for gradient in gradients(trainer.model).values())


def test_comparison_is_per_example(tmp_path):
    objective = cmp_trainer(tmp_path, cmp_num_ablations=2).comparative_step().objective
    losses = torch.rand(4, 1, 3, requires_grad=True)
    objective(losses)[0].sum().backward()
    assert (losses.grad[1:] == 0).all()
    assert (losses.grad[0] != 0).any()


# Promise 8 and the logs.


def test_eval_loss_is_that_of_trainer_and_ablations_are_reported_beside_it(tmp_path):
    model = tiny_bert()
    ours = cmp_trainer(tmp_path, model, cmp_num_ablations=2, cmp_eval_ablations=True)
    plain = cmp_trainer(tmp_path, model, kind=Trainer, args=training_arguments(tmp_path, TrainingArguments))
    torch.manual_seed(5)
    plain_metrics, random_state = plain.evaluate(), torch.get_rng_state()
    torch.manual_seed(5)
    metrics = ours.evaluate()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert metrics["eval_loss"] == plain_metrics["eval_loss"]
    assert metrics["eval_loss_full"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert {"eval_loss_ablated_1", "eval_loss_ablated_2", "eval_violation_rate"} < metrics.keys()
    again = ours.evaluate()
    assert again["eval_loss_ablated_2"] == metrics["eval_loss_ablated_2"]


def test_evaluating_ablations_leaves_buffers_alone(tmp_path):
    model = tiny_bert()
    spectral_norm(model.classifier)  # whose estimate goes on with every forward in train mode
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cmp_trainer(tmp_path, model, cmp_num_ablations=2, cmp_eval_ablations=True).evaluate()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_logs_hold_the_mean_of_every_variant_since_the_last_log(tmp_path):
    seen = []

    def objective(losses):
        seen.append(losses.detach())
        return comparative_loss(losses)

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, max_steps=4, logging_steps=1, objective=objective)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log, losses in zip(logs, seen, strict=True):
        means = losses.mean((0, 1)).tolist()
        assert [log["loss_full"], log["loss_ablated_1"], log["loss_ablated_2"]] == pytest.approx(means)
        assert 0 <= log["violation_rate"] <= 1
        assert math.isfinite(log["grad_norm"])


def test_a_log_holds_nothing_of_an_earlier_training(tmp_path):
    seen = []

    def objective(losses):
        seen.append(losses.detach())
        return comparative_loss(losses)

    settings = {"cmp_num_ablations": 1, "max_steps": 1, "logging_steps": 10, "objective": objective}
    trainer = cmp_trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.comparative_step().losses_log  # of a step that was never logged
    trainer.args.logging_steps = 1
    seen.clear()
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["loss_full"] == pytest.approx(seen[0][..., 0].mean().item())


def test_metrics_hold_nothing_of_an_evaluation_that_raised(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, cmp_eval_ablations=True)
    forwards = []

    def fail(module, args):
        forwards.append(module)
        if len(forwards) == 5:
            raise RuntimeError("in an evaluation")

    hook = trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in an evaluation"):
        trainer.evaluate()
    hook.remove()
    metrics = trainer.evaluate()
    assert metrics["eval_loss_full"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_examples_without_labels_are_predicted_with_a_loss_of_the_users_too(tmp_path):
    settings = {"cmp_num_ablations": 1, "cmp_eval_ablations": True, "per_example_loss_func": doubled_cross_entropy}
    trainer = cmp_trainer(tmp_path, **settings)
    output = trainer.predict(token_data().remove_columns("labels"))
    assert len(output.predictions) == 32
    assert "test_loss_full" not in output.metrics
    assert "test_loss_full" in trainer.predict(token_data()).metrics


def test_full_variant_is_the_eval_model(tmp_path):
    trainer = cmp_trainer(tmp_path, tiny_bert(hidden_dropout_prob=0.5), cmp_num_ablations=1)
    batch = batch_of(token_data())
    _, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    torch.testing.assert_close(outputs.logits, trainer.model.eval()(**batch).logits)


# Ways of a run.


@pytest.mark.parametrize("problem", ["single label", "regression"])
def test_gradient_accumulation_gives_the_gradient_of_the_large_batch(problem, tmp_path):
    batch = batch_of(token_data(), range(8))
    changes = {"num_labels": 1} if problem == "regression" else {}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks differ between the two
    if problem == "regression":
        batch["labels"] = batch["labels"].float()
    found = []
    for accumulation in (1, 4):
        model = tiny_bert(**changes, **no_dropout)
        trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2, gradient_accumulation_steps=accumulation)
        trainer.comparative_step()._checked = True  # nothing is dropped here on purpose
        trainer.current_gradient_accumulation_steps = accumulation
        trainer.create_optimizer()
        for part in torch.arange(8).chunk(accumulation):
            micro_batch = {name: column[part] for name, column in batch.items()}
            trainer.training_step(model, micro_batch, None)  # a count of items is ignored by these models
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_resuming_in_the_middle_of_an_epoch_gives_the_weights_of_the_uninterrupted_run(tmp_path):
    arguments = {"cmp_num_ablations": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 10}
    whole = cmp_trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = cmp_trainer(tmp_path / "resumed", tiny_bert(seed=7), **arguments)  # other weights, to be replaced
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == 10
    assert same_weights(whole.model, resumed.model)


def test_a_saved_model_is_an_ordinary_one(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(trainer.model)
    assert same_weights(loaded, trainer.model)


# The user's own loss.


def doubled_cross_entropy(outputs, inputs):
    return 2 * F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_users_loss_is_trained_and_evaluated(accumulation, tmp_path):
    changes = {"cmp_num_ablations": 2, "gradient_accumulation_steps": accumulation, "logging_steps": 1}
    logs = []
    for function in (doubled_cross_entropy, None):
        trainer = cmp_trainer(tmp_path, per_example_loss_func=function, **changes)
        eval_loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        logs.append({**trainer.state.log_history[0], "eval_loss": eval_loss})
    for name in ("loss_full", "loss_ablated_2", "eval_loss"):
        assert logs[0][name] == pytest.approx(2 * logs[1][name], rel=1e-5)
    # The Trainer counts items, which this model ignores: it does not divide its loss by the accumulation steps.
    times = accumulation if trainer.model_accepts_loss_kwargs else 1
    assert logs[0]["loss"] * times == pytest.approx(2 * logs[1]["loss"], abs=2e-4)  # logs have four decimals


def test_without_ablations_the_users_loss_is_the_plain_loss(tmp_path):
    trainer = cmp_trainer(tmp_path, per_example_loss_func=doubled_cross_entropy)
    batch = batch_of(token_data())
    loss, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    torch.testing.assert_close(loss, 2 * F.cross_entropy(outputs.logits, batch["labels"]))


def test_losses_in_parts_are_compared_separately_and_averaged(tmp_path):
    def parts(outputs, inputs):
        return torch.stack([doubled_cross_entropy(outputs, inputs), outputs.logits.square().mean(1)], 1)

    seen = []

    def objective(losses):
        seen.append(losses.detach())
        return comparative_loss(losses)

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, per_example_loss_func=parts, objective=objective)
    loss = step_loss(trainer, batch_of(token_data()))
    assert seen[-1].shape == (4, 2, 3)
    expected = torch.stack([comparative_loss(seen[-1][:, part]) for part in (0, 1)], 1).mean()
    torch.testing.assert_close(loss, expected)


def test_cmp_trainer_is_a_trainer():
    assert issubclass(CmpTrainer, Trainer)


def test_the_step_is_that_of_the_model_that_is_trained_now(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1)
    first = trainer.comparative_step()
    assert trainer.comparative_step() is first
    trainer.model = tiny_bert()  # as a hyperparameter search does
    assert trainer.comparative_step() is not first
    assert trainer.comparative_step().model is trainer.model

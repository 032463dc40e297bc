"""Evaluation: names, losses and objectives are the Trainer's, whatever evaluates, and nothing else changes."""

import pytest
import torch
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback

from cmp_trainer import CmpSeq2SeqTrainer, CmpSeq2SeqTrainingArguments, CmpTrainer
from cmp_trainer.execution.modes import train_mode_except_batch_norm, unchanged_buffers
from cmp_trainer.reports.ablated_evaluation import without_variants
from tests.helpers import cmp_trainer, operations_counted, tiny_bert, token_data, training_arguments, waits

ABLATED = {"cmp_num_ablations": 2, "cmp_eval_ablations": True}
VARIANTS = {"loss_full", "loss_ablated_1", "loss_ablated_2", "violation_rate"}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def with_prefix(prefix):
    return {f"{prefix}_{name}" for name in VARIANTS}


# --- names ---


def test_a_prefix_given_by_position_is_that_of_the_variants_too(tmp_path):
    metrics = cmp_trainer(tmp_path, **ABLATED).evaluate(token_data(), None, "held_out")
    assert with_prefix("held_out") < metrics.keys()
    assert not any(name.startswith("eval_") for name in metrics)


def test_an_evaluation_loop_called_with_positions_uses_its_prefix(tmp_path):
    trainer = cmp_trainer(tmp_path, **ABLATED)
    metrics = trainer.evaluation_loop(trainer.get_eval_dataloader(), "Test", None, None, "test").metrics
    assert with_prefix("test") < metrics.keys()
    assert not any(name.startswith("eval_") for name in metrics)


def test_predict_reports_the_variants_of_the_test_set(tmp_path):
    metrics = cmp_trainer(tmp_path, **ABLATED).predict(token_data(), None, "test").metrics
    assert with_prefix("test") < metrics.keys()
    assert not any(name.startswith("eval_") for name in metrics)


def test_each_of_several_data_sets_has_variants_of_its_own(tmp_path):
    trainer = cmp_trainer(tmp_path, **ABLATED)
    metrics = trainer.evaluate({"short": token_data(rows=4), "long": token_data(rows=12)})
    assert with_prefix("eval_short") | with_prefix("eval_long") < metrics.keys()
    assert metrics["eval_short_loss_full"] != metrics["eval_long_loss_full"]


def test_an_evaluation_in_training_has_the_variants_in_its_logs(tmp_path):
    trainer = cmp_trainer(tmp_path, **ABLATED, eval_strategy="steps", eval_steps=3)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 2
    assert all(with_prefix("eval") < log.keys() for log in evaluations)


# --- what a search optimizes ---


@pytest.mark.parametrize(("metrics", "objective"), [(None, "eval_loss"), (accuracy, "eval_accuracy")])
def test_a_search_optimizes_what_it_would_without_the_variants(metrics, objective, tmp_path):
    trainer = cmp_trainer(
        tmp_path,
        model_init=lambda: tiny_bert(),
        compute_metrics=metrics,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        **ABLATED,
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        n_trials=1,
        backend="optuna",
        direction="minimize",
    )
    (log,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert with_prefix("eval") < log.keys()
    assert best.objective == log[objective]


def test_a_search_with_an_objective_of_ones_own_sees_the_variants(tmp_path):
    trainer = cmp_trainer(
        tmp_path, model_init=lambda: tiny_bert(), max_steps=1, eval_strategy="steps", eval_steps=1, **ABLATED
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        lambda metrics: metrics["eval_loss_ablated_2"],
        n_trials=1,
        backend="optuna",
        direction="minimize",
    )
    (log,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert best.objective == log["eval_loss_ablated_2"]


def test_only_what_the_variants_added_is_left_out():
    users = {"eval_loss": 1.0, "eval_f1": 0.5, "eval_full": 0.1, "eval_a_loss": 2.0}
    added = {"eval_loss_full": 1.0, "eval_loss_ablated_1": 1.0, "eval_violation_rate": 0.1, "eval_a_loss_full": 2.0}
    assert without_variants({**users, **added}, ["full", "ablated_1"]) == users


# --- what the loss of an evaluation is ---


class TrainModeInEvaluation(TrainerCallback):
    """Monte Carlo dropout: switches the model to train mode at the beginning of an evaluation."""

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        model.train()


class TrainsInPredictionStep(Trainer):
    def prediction_step(self, model, inputs, *args, **kwargs):
        model.train()
        return super().prediction_step(model, inputs, *args, **kwargs)


class CmpTrainsInPredictionStep(TrainsInPredictionStep, CmpTrainer):
    pass


@pytest.mark.parametrize(
    ("plain", "ours", "callbacks"),
    [
        (Trainer, CmpTrainer, [TrainModeInEvaluation()]),
        (TrainsInPredictionStep, CmpTrainsInPredictionStep, []),
    ],
    ids=["callback", "subclass"],
)
@pytest.mark.parametrize("eval_ablations", [False, True])
def test_an_evaluation_in_train_mode_reports_the_task_loss(plain, ours, callbacks, eval_ablations, tmp_path):
    found = []
    for kind, settings in (
        (plain, {}),
        (ours, {"cmp_num_ablations": 2, "cmp_objective": "regularized", "cmp_eval_ablations": eval_ablations}),
    ):
        trainer = cmp_trainer(tmp_path, tiny_bert(), kind=kind, callbacks=callbacks, **settings)
        torch.manual_seed(3)
        found.append(trainer.evaluate()["eval_loss"])
        assert trainer.model.training
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [CmpTrainer, CmpTrainsInPredictionStep])
def test_the_users_loss_is_not_divided_in_an_evaluation_during_training(kind, tmp_path):
    """Gradient accumulation scales the losses of training steps, whatever mode an evaluation runs in."""

    def loss(outputs, inputs):
        return F.cross_entropy(outputs.logits, inputs["labels"], reduction="none")

    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = cmp_trainer(
        tmp_path,
        model,
        kind=kind,
        per_example_loss_func=loss,
        learning_rate=0.0,
        gradient_accumulation_steps=4,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        cmp_num_ablations=1,
        cmp_dropout=0.1,
    )
    trainer.train()
    (evaluated,) = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    plain = cmp_trainer(tmp_path, model, kind=Trainer)
    assert evaluated == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


# --- text that is generated ---


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.1))


def texts():
    data = token_data(rows=8).remove_columns("labels")
    return data.add_column("labels", [row[:5] for row in data["input_ids"]])


def twice(outputs, inputs):
    """Twice the mean loss of an example's tokens."""
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), inputs["labels"], reduction="none")
    return 2 * losses.mean(1)


def generating_trainer(folder, **changes):
    of_trainer = {name: changes.pop(name) for name in ("compute_metrics",) if name in changes}
    loss = changes.pop("per_example_loss_func", None)
    settings = {"predict_with_generate": True, "generation_max_length": 6, "cmp_num_ablations": 1}
    args = training_arguments(folder, CmpSeq2SeqTrainingArguments, **settings, **changes)
    return CmpSeq2SeqTrainer(tiny_t5(), args, eval_dataset=texts(), per_example_loss_func=loss, **of_trainer)


@pytest.mark.parametrize("eval_ablations", [False, True])
def test_an_evaluation_that_generates_reports_the_users_loss(eval_ablations, tmp_path):
    doubled = generating_trainer(tmp_path, per_example_loss_func=twice, cmp_eval_ablations=eval_ablations)
    metrics = doubled.evaluate()
    plain = generating_trainer(tmp_path).evaluate()
    assert metrics["eval_loss"] == pytest.approx(2 * plain["eval_loss"], rel=1e-6)
    if eval_ablations:
        assert metrics["eval_loss_full"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def length(prediction):
    return {"length": float((prediction.predictions != 0).sum()), "first": float(prediction.predictions[:, 1].mean())}


@pytest.mark.parametrize("loss", [None, twice])
def test_a_curve_of_generated_text_has_its_metrics(loss, tmp_path):
    trainer = generating_trainer(tmp_path, compute_metrics=length, per_example_loss_func=loss)
    evaluated = trainer.evaluate()
    curve = trainer.evaluate_ablations(drops=2, seeds=[0])
    full = curve.iloc[0]
    assert (full["loss"], full["length"], full["first"]) == (
        evaluated["eval_loss"],
        evaluated["eval_length"],
        evaluated["eval_first"],
    )
    assert curve["loss"].nunique() == 3


# --- traces ---


class Counting(torch.nn.Module):
    """Counts its forwards in train mode in a buffer, as moving averages do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.norm, self.dropout = torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3)
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        if self.training:
            self.calls += 1
        logits = self.linear(self.dropout(self.norm(input_ids.float())))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_ablations_in_evaluation_leave_randomness_buffers_and_modes_as_the_trainer_leaves_them(tmp_path):
    torch.manual_seed(0)
    model = Counting().eval()
    states, random_states = [], []
    for kind, settings in ((Trainer, {}), (CmpTrainer, ABLATED)):
        trainer = cmp_trainer(tmp_path, model, kind=kind, **settings)
        torch.manual_seed(7)
        trainer.evaluate()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        random_states.append(torch.get_rng_state())
        assert not any(module.training for module in model.modules())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*random_states)


class OfManyBuffers(torch.nn.Module):
    """Buffers of two dtypes, and in train mode writes to some of them in each way that there is."""

    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(8) for _ in range(100))
        self.linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8))
        for name in ("added", "data", "replaced", "grown", "nan"):
            self.register_buffer(name, torch.full((2,), float("nan") if name == "nan" else 1.0))
        self.register_buffer("large", torch.zeros(400, 400))
        self.register_buffer("none", None)

    def forward(self, inputs):
        for norm in self.norms:
            inputs = norm(inputs)
        if self.training:
            self.added += 1
            self.data.data.mul_(2)
            self.replaced = self.replaced + 1
            self.grown = torch.zeros(3)
            self.nan.zero_()
            self.large[1, 1] = 1
        return self.linear(inputs)


def test_buffers_are_what_they_were_whatever_wrote_to_them():
    model = OfManyBuffers().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with unchanged_buffers(model):
        model(torch.rand(4, 8))
        changed = [name for name, one in model.named_buffers() if not torch.equal(one, before[name])]
    assert len(changed) == 300 + 2 + 6
    assert len(before.pop("grown")) == 2 and len(model.grown) == 3
    for name, value in before.items():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=0, atol=0, equal_nan=True)


def test_many_buffers_are_kept_by_a_few_operations():
    """Each batch of an evaluation under ablation keeps the buffers; a copy and a wait for each were too many."""
    model = OfManyBuffers().eval()
    model.nan.zero_()
    with operations_counted() as found, train_mode_except_batch_norm(model):
        assert len(list(model.buffers())) > 300
    kinds = 3  # float32, int64, the large one
    assert 0 < found["clone"] + found["cat"] <= 2 * kinds
    assert sum(waits(found).values()) <= kinds


def test_buffers_that_did_not_change_are_not_written():
    model = OfManyBuffers().train()
    with unchanged_buffers(model):
        versions = {name: buffer._version for name, buffer in model.named_buffers()}
        model.added += 1
    wrote = [name for name, buffer in model.named_buffers() if buffer._version != versions[name]]
    assert wrote == ["added", "nan"]  # a NaN is never equal


def test_evaluating_ablations_changes_nothing_in_the_training_around_it(tmp_path):
    """A callback measures a curve after the second step; the weights in the end are those without it."""

    class Measures(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2 and self.trainer is not None:
                self.trainer.evaluate_ablations(drops=1, seeds=[0])

    ends = []
    for measures in (False, True):
        callback = Measures()
        torch.manual_seed(0)
        trainer = cmp_trainer(tmp_path, tiny_bert(), cmp_num_ablations=2, callbacks=[callback], max_steps=4)
        callback.trainer = trainer if measures else None
        trainer.train()
        ends.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        logs = [log for log in trainer.state.log_history if "loss" in log]
        ends[-1] |= {str(log["step"]): torch.tensor([log["loss"], log["loss_ablated_2"]]) for log in logs}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

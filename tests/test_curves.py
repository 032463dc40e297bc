"""Ablation curves: what is measured equals what it says, and measuring leaves no trace."""

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainerCallback, TrainingArguments

from cmp_trainer import CmpDrop, CmpTrainer
from cmp_trainer.ablations import Ablation
from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.reports.curves import as_text, examples_in_violation, measures, plot_curves, summarize
from tests.helpers import (
    SMALL,
    batch_of,
    cmp_trainer,
    letter_tokenizer,
    same_weights,
    tiny_bert,
    token_data,
    training_arguments,
)

loss_tables = arrays("float64", array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6), elements=st.floats(0, 9))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.fixture
def trainer(tmp_path):
    return cmp_trainer(
        tmp_path / "comparative", cmp_num_ablations=2, compute_metrics=accuracy, per_device_eval_batch_size=16
    )


@given(losses=loss_tables)
def test_an_example_in_violation_has_a_higher_loss_at_some_lower_level(losses):
    for level, share in enumerate(examples_in_violation(losses)):
        wrong = [any(row[j] > row[level] + 1e-6 for j in range(level)) for row in losses]
        assert share == pytest.approx(np.mean(wrong))


@given(losses=loss_tables)
def test_losses_in_order_violate_nothing(losses):
    assert not examples_in_violation(np.sort(losses, axis=1)).any()


class ScheduleFree(torch.optim.SGD):
    """Trains other weights than it evaluates, as schedule-free optimizers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.is_training = True

    def train(self):
        self._move(not self.is_training, +0.1)

    def eval(self):
        self._move(self.is_training, -0.1)

    @torch.no_grad()
    def _move(self, moves, by):
        if moves:
            self.is_training = by > 0
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += by


class Logits(Trainer):
    """A prediction step that calls the model by itself."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            outputs = model(**inputs)
        return 2 * outputs.loss, 3 * outputs.logits, inputs["labels"]


def constant_accuracy(predictions):
    return {"accuracy": 0.5}


class CmpLogits(Logits, CmpTrainer):
    pass


class Evaluates(CmpTrainer):
    """An evaluation with a metric of its own, as the trainer of Hugging Face's question answering scripts has."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        return {**metrics, f"{metric_key_prefix}_exact_match": 100 * metrics[f"{metric_key_prefix}_accuracy"]}


def assert_level_0_is_evaluate(trainer, **settings):
    """Every measure that evaluate reports stands in the curve, to the bit."""
    evaluated = trainer.evaluate()
    curve = trainer.evaluate_ablations(seeds=[0, 1], **settings)
    full = curve.query("level == 0")
    found = [name for name in measures(curve) if name != "examples_in_violation"]
    assert {"loss", "accuracy"} <= set(found)
    for name in found:
        assert full[name].tolist() == [evaluated[f"eval_{name}"]] * len(full)
    assert not full["examples_in_violation"].any()
    assert curve.query("level == 1")["loss"].nunique() == 2
    return curve


def test_level_0_is_what_evaluate_reports(trainer):
    assert_level_0_is_evaluate(trainer)


@pytest.mark.parametrize("rows", [10, 32])
@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"bf16_full_eval": True},
        {"label_smoothing_factor": 0.1},
        {"cmp_eval_ablations": True},
        {"eval_do_concat_batches": False, "compute_metrics": constant_accuracy},
        pytest.param({"kind": CmpLogits}, id="own prediction_step"),
        pytest.param({"kind": Evaluates}, id="own evaluate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_level_0_is_what_evaluate_reports_however_it_evaluates(settings, rows, tmp_path):
    data = token_data(rows=rows)
    settings = {"cmp_num_ablations": 1, "compute_metrics": accuracy, **settings}
    assert_level_0_is_evaluate(cmp_trainer(tmp_path, data=data, **settings), drops=1)


def test_a_curve_has_the_weights_that_a_schedule_free_optimizer_evaluates_with(tmp_path):
    data, model = token_data(), tiny_bert()
    args = training_arguments(tmp_path, cmp_num_ablations=1, max_steps=2)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    trainer = CmpTrainer(
        model, args, train_dataset=data, eval_dataset=data, compute_metrics=accuracy, optimizers=(optimizer, None)
    )
    trainer.train()
    trainer.optimizer.train()
    curve = trainer.evaluate_ablations(drops=1, seeds=[0])
    trainer.optimizer.train()
    in_train_mode = trainer.model.eval()(**batch_of(data, range(32))).loss.item()
    full = curve["loss"][0]
    assert full == trainer.evaluate()["eval_loss"]
    assert full != pytest.approx(in_train_mode, rel=1e-4)


def test_a_prediction_step_of_ones_own_runs_under_ablation(tmp_path):
    """Its logits, from which accuracy is computed, are those of a model with dropout; its loss is its own."""

    def mean_logit(prediction):
        return {"mean_logit": float(prediction.predictions.mean())}

    curves = [
        cmp_trainer(tmp_path, kind=kind, cmp_num_ablations=1, compute_metrics=mean_logit).evaluate_ablations(seeds=[0])
        for kind in (CmpLogits, CmpTrainer)
    ]
    assert curves[0]["mean_logit"].nunique() == 4
    assert curves[0]["loss"].tolist() == pytest.approx((2 * curves[1]["loss"]).tolist(), rel=1e-6)
    assert curves[0]["mean_logit"].tolist() == pytest.approx((3 * curves[1]["mean_logit"]).tolist(), rel=1e-5)
    assert curves[0]["examples_in_violation"].tolist() == curves[1]["examples_in_violation"].tolist()


def test_a_loss_of_in_batch_negatives_has_a_curve(tmp_path):
    """The rows of a batch see each other, which dropout hides: the loss is read as that of the full model."""

    class Ranking(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            anchors, positives = (model(inputs["input_ids"].roll(shift, 1)) for shift in (0, 1))
            similarity = 20 * anchors.logits @ positives.logits.T
            loss = nn.functional.cross_entropy(similarity, torch.arange(len(similarity)))
            return (loss, anchors) if return_outputs else loss

    class CmpRanking(Ranking, CmpTrainer):
        pass

    trainer = cmp_trainer(tmp_path, kind=CmpRanking, cmp_num_ablations=1, prediction_loss_only=True)
    curve = trainer.evaluate_ablations(seeds=[0])
    assert curve["loss"][0] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert curve["loss"].nunique() == len(curve)


def test_several_data_sets_have_a_curve_each(tmp_path):
    trainer = cmp_trainer(tmp_path / "mine", cmp_num_ablations=1)
    parts = {"a": token_data(rows=4), "b": token_data(rows=12)}
    curve = trainer.evaluate_ablations(parts, drops=1, seeds=[0])
    assert curve["model"].tolist() == ["mine, a"] * 2 + ["mine, b"] * 2
    assert curve["examples"].tolist() == [4, 4, 12, 12]
    for name, data in parts.items():
        alone = trainer.evaluate_ablations(data, drops=1, seeds=[0], model_name=f"mine, {name}")
        found = curve[curve["model"] == f"mine, {name}"].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, alone)
        assert alone["loss"][0] == trainer.evaluate(data)["eval_loss"]
    trainer.eval_dataset = parts
    named = trainer.evaluate_ablations(drops=1, seeds=[0], model_name="other")
    assert named["model"].tolist() == ["other, a"] * 2 + ["other, b"] * 2
    evaluated = trainer.evaluate()
    assert named.query("level == 0")["loss"].tolist() == [evaluated["eval_a_loss"], evaluated["eval_b_loss"]]
    assert plot_curves(named).axes


class WithoutLayer(Ablation):
    name = "layers"

    def __init__(self, model):
        self.layers = model.bert.encoder.layer

    @contextmanager
    def context(self, level):
        hooks = [
            layer.register_forward_hook(lambda module, args, output: args[0] if torch.is_tensor(output) else output)
            for layer in self.layers[len(self.layers) - level :]
        ]
        yield
        for hook in hooks:
            hook.remove()


def test_ablations_of_ones_own_appear_under_their_names(tmp_path):
    model, data = tiny_bert(), token_data()
    layers, args = WithoutLayer(model), training_arguments(tmp_path, TrainingArguments)
    trainer = CmpTrainer(model, args, eval_dataset=data, ablations=[layers, CmpDrop(), layers])
    curve = trainer.evaluate_ablations(seeds=[0, 1])
    assert curve.groupby("ablation", sort=False)["level"].max().to_dict() == {"layers": 2, "drops": 3}
    assert curve.query("level == 0")["loss"].nunique() == 1
    alone = CmpTrainer(model, args, eval_dataset=data, ablations=[layers] * 2).evaluate_ablations(seeds=[0])
    assert alone["ablation"].unique().tolist() == ["layers"]
    pd.testing.assert_frame_equal(alone, curve.query("ablation == 'layers' and seed == 0").reset_index(drop=True))
    assert curve["loss"].nunique() == 1 + 2 + 3 * 2  # layers do not depend on the seed
    both = CmpTrainer(model, args, eval_dataset=data, ablations=[layers]).evaluate_ablations(drops=1, seeds=[0])
    assert both["ablation"].unique().tolist() == ["drops", "layers"]


def test_nobody_is_told_of_the_evaluations_of_a_curve(tmp_path):
    told = []

    class Listens(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            told.append("evaluate")

        def on_log(self, args, state, control, **kwargs):
            told.append("log")

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, callbacks=[Listens()], disable_tqdm=False)
    before = dict(vars(trainer))
    trainer.evaluate_ablations(drops=1, seeds=[0])
    assert not told and not trainer.state.log_history
    changed = {name for name, value in vars(trainer).items() if before.get(name) is not value}
    assert changed <= {"curve", "control", "gather_function"}
    trainer.evaluate()
    assert told == ["log", "evaluate"]


@pytest.mark.parametrize("drops", [1, 2, 3])
def test_loss_at_a_level_is_that_of_a_model_whose_rates_are_set_by_hand(drops, tmp_path):
    data = token_data(rows=4)
    trainer = cmp_trainer(tmp_path, data=data)
    curve = trainer.evaluate_ablations(seeds=[5])
    by_hand = tiny_bert(attn_implementation="eager").train()
    for module in by_hand.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1 - 0.9**drops
    torch.manual_seed(int(np.random.SeedSequence([5, 0]).generate_state(1)[0]))
    trainer.model.set_attn_implementation("eager")
    curve = trainer.evaluate_ablations(seeds=[5])
    expected = by_hand(**batch_of(data)).loss.item()
    assert curve.set_index("level")["loss"][drops] == pytest.approx(expected, rel=1e-5)


def test_equal_seeds_measure_equal_curves_and_other_seeds_others(trainer):
    one, again = (trainer.evaluate_ablations(seeds=[0, 1]) for _ in range(2))
    pd.testing.assert_frame_equal(one, again)
    losses = one.query("level == 3")["loss"]
    assert losses.nunique() == 2


def test_batches_have_masks_of_their_own(tmp_path):
    same_rows = Dataset.from_dict({name: [value[0]] * 8 for name, value in token_data()[:1].items()})
    trainer = cmp_trainer(tmp_path, data=same_rows, cmp_num_ablations=1)
    by_batch = []
    for rows in (4, 8):
        curve = trainer.evaluate_ablations(same_rows.select(range(rows)), seeds=[0])
        by_batch.append(curve.set_index("level")["loss"][3])
    assert by_batch[0] != pytest.approx(by_batch[1], rel=1e-6)


def test_measuring_leaves_weights_modes_and_randomness_alone(trainer):
    before, state = tiny_bert(), torch.get_rng_state()
    trainer.evaluate_ablations()
    assert same_weights(trainer.model, before)
    assert not any(module.training for module in trainer.model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trainer_without_comparative_loss_has_a_curve_too(tmp_path):
    trainer = cmp_trainer(tmp_path, args=training_arguments(tmp_path, TrainingArguments))
    curve = trainer.evaluate_ablations(drops=2)
    assert curve["level"].tolist() == [0, 1, 2] * 3


def test_levels_follow_explicit_rates(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, cmp_dropout_rates=[0.3, 0.6])
    assert trainer.evaluate_ablations(seeds=[0])["level"].tolist() == [0, 1, 2]


def test_violations_of_the_curve_are_counted_over_examples(tmp_path):
    trainer = cmp_trainer(
        tmp_path, cmp_num_ablations=1, per_example_loss_func=lambda outputs, _: -outputs.logits.norm(dim=1)
    )
    trainer.model.classifier.weight.data.mul_(100)
    share = trainer.evaluate_ablations(seeds=[0])["examples_in_violation"]
    assert (share * 32 % 1 == 0).all()
    assert 0 < share.max() <= 1


def test_the_last_crop_is_the_input_without_its_segments(tmp_path):
    data = token_data(rows=8).add_column("crop_segments", [[0, 0, 1, 1, 2, 3, 3, 0]] * 8)
    bare = data.map(lambda row: {name: [row[name][i] for i in (0, 1, 7)] for name in ("input_ids", "attention_mask")})
    trainer = cmp_trainer(
        tmp_path, data=data, cmp_num_ablations=1, cmp_num_crops=1, data_collator=CmpCropCollator(letter_tokenizer())
    )
    curve = trainer.evaluate_ablations(seeds=[0, 1], drops=1).query("ablation == 'crops'")
    assert curve["level"].tolist() == [0, 1, 2, 3] * 2
    expected = cmp_trainer(tmp_path, data=bare.remove_columns("crop_segments")).evaluate()["eval_loss"]
    assert curve.query("level == 3")["loss"].tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_question_answering_averages_start_and_end(tmp_path):
    torch.manual_seed(0)
    data = token_data(rows=10).remove_columns("labels")
    data = data.add_column("start_positions", [1] * 10).add_column("end_positions", [3] * 10)
    trainer = cmp_trainer(tmp_path, BertForQuestionAnswering(BertConfig(**SMALL)), data, cmp_num_ablations=1)
    full = trainer.evaluate_ablations(seeds=[0])["loss"][0]
    assert full == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_model_without_dropout_is_refused(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(ValueError, match="Pass --cmp_dropout"):
        cmp_trainer(tmp_path, model).evaluate_ablations()


def test_no_seed_no_ablation_and_no_data_are_refused(trainer):
    with pytest.raises(ValueError, match="no seeds"):
        trainer.evaluate_ablations(seeds=[])
    with pytest.raises(ValueError, match="no ablation to measure: 0 drops"):
        trainer.evaluate_ablations(drops=0)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="no data"):
        trainer.evaluate_ablations()


def test_table_shows_mean_and_spread_over_seeds(trainer):
    curve = trainer.evaluate_ablations()
    losses = curve.query("level == 2")["loss"]
    assert f"{losses.mean():.4f} ± {losses.std():.4f}" in as_text(curve)
    assert as_text(curve).startswith("32 examples, mean ± standard deviation over the mask seeds 0, 1, 2")
    assert summarize(curve).index.tolist() == [("comparative", "drops", level) for level in range(4)]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_curve_survives_a_file(form, trainer, tmp_path):
    curve = trainer.evaluate_ablations()
    if form == "csv":
        curve.to_csv(tmp_path / "curve.csv", index=False)
        read = pd.read_csv(tmp_path / "curve.csv")
    else:
        curve.to_json(tmp_path / "curve.json", orient="records", double_precision=15)
        read = pd.read_json(tmp_path / "curve.json")
    pd.testing.assert_frame_equal(read, curve, check_dtype=False)


def test_plot_has_a_line_for_each_model_and_labels_with_units(trainer, tmp_path):
    curve = trainer.evaluate_ablations()
    figure = plot_curves(pd.concat([curve, curve.assign(model="baseline", loss=curve["loss"] + 0.1)]))
    assert [axes.get_ylabel() for axes in figure.axes] == ["task loss (nats)", "accuracy", "examples in violation (%)"]
    assert all(axes.get_xlabel() == "cumulative drops k (0: full model)" for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["comparative", "baseline"]
    figure.savefig(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_lines_of_a_plot_differ_in_lightness_dash_and_marker(trainer):
    from matplotlib.colors import to_rgb

    curve = trainer.evaluate_ablations(seeds=[0])
    figure = plot_curves(pd.concat([curve.assign(model=name) for name in "abcd"]))
    lines = [container.lines[0] for container in figure.axes[0].containers]
    lightness = sorted(float(np.dot(to_rgb(line.get_color()), [0.299, 0.587, 0.114])) for line in lines)
    assert min(np.diff(lightness)) > 0.1
    assert len({line.get_linestyle() for line in lines}) == len({line.get_marker() for line in lines}) == 4


def test_an_unknown_metric_is_refused(trainer):
    curve = trainer.evaluate_ablations(seeds=[0])
    assert measures(curve) == ["loss", "examples_in_violation", "accuracy"]
    with pytest.raises(ValueError, match="it has accuracy"):
        plot_curves(curve, metric="f1")

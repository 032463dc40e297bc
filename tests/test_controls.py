"""The controls of a study change one thing about a training, whatever script it is in, and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    Trainer,
    TrainingArguments,
)

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.controls import Controls, main, symmetric_divergence
from tests.helpers import (
    SMALL,
    batch_of,
    cmp_trainer,
    gradients,
    same_weights,
    tiny_bert,
    token_data,
    training_arguments,
)

SCRIPT = Path(__file__).parent / "scripts" / "report_loss.py"


def trained(folder, controls=None, kind=Trainer, args=TrainingArguments, model=None, **changes):
    """A model after six steps, with or without controls."""
    model = tiny_bert() if model is None else model
    trainer = kind(model, training_arguments(folder, args, **changes), train_dataset=token_data())
    if controls is None:
        trainer.train()
    else:
        with controls.applied():
            trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [Trainer, CmpTrainer])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_dropout_equals_a_model_whose_rates_are_zero(kind, checkpointing, tmp_path):
    args = CmpTrainingArguments if kind is CmpTrainer else TrainingArguments
    changes = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
    ours = trained(tmp_path, Controls(no_dropout=True), kind, args, **changes)
    zero = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert same_weights(ours.model, trained(tmp_path, model=zero, **changes).model)
    assert not same_weights(ours.model, trained(tmp_path, **changes).model)


def test_without_dropout_equals_the_full_model_of_a_comparison(tmp_path):
    full = {"cmp_objective": "regularized", "cmp_primary": "full", "cmp_weight": 0.0, "cmp_num_ablations": 1}
    compared = cmp_trainer(tmp_path, **full)
    compared.train()
    ours = trained(tmp_path, Controls(no_dropout=True))
    for one, other in zip(ours.model.parameters(), compared.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class OwnLoss(Trainer):
    """Computes its loss without the Trainer's compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.2)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("controls", [Controls(no_dropout=True), Controls(r_drop=1.0), Controls(layer_drop=2)])
def test_controls_reach_a_trainer_with_a_loss_of_its_own(controls, tmp_path):
    ours = trained(tmp_path, controls, OwnLoss, model=tiny_bert(num_hidden_layers=4))
    plain = trained(tmp_path, kind=OwnLoss, model=tiny_bert(num_hidden_layers=4))
    assert not same_weights(ours.model, plain.model)


def test_controls_reach_training_and_not_evaluation(tmp_path):
    trainer = Trainer(tiny_bert(), training_arguments(tmp_path, TrainingArguments), eval_dataset=token_data())
    trainer.train_dataset = token_data()
    before = trainer.evaluate()["eval_loss"]
    with Controls(r_drop=5.0).applied():
        assert trainer.evaluate()["eval_loss"] == before
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"max_steps": 2}, 6),
        ({"max_steps": -1, "num_train_epochs": 1}, 24),  # 32 rows in batches of 4
        ({"max_steps": -1, "num_train_epochs": 0.5}, 12),
    ],
)
def test_three_times_the_epochs_are_three_times_the_steps(changes, steps, tmp_path):
    trainer = trained(tmp_path, Controls(epochs=3), **changes)
    assert trainer.state.global_step == steps
    assert trainer.args.max_steps == changes["max_steps"]  # as the script set it


def test_longer_training_is_training_with_more_steps_and_as_much_more_warm_up(tmp_path):
    ours = trained(tmp_path, Controls(epochs=3), max_steps=4, warmup_steps=2)
    assert same_weights(ours.model, trained(tmp_path, max_steps=12, warmup_steps=6).model)


def test_a_second_training_of_the_same_trainer_is_longer_too(tmp_path):
    trainer = Trainer(
        tiny_bert(), training_arguments(tmp_path, TrainingArguments, max_steps=2), train_dataset=token_data()
    )
    with Controls(epochs=3).applied():
        for _ in range(2):
            trainer.train()
            assert trainer.state.global_step == 6


def r_drop_by_hand(model, batch, weight):
    """From its paper: the mean of two draws' losses plus the symmetric divergence of their predictions."""
    doubled = {name: torch.cat([value, value]) for name, value in batch.items()}
    outputs = model(**doubled)
    one, two = outputs.logits.softmax(-1).chunk(2)
    divergence = ((one * (one / two).log()).sum(-1) + (two * (two / one).log()).sum(-1)).mean() / 2
    return outputs.loss + weight * divergence


def summed_over_items(outputs, labels, num_items_in_batch=None):
    """A loss that is divided by the number of items that the Trainer passes; that of BERT is a mean in any case."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss_func", [None, summed_over_items])
def test_r_drop_is_the_loss_of_its_paper(loss_func, tmp_path):
    batch = batch_of(token_data(), range(4))
    expected, model = tiny_bert().train(), tiny_bert().train()
    torch.manual_seed(3)
    loss = r_drop_by_hand(expected, batch, 0.7)
    loss.backward()
    trainer = Trainer(
        model, training_arguments(tmp_path, TrainingArguments), train_dataset=token_data(), compute_loss_func=loss_func
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    torch.manual_seed(3)
    controls = Controls(r_drop=0.7)
    controls.trainings = 1  # the step alone, without train()
    with controls.applied():
        found = trainer.training_step(model, dict(batch), torch.tensor(4))
    torch.testing.assert_close(found, loss.detach())
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_divergence_counts_both_directions():
    one, two = torch.tensor([0.9, 0.1]), torch.tensor([0.4, 0.6])
    outputs = type("Outputs", (), {"logits": torch.stack([one, two]).log()})()
    there, back = (one * (one / two).log()).sum(), (two * (two / one).log()).sum()
    assert abs(there - back) > 0.1
    torch.testing.assert_close(symmetric_divergence(outputs, 1), (there + back) / 2)


def test_r_drop_is_zero_where_nothing_drops_and_the_mean_of_starts_and_ends_for_answers():
    model = BertForQuestionAnswering(BertConfig(**SMALL)).train()
    ids = batch_of(token_data())["input_ids"]
    outputs = model(torch.cat([ids, ids]))
    parts = [outputs.start_logits, outputs.end_logits]
    one_by_one = [symmetric_divergence(type("Outputs", (), {"logits": part})(), 4) for part in parts]
    torch.testing.assert_close(symmetric_divergence(outputs, 4), torch.stack(one_by_one).mean())
    assert symmetric_divergence(model.eval()(torch.cat([ids, ids])), 4) < 1e-9


def test_r_drop_rejects_outputs_that_are_no_predictions():
    outputs = BertModel(BertConfig(**SMALL))(torch.tensor([[2, 5, 3]] * 2))
    with pytest.raises(ValueError, match=r"R-Drop compares the class logits .* this model gives last_hidden_state"):
        symmetric_divergence(outputs, 1)


class Observed(Trainer):
    """Keeps each batch, its loss, and the numbers of the layers that were trained on it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.zero_grad()
        loss = super().training_step(model, inputs, num_items_in_batch)
        layers = model.bert.encoder.layer
        trained_on = [k for k, layer in enumerate(layers) if next(layer.parameters()).grad is not None]
        self.seen = [*getattr(self, "seen", []), (inputs, loss.item(), trained_on)]
        return loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_drop_trains_the_model_with_the_numbers_of_layers_of_skips(checkpointing, tmp_path):
    model = tiny_bert(num_hidden_layers=6)
    changes = {"learning_rate": 0.0, "max_steps": 30, "gradient_checkpointing": checkpointing}
    trainer = trained(tmp_path, Controls(layer_drop=2), Observed, model=model, **changes)
    assert {len(layers) for _, _, layers in trainer.seen} == {6, 4, 3}  # CmpSkip skips 0, 2 or 3 of 6
    assert len({tuple(layers) for _, _, layers in trainer.seen if len(layers) == 4}) > 1
    for batch, loss, layers in trainer.seen:
        assert layers[0] == 0
        cut = tiny_bert(num_hidden_layers=6).eval()
        cut.load_state_dict(model.state_dict())
        cut.bert.encoder.layer = torch.nn.ModuleList(cut.bert.encoder.layer[k] for k in layers)
        cut.config.num_hidden_layers = len(layers)
        with torch.no_grad():
            assert cut(**batch).loss.item() == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--control_epochs 0: must be a positive number"),
        ({"r_drop": -1.0}, "--control_r_drop -1: must be 0 or a positive number"),
        ({"r_drop": 1.0, "no_dropout": True}, "compares two draws of dropout; remove --control_no_dropout"),
        ({"layer_drop": -1}, "--control_layer_drop -1: must be 0 or a positive integer"),
        ({"layer_drop": 2, "r_drop": 1.0}, "--control_layer_drop trains without dropout; remove --control_r_drop"),
    ],
)
def test_controls_that_make_no_sense_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        Controls(**changes)


@pytest.mark.parametrize("controls", [Controls(no_dropout=True), Controls(r_drop=1.0), Controls(layer_drop=2)])
def test_a_control_beside_ablations_is_rejected(controls, tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    with pytest.raises(ValueError, match="--cmp_num_ablations 2 takes the place of dropout"), controls.applied():
        trainer.train()


def test_layer_drop_finds_its_layers_without_a_trace(tmp_path):
    class Pops(Trainer):
        counted = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            self.counted += 1
            return F.cross_entropy(model(**inputs).logits, labels)

    trainer = trained(tmp_path, Controls(layer_drop=1), Pops, max_steps=3)
    assert trainer.counted == 3


def test_controls_without_dropout_reject_attention_that_they_do_not_reach(tmp_path):
    model = tiny_bert(num_hidden_layers=4)
    model.config._attn_implementation = "flash_attention_2"
    for controls in (Controls(no_dropout=True), Controls(layer_drop=1)):
        with pytest.raises(ValueError, match="uses attn_implementation='flash_attention_2'"):
            trained(tmp_path, controls, model=model)


def test_layer_drop_rejects_a_compiled_model(tmp_path):
    with pytest.raises(ValueError, match="--control_layer_drop does not work with --torch_compile"):
        trained(tmp_path, Controls(layer_drop=1), torch_compile=True)


def test_layer_drop_of_more_layers_than_there_are_ends_at_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="2 of 2 layers cannot be skipped"):
        trained(tmp_path, Controls(layer_drop=2), max_steps=1)


def test_r_drop_with_accumulated_batches_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="--control_r_drop with --gradient_accumulation_steps 2"):
        trained(tmp_path, Controls(r_drop=1.0), gradient_accumulation_steps=2)


@pytest.mark.parametrize("controls", [Controls(no_dropout=True), Controls(epochs=3), Controls(r_drop=1.0)])
def test_a_control_that_did_not_take_place_is_an_error(controls):
    with pytest.raises(ValueError, match=r"the script never called Trainer\.train"), controls.applied():
        pass


def test_a_misspelt_control_is_not_passed_on_to_the_script(capsys):
    with pytest.raises(SystemExit):
        main([str(SCRIPT), "--control_nodropout"])
    shown = capsys.readouterr().err
    assert "--control_nodropout is not one of the controls (did you mean --control_no_dropout" in shown


def test_a_script_that_exits_by_itself_is_checked_too(tmp_path, capsys):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--control_no_dropout", str(tmp_path / "exits.py")])
    assert stopped.value.code == 2
    assert "has no effect" in capsys.readouterr().err


def test_without_controls_a_script_runs_as_it_is(tmp_path):
    words = [str(SCRIPT), "--max_steps", "2", "--output_dir", str(tmp_path)]
    losses = []
    for start in ([], ["-m", "cmp_trainer.controls"]):
        subprocess.run([sys.executable, *start, *words], check=True, capture_output=True)
        losses.append((tmp_path / "eval_results.json").read_text().partition("eval_runtime")[0])
    assert losses[0] == losses[1]


def test_the_command_line_says_what_is_missing(capsys):
    with pytest.raises(SystemExit):
        main(["--control_no_dropout"])
    assert "expected the path of a script" in capsys.readouterr().err

"""What changes during a run, and batches that are not only rows: each case was met in a script of somebody's."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from cmp_trainer import CmpDrop, ComparativeStep, RegularizedLoss, plan
from cmp_trainer.execution.stacking import numbers, prefer_stacked
from tests.helpers import batch_of, cmp_trainer, gradients, tiny_bert, token_data
from tests.tiny_models import AVAILABLE

FULL_ONLY = RegularizedLoss(primary="full", weight=0.0)


class Small(nn.Module):
    """A classifier of vectors that does something to its inputs first."""

    def __init__(self, prepare=lambda inputs: inputs):
        super().__init__()
        torch.manual_seed(0)
        self.prepare = prepare
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, inputs, labels, priors=None):
        logits = self.layers(self.prepare(inputs))
        logits = logits if priors is None else logits + priors.log()
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def vectors(rows=6, seed=1):
    inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return {"inputs": inputs * 9, "labels": torch.arange(rows) % 3}


@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_a_model_that_scales_its_input_in_place_gets_copies(low_memory):
    found = []
    for prepare in (lambda inputs: inputs.div_(9), lambda inputs: inputs / 9):
        model, batch = Small(prepare).train(), vectors()
        step = ComparativeStep(model, plan(2), forward="sequential", low_memory=low_memory)
        for _ in range(2):
            torch.manual_seed(5)
            model.zero_grad()
            step(batch).backward()
            torch.testing.assert_close(batch, vectors())
        found.append(gradients(model))
    torch.testing.assert_close(*found)


def test_a_model_that_begins_to_write_into_its_inputs_later_is_rejected():
    model = Small().train()
    step = ComparativeStep(model, plan(2), forward="sequential")
    step(vectors())
    model.prepare = lambda inputs: inputs.div_(9)
    with pytest.raises(ValueError, match="writes into the tensors of its batch"):
        step(vectors(rows=600))


@pytest.mark.parametrize("forward", ["auto", "sequential"])
@pytest.mark.parametrize("first_rows", [4, 3])
def test_a_tensor_that_is_no_row_of_the_batch_is_never_split(forward, first_rows):
    priors = torch.tensor([0.5, 0.3, 0.2])
    for rows in (first_rows, 3, 5, 2):
        model = Small().train()
        step = ComparativeStep(model, plan(2), FULL_ONLY, forward=forward)
        step({**vectors(first_rows), "priors": priors})
        model.zero_grad()
        loss = step({**vectors(rows), "priors": priors})
        loss.backward()
        ours = gradients(model)
        model.zero_grad()
        expected = model.eval()(**vectors(rows), priors=priors)["loss"]
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(ours, gradients(model))


@pytest.mark.parametrize("forward", ["auto", "sequential"])
def test_dropout_in_place_trains(forward):
    found = []
    for inplace in (True, False):
        model = Small().train()
        model.layers[1] = nn.Identity()
        model.layers[2].inplace = inplace
        step = ComparativeStep(model, plan(2), forward=forward)
        torch.manual_seed(5)
        step(vectors()).backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


class SetsDropout(TrainerCallback):
    """Another dropout rate after the first optimizer step."""

    def __init__(self, rate):
        self.rate = rate

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.rate


def test_that_dropout_was_annealed_to_zero_is_said_once(tmp_path, caplog):
    settings = {"cmp_num_ablations": 2, "logging_steps": 1, "max_steps": 4}
    trainer = cmp_trainer(tmp_path, tiny_bert(attn_implementation="eager"), callbacks=[SetsDropout(0.0)], **settings)
    trainer.train()
    assert caplog.text.count("all variants had the same loss since the last log") == 1
    assert trainer.state.log_history[2]["violation_rate"] == 0


def test_dropout_that_a_callback_raises_from_zero_starts_with_a_warning(tmp_path, caplog):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = {"cmp_num_ablations": 2, "logging_steps": 1, "max_steps": 3}
    trainer = cmp_trainer(tmp_path, model, callbacks=[SetsDropout(0.2)], **settings)
    trainer.train()
    assert "until a callback changes that" in caplog.text
    assert trainer.state.log_history[2]["loss_ablated_2"] != trainer.state.log_history[2]["loss_full"]


def test_dropout_that_stayed_at_zero_ends_in_an_error(tmp_path):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = cmp_trainer(tmp_path, model, callbacks=[SetsDropout(0.0)], cmp_num_ablations=2)
    with pytest.raises(ValueError, match="never differed"):
        trainer.train()


def test_the_number_of_ablations_may_change_between_two_logs(tmp_path):
    class OneMore(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            args.cmp_num_ablations = 1 + state.global_step // 3

    trainer = cmp_trainer(tmp_path, cmp_num_ablations=1, callbacks=[OneMore()], logging_steps=2, max_steps=8)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert "loss_ablated_2" not in logs[0]
    assert "loss_ablated_3" in logs[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"cmp_low_memory": True, "ddp_static_graph": True},
            "--ddp_static_graph",
            marks=pytest.mark.skipif(not hasattr(TrainingArguments, "ddp_static_graph"), reason="of transformers 5"),
        ),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}, "recompute"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_exact_together_are_rejected(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cmp_trainer(tmp_path, cmp_num_ablations=2, **settings)


def test_positions_that_grow_in_the_forward_do_not_hide_the_models_own_error():
    class Grows(Small):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(2))

        def forward(self, inputs, labels):
            self.table = torch.zeros(len(inputs))
            return super().forward(inputs, labels)

    model = Grows().train()
    step = ComparativeStep(model, plan(2), forward="sequential")
    step(vectors()).backward()
    assert len(model.table) == 6


def test_a_nan_in_the_first_loss_is_called_a_nan():
    model = Small().train()
    batch = vectors()
    batch["inputs"][0] = torch.nan
    with pytest.raises(ValueError, match="the loss of the first batch is nan"):
        ComparativeStep(model, plan(2))(batch)


def test_that_the_full_model_differs_from_the_eval_model_is_said_with_where_it_begins(caplog):
    class Other(nn.Module):
        def forward(self, hidden):
            return hidden + 0.1 if self.training else hidden

    model = Small().train()
    model.layers.insert(1, Other())
    ComparativeStep(model, plan(2))(vectors())
    assert "gives other losses than in eval mode" in caplog.text
    assert "begins in layers.1" in caplog.text


def test_crops_that_remove_nothing_in_a_whole_training_end_in_an_error(tmp_path):
    data = token_data()
    data = data.add_column("crop_segments", [[0] * 8] * len(data))
    for rows, steps in ((data, 0), (list(data), 2)):  # a table is looked through before the first step
        trainer = cmp_trainer(tmp_path, data=rows, cmp_num_ablations=2, cmp_num_crops=1, max_steps=2)
        with pytest.raises(ValueError, match="no example of the training had a token to remove"):
            trainer.train()
        assert trainer.state.global_step == steps


def test_examples_without_anything_to_crop_are_counted(tmp_path, caplog):
    data = token_data()
    segments = [[0] * 8 if row % 4 else [0, 1, 1, 2, 2, 2, 0, 0] for row in range(len(data))]
    trainer = cmp_trainer(
        tmp_path, data=data.add_column("crop_segments", segments), cmp_num_ablations=1, cmp_num_crops=1, max_steps=1
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    without = sum(not any(row) for row in segments)
    assert f"{without} of {len(data)} training examples have no token to remove" in caplog.text


def test_an_image_batch_is_not_taken_for_a_few_tokens():

    assert not prefer_stacked({"pixel_values": torch.zeros(64, 3, 224, 224)}, "auto")
    assert prefer_stacked({"input_ids": torch.zeros(4, 64, dtype=torch.long)}, "auto")


@pytest.mark.parametrize(
    ("model_type", "positions"),
    [("bert", 8), ("gpt2", 8), ("vit", 5), ("vivit", 5), ("wav2vec2", 12), ("whisper", 16)],
)
def test_what_auto_goes_by_are_the_positions_that_the_layers_see(model_type, positions):
    """Tokens, patches and the class token, frames of a sound or of a spectrogram's encoder."""

    tiny = AVAILABLE[model_type]
    batch = tiny.batch()
    step = ComparativeStep(tiny.build().train(), plan(1))
    step(batch)
    assert round(step._positions_each * numbers(batch)) == 2 * positions


def test_compared_batches_are_not_shared_with_other_steps():
    """Equal steps on one model do not see each other's plan or log."""
    model, batch = tiny_bert().train(), batch_of(token_data())
    one, other = (ComparativeStep(model, [CmpDrop()]) for _ in range(2))
    one(batch)
    assert one.log()
    assert not other.log()

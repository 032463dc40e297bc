"""Ablating the top layers alone: the layers below run once, and all is as if they had run for each variant."""

import copy
import functools
import logging
import shutil
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from cmp_trainer import CmpCrop, CmpDrop, ComparativeStep
from cmp_trainer.ablations import Ablation
from cmp_trainer.execution.layers import find_stack
from tests.helpers import batch_of, cmp_trainer, gradients, tiny_bert, token_data
from tests.test_ways_of_training import lora_bert, recorded
from tests.tiny_models import AVAILABLE, wave_batch

DROP = CmpDrop(base_rate=0.3)
EXECUTIONS = {"sequential": {"forward": "sequential"}, "stacked": {"forward": "stacked"}, "low memory": {}}
EXECUTIONS["low memory"] = {"low_memory": True}
every_execution = pytest.mark.parametrize("execution", EXECUTIONS)
# Called by `layer.forward(…)`, which no one sees.
WITHOUT_STACK = {"squeezebert"}


def step_of(model, batch, num_layers=1, shares=True, drops=2, ablations=None, loss_fn=None, **settings):
    """Loss, gradients and the step itself, of a second step; its first one makes the checks."""
    step = ComparativeStep(
        model.train(), ablations or [DROP] * drops, ablated_layers=num_layers, **{"forward": "sequential", **settings}
    )
    torch.manual_seed(5)
    step(batch, loss_fn)
    step.log()
    if not shares:
        step._shares_lower = False
    torch.manual_seed(5)
    model.zero_grad()
    loss = step(batch, loss_fn)
    loss.backward()
    return loss.detach(), gradients(model), step


def assert_same(ours, expected, tolerance=1e-6):
    """Equal losses; gradients to the tolerance of the largest one."""
    torch.testing.assert_close(ours[0], expected[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == expected[1].keys()
    size = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(ours[1][name] / size, gradient / size, rtol=0, atol=tolerance, msg=name)


# The definition


def bert_with_rates_above(num_layers, **changes):
    """A BERT whose dropout is 0.3 in the top layers, the pooler's and the head's, and 0 elsewhere."""
    model = tiny_bert(num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes)
    for part in (*model.bert.encoder.layer[3 - num_layers :], model.dropout):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    return model


def gpt2_with_rates_above(num_layers):
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16, **rates))
    for layer in model.transformer.h[3 - num_layers :]:
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
    return model


@every_execution
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("kind", [bert_with_rates_above, gpt2_with_rates_above])
def test_it_is_the_same_model_with_every_rate_below_the_boundary_at_zero(kind, num_layers, execution):
    batch = batch_of(token_data())
    if kind is gpt2_with_rates_above:
        batch["labels"] = batch["input_ids"]
    ours = kind(num_layers)
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    expected = step_of(kind(num_layers), batch, None, ablations=[CmpDrop()] * 2)
    result = step_of(ours, batch, num_layers, ablations=[CmpDrop()] * 2, **EXECUTIONS[execution])
    assert_same(result, expected)
    assert result[2]._shares_lower


def test_all_layers_ablated_is_cmp_drop_but_for_the_dropout_of_the_embeddings():
    batch, model = batch_of(token_data()), tiny_bert()
    without = copy.deepcopy(model)
    without.bert.embeddings.dropout.p = 0.0
    assert_same(step_of(model, batch, 2, ablations=[CmpDrop()]), step_of(without, batch, None, ablations=[CmpDrop()]))


# Every architecture


@pytest.mark.parametrize("tiny", AVAILABLE.values(), ids=AVAILABLE)
def test_every_architecture_gives_the_losses_and_gradients_of_separate_forwards(tiny):
    for model in tiny.builds():
        if tiny.model_type in WITHOUT_STACK:
            with pytest.raises(ValueError, match="no stack of layers was found"):
                step_of(model, tiny.batch())
            continue
        ours = step_of(model, tiny.batch())
        assert ours[2]._shares_lower
        separate, tolerance = step_of(model, tiny.batch(), shares=False), 2e-5 if tiny.model_type == "xlm" else 2e-6
        assert_same(ours, separate, tolerance)
        assert_same(step_of(model, tiny.batch(), low_memory=True), separate, tolerance)
        try:
            stacked = step_of(model, tiny.batch(), forward="stacked")
        except ValueError as refusal:
            assert "--cmp_forward stacked does not work for this model" in str(refusal)
        else:
            assert_same(stacked, separate, 10 * tolerance)
        assert untouched(model)
        losses = {name: value for name, value in ours[2].log().items() if name.startswith("loss")}
        assert len(set(losses.values())) == 3


def untouched(model):
    """No module has a call or a forward of its own."""
    names = ("forward", "_compiled_call_impl")
    return not [module for module in model.modules() if any(vars(module).get(name) is not None for name in names)]


STACKS = {
    "bert": ("bert.encoder.layer", 2),
    "albert": ("albert.encoder.albert_layer_groups", 2),  # one layer, run twice
    "funnel": ("funnel.encoder.blocks", 2),  # a list of lists
    "xlm": ("transformer.attentions", 2),  # parts of a layer in lists of their own
    "gpt2": ("transformer.h", 2),
    "t5": ("decoder.block", 2),
    "bart": ("model.decoder.layers", 2),
    "swin": ("swin.encoder.layers", 2),  # stages
    "llava": ("model.language_model.layers", 2),
    "wav2vec2": ("wav2vec2.encoder.layers", 2),
    "whisper": ("model.decoder.layers", 2),
}


@pytest.mark.parametrize("model_type", STACKS)
def test_the_stack_is_the_last_one_that_starts(model_type):
    model, batch = AVAILABLE[model_type].build(), AVAILABLE[model_type].batch()
    stack = find_stack(model, lambda: model(**batch), 1)
    assert (stack.name, len(stack.layers)) == STACKS[model_type]


# How it is run


@every_execution
def test_lower_layers_run_once(execution):
    model, calls = tiny_bert(num_hidden_layers=3), []
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_pre_hook(lambda module, args, number=number: calls.append((number, len(args[0]))))
    _, _, step = step_of(model, batch_of(token_data()), **EXECUTIONS[execution])
    calls.clear()
    step(batch_of(token_data())).backward()
    lower, top = [(0, 4), (1, 4)], [(2, 4)]
    assert (
        calls
        == {"sequential": lower + top * 3, "stacked": [*lower, (2, 12)], "low memory": lower + top * 5}[execution]
    )


@every_execution
@pytest.mark.parametrize("checkpointing", [False, True])
def test_crops_have_a_lower_part_of_their_own(checkpointing, execution):
    batch = batch_of(token_data())
    batch["crop_segments"] = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]] * 4)
    ablations = [CmpCrop(), DROP, DROP]

    def run(shares, **settings):
        model = tiny_bert(num_hidden_layers=3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return step_of(model, batch, shares=shares, ablations=ablations, **settings)

    assert_same(run(True, **EXECUTIONS[execution]), run(False))


@every_execution
@pytest.mark.parametrize("changed", ["checkpointing", "autocast", "lora"])
def test_the_gradients_are_those_of_separate_forwards(changed, execution):
    def run(shares, **settings):
        model = lora_bert(0.1, 0.2) if changed == "lora" else tiny_bert(num_hidden_layers=3)
        if changed == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", enabled=changed == "autocast"):
            return step_of(model, batch_of(token_data()), shares=shares, **settings)

    assert_same(run(True, **EXECUTIONS[execution]), run(False), 2e-2 if changed == "autocast" else 1e-6)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_compiled_model_gives_the_gradients_of_separate_forwards(low_memory):
    def run(shares, compiled, **settings):
        torch._dynamo.reset()
        model = tiny_bert(num_hidden_layers=3)
        trained = torch.compile(model, backend="aot_eager") if compiled else model
        loss, _, step = step_of(trained, batch_of(token_data()), shares=shares, **settings)
        return loss, gradients(model), step

    counters = torch._dynamo.utils.counters
    counters.clear()
    ours = run(True, True, low_memory=low_memory)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 5  # embeddings, a lower layer, a top one at each level
    assert ours[2]._shares_lower
    assert_same(ours, run(False, False))


def test_a_part_compiled_as_a_whole_hides_its_layers_and_is_rejected():
    model = tiny_bert()
    model.bert.compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"did not call the layers of bert\.encoder\.layer one by one"):
        step_of(model, batch_of(token_data()))


def test_a_training_with_accumulation_equals_separate_forwards(tmp_path, monkeypatch):
    settings = {"cmp_ablated_layers": 1, "gradient_accumulation_steps": 2, "cmp_dropout": 0.3}
    ours = recorded(tmp_path, **settings)
    monkeypatch.setattr("cmp_trainer.checks.first_batch.shares_lower", lambda *args: False)
    torch.testing.assert_close(ours, recorded(tmp_path, **settings), rtol=1e-4, atol=1e-7)


# Checkpoints of gradients


class Checkpoints(TrainerCallback):
    """Switches gradient checkpointing on after the first step."""

    def __init__(self, reentrant):
        self.reentrant = reentrant

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.gradient_checkpointing_enable({"use_reentrant": self.reentrant})


def test_checkpointing_that_is_switched_on_in_mid_training_changes_nothing(tmp_path):
    settings = {"cmp_ablated_layers": 1, "cmp_num_ablations": 2, "cmp_dropout": 0.3, "max_steps": 3}
    trained = []
    for callbacks in ([], [Checkpoints(False)]):
        trainer = cmp_trainer(tmp_path, callbacks=callbacks, **settings)
        trainer.train()
        trained.append(trainer.model.state_dict())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_runs_the_lower_layers_for_each_variant_and_says_so(caplog):
    model, batch = tiny_bert(num_hidden_layers=3), batch_of(token_data())
    expected = step_of(copy.deepcopy(model), batch, shares=False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with caplog.at_level(logging.WARNING):
        ours = step_of(model, batch)
    assert not ours[2]._shares_lower
    assert "run once for each variant" in caplog.text and "use_reentrant" in caplog.text
    assert_same(ours, expected)


class CheckpointsAll(nn.Module):
    """An encoder that is checkpointed as a whole, the boundary inside of it."""

    def __init__(self, encoder, reentrant):
        super().__init__()
        self.encoder, self.reentrant = encoder, reentrant

    def forward(self, hidden, *args, **kwargs):
        def run(hidden):
            return self.encoder(hidden, *args, **kwargs)[0]

        return BaseModelOutputWithPastAndCrossAttentions(
            checkpoint.checkpoint(run, hidden, use_reentrant=self.reentrant)
        )


@every_execution
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_boundary_gives_the_same_gradients(reentrant, execution):
    batch, model = batch_of(token_data()), tiny_bert(num_hidden_layers=3)
    expected = step_of(copy.deepcopy(model), batch, shares=False)
    model.bert.encoder = CheckpointsAll(model.bert.encoder, reentrant)
    if reentrant and execution == "stacked":
        pytest.skip("reentrant layers cannot be compared with a stacked forward")
    loss, found, step = step_of(model, batch, **EXECUTIONS[execution])
    assert step._shares_lower != reentrant
    assert_same((loss, {name.replace("encoder.encoder", "encoder"): one for name, one in found.items()}), expected)


# What is not alike in all variants


@every_execution
def test_layer_drop_and_an_encoder_that_draws_leave_the_same_random_state(execution):
    tiny = AVAILABLE["bart"]
    model = tiny.build(decoder_layers=4, encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    if execution == "stacked":
        pytest.skip("layers are dropped alike, but a stacked forward is compared with single ones to the bit")
    for seed in range(4):
        batch = tiny.batch(seed)
        assert_same(step_of(model, batch, 2, **EXECUTIONS[execution]), step_of(model, batch, 2, shares=False))


def test_a_model_that_writes_into_what_a_lower_module_returned_gets_copies():
    ours = step_of(AVAILABLE["ctrl"].build(), AVAILABLE["ctrl"].batch())
    assert len(ours[2]._boundary.written) == 1


def test_hidden_states_of_lower_layers_reach_a_head_that_weights_them():
    torch.manual_seed(0)
    tiny = AVAILABLE["wav2vec2"]
    config = Wav2Vec2Config(**{**tiny.settings, "num_hidden_layers": 3}, use_weighted_layer_sum=True)
    model = Wav2Vec2ForSequenceClassification(config)
    nn.init.normal_(model.layer_weights)
    batch = wave_batch()
    ours = step_of(model, batch)
    assert ours[2]._shares_lower
    assert_same(ours, step_of(model, batch, shares=False))
    assert ours[1]["layer_weights"].any()


class Changes(nn.Module):
    """Its embeddings are others each time it is called."""

    def __init__(self):
        super().__init__()
        self.bert, self.calls = tiny_bert(num_hidden_layers=3), 0
        self.bert.bert.embeddings.register_forward_hook(self.change)

    def change(self, module, args, output):
        self.calls += 1
        return output + torch.arange(output.shape[-1]).mul(self.calls).sin()

    def forward(self, **batch):
        return self.bert(**batch)


def test_lower_layers_that_differ_between_variants_are_run_for_each_of_them_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        _, _, step = step_of(Changes(), batch_of(token_data()))
    assert not step._shares_lower
    assert "run once for each variant" in caplog.text and "differ from those of separate forwards" in caplog.text


def test_nothing_of_the_model_is_changed_by_a_forward_that_raises():
    model, batch = tiny_bert(num_hidden_layers=3), batch_of(token_data())
    _, _, step = step_of(model, batch)
    count = 0

    def fail(*args):
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("stop")

    hook = model.bert.encoder.layer[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        step(batch)
    hook.remove()
    assert untouched(model)
    assert F.dropout(torch.ones(1000), 0.5).sum() != 1000


class Halves(Ablation):
    """Level k halves the hidden states of the top layer k times; what lies below stays as it is."""

    name = "halves"
    leaves_lower_layers = True

    def __init__(self, layer=None):
        self.layer = layer

    def for_model(self, model, processing_class=None, data_collator=None):
        return Halves(model.bert.encoder.layer[-1])

    @contextmanager
    def context(self, level):
        hook = self.layer.register_forward_hook(lambda module, args, output: output * 0.5**level)
        try:
            yield
        finally:
            hook.remove()


@pytest.mark.parametrize("execution", ["sequential", "low memory"])
def test_an_ablation_of_ones_own_that_leaves_the_lower_layers_alone_shares_them(execution):
    model, batch, halves = tiny_bert(num_hidden_layers=3), batch_of(token_data()), Halves()
    ablations = [halves, DROP, halves]
    ours = step_of(model, batch, ablations=ablations, **EXECUTIONS[execution])
    assert len({id(lower) for lower in ours[2]._lowers().values()}) == 1
    assert_same(ours, step_of(model, batch, ablations=ablations, shares=False))


@every_execution
def test_an_encoder_that_is_called_twice_in_a_loss_is_shared_call_by_call(execution):
    encoder = tiny_bert(num_hidden_layers=3)
    batch = {"one": batch_of(token_data())["input_ids"], "other": batch_of(token_data(), range(4, 8))["input_ids"]}
    batch["labels"] = torch.tensor([0, 1, 1, 0])

    def loss_fn(model, batch):
        one, other = model(input_ids=batch["one"]).logits, model(input_ids=batch["other"]).logits
        return F.binary_cross_entropy_with_logits((one * other).sum(-1), batch["labels"].float())

    loss_fn.stackable = True
    run = functools.partial(step_of, encoder, batch, loss_fn=loss_fn)
    ours = run(**EXECUTIONS[execution])
    assert ours[2]._shares_lower
    assert_same(ours, run(shares=False))


def test_a_second_run_on_what_the_first_one_predicted_is_not_shared():
    """Recycled predictions differ between variants; on the first batch all of them happen to agree."""
    model, batch = tiny_bert(num_hidden_layers=3), batch_of(token_data())
    recycled = [False]

    def loss_fn(model, batch):
        outputs = model(**batch)
        tokens = (
            outputs.logits.mul(1e4).long().abs().remainder(35).add(5) if recycled[0] else batch["input_ids"][:, :3]
        )
        return outputs.loss + model(input_ids=tokens, labels=batch["labels"]).loss

    found = []
    for shares in (True, False):
        recycled[0] = False
        step = ComparativeStep(model.train(), [DROP] * 2, ablated_layers=1, forward="sequential")
        torch.manual_seed(5)
        step(batch, loss_fn)
        recycled[0] = True
        assert step._shares_lower
        step._shares_lower = shares
        torch.manual_seed(5)
        model.zero_grad()
        loss = step(batch, loss_fn)
        loss.backward()
        found.append((loss.detach(), gradients(model), step))
        assert not step._shares_lower
    assert_same(*found)


@pytest.mark.parametrize("padded_first", [False, True])
def test_stacked_batches_with_and_without_padding_follow_each_other(padded_first):
    """Without padding, transformers passes no mask to the layers."""
    model, plain = tiny_bert(num_hidden_layers=3), batch_of(token_data())
    padded = {**plain, "attention_mask": plain["attention_mask"].clone()}
    padded["attention_mask"][1, -3:] = 0
    batches = [padded, plain, padded] if padded_first else [plain, padded, plain]
    found = []
    for settings in ({"forward": "stacked"}, {"forward": "sequential"}):
        step = ComparativeStep(model.train(), [DROP] * 2, ablated_layers=1, **settings)
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            model.zero_grad()
            loss = step(batch)
            loss.backward()
            found.append((loss.detach(), gradients(model), step))
    for ours, expected in zip(found[:3], found[3:], strict=True):
        assert_same(ours, expected)


class WritesLater(nn.Module):
    """Zeroes padding in place, in what its embeddings returned, where there is padding."""

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert(num_hidden_layers=3)
        encode = self.bert.bert.encoder.forward

        def forward(hidden, *args, **kwargs):
            if self.padding.any():
                hidden[self.padding] = 0
            return encode(hidden, *args, **kwargs)

        self.bert.bert.encoder.forward = forward

    def forward(self, **batch):
        self.padding = batch["input_ids"] == 39
        return self.bert(**batch)


@every_execution
def test_what_a_model_writes_into_lower_outputs_on_a_later_batch_only_is_not_lost(execution):
    plain, model = batch_of(token_data()), WritesLater()
    plain["input_ids"] = plain["input_ids"].clamp(max=38)
    padded = {**plain, "input_ids": plain["input_ids"].clone()}
    padded["input_ids"][1, -3:] = 39
    found = []
    for settings in (EXECUTIONS[execution], {"forward": "sequential"}):
        step = ComparativeStep(model.train(), [DROP] * 2, ablated_layers=1, **settings)
        step(plain)
        if len(found):
            step._shares_lower = False
        torch.manual_seed(5)
        model.zero_grad()
        loss = step(padded)
        loss.backward()
        found.append((loss.detach(), gradients(model), step))
    assert_same(*found)


def test_low_memory_of_batches_without_labels_waits_and_can_be_differentiated():
    step = ComparativeStep(AVAILABLE["gpt2"].build().train(), [DROP], ablated_layers=1, low_memory=True)
    unlabelled = {**AVAILABLE["gpt2"].batch(), "labels": torch.full((2, 8), -100)}
    step(unlabelled).backward()
    step(AVAILABLE["gpt2"].batch()).backward()
    assert step.num_comparisons == 1


def test_the_module_that_calls_the_layers_compiled_as_a_whole_is_rejected():
    model = tiny_bert()
    model.bert.encoder.compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"did not call the layers of bert\.encoder\.layer one by one"):
        step_of(model, batch_of(token_data()))


def test_layers_that_a_loss_calls_by_itself_are_no_stack():
    model = tiny_bert()

    def loss_fn(model, batch):
        hidden = model.bert.embeddings(batch["input_ids"])
        for layer in model.bert.encoder.layer:
            hidden = layer(hidden)[0] if isinstance(layer(hidden), tuple) else layer(hidden)
        return F.cross_entropy(model.classifier(hidden[:, 0]), batch["labels"])

    with pytest.raises(ValueError, match="no stack of layers was found"):
        step_of(model, batch_of(token_data()), loss_fn=loss_fn)


# Evaluation


def test_evaluation_ablates_what_training_ablates(tmp_path):
    model = tiny_bert(num_hidden_layers=3)
    settings = {"cmp_num_ablations": 2, "cmp_eval_ablations": True, "cmp_dropout": 0.3, "max_steps": 1}
    trainer = cmp_trainer(tmp_path, model, cmp_ablated_layers=1, **settings)
    ours = trainer.evaluate()
    everything = cmp_trainer(tmp_path, model, **settings).evaluate()
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:2]):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.forward = lambda values: values
    expected = cmp_trainer(tmp_path, model, **settings, cmp_ablated_layers=1).evaluate()
    names = ["eval_loss", "eval_loss_full", "eval_loss_ablated_1", "eval_loss_ablated_2"]
    assert [ours[name] for name in names] == pytest.approx([expected[name] for name in names])
    assert ours["eval_loss_ablated_2"] != pytest.approx(everything["eval_loss_ablated_2"], rel=1e-4)
    curve = trainer.evaluate_ablations(drops=2, seeds=[0])
    assert len(curve) == 3


# What is rejected


@pytest.mark.parametrize(
    ("num_layers", "message"),
    [
        (0, "0 is not the number of layers to ablate, 1 or more"),
        (-1, "-1 is not the number of layers to ablate"),
        (True, "True is not the number of layers"),
        (3, r"3 is more than the 2 layers of bert\.encoder\.layer, the stack of BertForSequenceClassification"),
    ],
)
def test_a_number_of_layers_out_of_range_is_rejected(num_layers, message):
    with pytest.raises(ValueError, match=f"--cmp_ablated_layers {message}"):
        step_of(tiny_bert(), batch_of(token_data()), num_layers)


def test_too_many_layers_of_several_stacks_are_rejected_with_all_stacks():
    tiny = AVAILABLE["t5"]
    with pytest.raises(ValueError, match=r"the 2 layers of decoder\.block.*; 2 in encoder\.block\. Give 1 to 2"):
        step_of(tiny.build(), tiny.batch(), 5)


def test_layers_of_a_model_without_a_stack_are_rejected():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    batch = {"x": torch.randn(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(ValueError, match="--cmp_ablated_layers 1: no stack of layers was found in Sequential"):
        step_of(model, batch, loss_fn=lambda model, batch: F.cross_entropy(model(batch["x"]), batch["labels"]))


def test_layers_with_crops_only_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="--cmp_ablated_layers 1 has no effect on CmpCrop"):
        ComparativeStep(tiny_bert(), [CmpCrop()], ablated_layers=1)
    with pytest.raises(
        ValueError, match="--cmp_ablated_layers 1 is about drops, and all 2 ablations are crops or skips"
    ):
        cmp_trainer(tmp_path, cmp_num_ablations=2, cmp_num_crops=2, cmp_ablated_layers=1)


@pytest.mark.parametrize("value", [0, -2])
def test_arguments_out_of_range_are_rejected(value, tmp_path):
    with pytest.raises(ValueError, match=f"--cmp_ablated_layers {value} must be 1 or more"):
        cmp_trainer(tmp_path, cmp_num_ablations=2, cmp_ablated_layers=value)


def test_dropout_below_the_boundary_alone_is_nothing_to_ablate():
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.bert.embeddings.dropout.p = 0.5
    with pytest.raises(ValueError, match="all at rate 0"):
        step_of(model, batch_of(token_data()), ablations=[CmpDrop()])


# What inductor draws


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("num_layers", [None, 1])
def test_low_memory_under_inductor_has_the_gradients_of_all_variants_at_once(num_layers):
    """Inductor draws masks of its own, with and without a graph the same ones."""
    found = []
    for low_memory in (False, True):
        torch._dynamo.reset()
        model = tiny_bert()
        compiled = torch.compile(model, backend="inductor")
        loss, _, step = step_of(compiled, batch_of(token_data()), num_layers, low_memory=low_memory)
        found.append((loss, gradients(model), step))
    assert_same(*found)

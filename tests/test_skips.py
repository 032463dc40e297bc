"""CmpSkip: variants without some of the layers, which compute what models without these layers compute."""

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from cmp_trainer import CmpCrop, CmpDrop, ComparativeStep, plan
from cmp_trainer.ablations.skip import CmpSkip, SkipLayers
from cmp_trainer.checks import layers
from cmp_trainer.cut import cut
from cmp_trainer.execution.layers import find_stack
from tests.helpers import batch_of, cmp_trainer, gradients, tiny_bert, token_data
from tests.test_shared_layers import DROP, EXECUTIONS, assert_same, untouched
from tests.tiny_models import AVAILABLE

LAYERS = 5
ORDERS = ("random", "top")
# Their layers cannot be left out: there is no stack, a layer is spread over several lists, layers change the shape, or
# they carry two streams of states.
NOT_SKIPPED = {"squeezebert", "xlm", "flaubert", "segformer", "lilt"}
# A variant is no model with fewer layers: the loss reads the attention of all layers; stages are numbered by size.
NOT_CUT = {"esm", "canine", "swin", "swinv2", "donut-swin", "focalnet"}


def step_of(model, batch, ablations, shares=True, loss_fn=None, **settings):
    """Loss, gradients and the step itself, of a second step; its first one makes the checks."""
    step = ComparativeStep(model.train(), ablations, **{"forward": "sequential", **settings})
    torch.manual_seed(5)
    step(batch, loss_fn)
    step.log()
    step._shares_lower &= shares
    torch.manual_seed(5)
    model.zero_grad()
    loss = step(batch, loss_fn)
    loss.backward()
    return loss.detach(), gradients(model), step


def skips(number=2, **changes):
    return [CmpSkip(**changes)] * number


@pytest.fixture
def model():
    return tiny_bert(num_hidden_layers=LAYERS, initializer_range=0.2)


@pytest.fixture
def batch():
    return batch_of(token_data())


def layers_called(model, run):
    """The numbers of the layers that are computed in a run, in their order."""
    calls = []
    hooks = [
        layer.intermediate.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(model.bert.encoder.layer)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


# Which layers


def test_a_third_a_half_and_so_on_are_skipped_by_default():
    assert [CmpSkip().count(level, 12) for level in range(5)] == [0, 4, 6, 7, 8]
    assert [CmpSkip().count(level, 6) for level in range(5)] == [0, 2, 3, 4, 5]
    assert CmpSkip().count(1, 2) == 1
    assert CmpSkip((1, 4)).count(2, 6) == 4


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_skipped_is_nested_and_the_first_layer_always_runs(order):
    for seed in range(20):
        found = []
        for level in range(4):
            torch.manual_seed(seed)
            found.append(set(CmpSkip((1, 2, 4), order).skipped_layers(level, LAYERS)))
        assert [len(one) for one in found] == [0, 1, 2, 4]
        assert all(before < after for before, after in itertools.pairwise(found))
        assert 0 not in found[-1]


def test_random_layers_are_drawn_anew_in_each_step(model, batch):
    step = ComparativeStep(model, skips(1, layers=(2,)))
    step(batch)
    found = set()
    for _ in range(8):
        calls = layers_called(model, lambda: step(batch).backward())
        found.add(tuple(calls[LAYERS:]))
    assert len(found) > 2


# The definition


def fewer_layers(model, batch, kept):
    """A new model that is built with some of the layers."""
    model.eval()
    return cut(model, find_stack(model, lambda: model(**batch)), kept, lambda one: one(**batch).loss)


def losses_at(step, batch, level, seed=5):
    torch.manual_seed(seed)
    return step.measure(batch, lambda model, batch: model(**batch).loss, (level,))[0]


@pytest.mark.parametrize("tiny", AVAILABLE.values(), ids=AVAILABLE)
def test_every_architecture_computes_what_a_model_with_fewer_layers_computes(tiny):
    model, batch = tiny.build().train(), tiny.batch()
    if tiny.model_type in NOT_SKIPPED:
        with pytest.raises(ValueError, match=r"no stack of layers was found|cannot skip layers of"):
            step_of(model, batch, skips(1, layers=(1,)))
        return
    for order in ORDERS:
        if tiny.model_type == "canine":  # its last stack has one layer
            with pytest.raises(ValueError, match="1 of 1 layers cannot be skipped"):
                step_of(model, batch, skips(1, layers=(1,)))
            return
        ours = step_of(model, batch, skips(1, layers=(1,), order=order))
        separate = step_of(model, batch, skips(1, layers=(1,), order=order), shares=False)
        assert ours[2]._shares_lower
        assert_same(ours, separate, 2e-5 if tiny.model_type == "xlm" else 2e-6)
        assert untouched(model)
    model.eval()
    step, kept = ours[2], range(len(ours[2]._boundary.stack.layers) - 1)
    if tiny.model_type in NOT_CUT:
        with pytest.raises(ValueError, match="cannot be built with"):
            fewer_layers(model, batch, kept)
        return
    smaller = fewer_layers(model, batch, kept)
    torch.testing.assert_close(losses_at(step, batch, 1), smaller(**batch).loss.detach(), rtol=1e-6, atol=1e-6)


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=16, initializer_range=0.2)
    return GPT2LMHeadModel(config)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=LAYERS, **sizes))


@pytest.mark.parametrize("skipped", [(1,), (2, 3), (4,), (1, 3, 4)])
@pytest.mark.parametrize("kind", [gpt2, t5])
def test_layers_in_the_middle_are_left_out_exactly(kind, skipped, batch):
    model = kind()
    batch = {**batch, "labels": batch["input_ids"]}
    step = ComparativeStep(model.train(), [SkipLayers(skipped)])
    kept = [number for number in range(LAYERS) if number not in skipped]
    smaller = fewer_layers(model, batch, kept)
    torch.testing.assert_close(losses_at(step, batch, 1), smaller(**batch).loss.detach(), rtol=1e-6, atol=1e-6)
    assert not torch.isclose(losses_at(step, batch, 1), losses_at(step, batch, 0))


def test_the_gradients_are_those_of_the_full_and_the_smaller_models(batch):
    """With dropout 0 a comparison of the mean of the losses is the mean of plain losses."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_bert(num_hidden_layers=LAYERS, initializer_range=0.2, **rates).train()
    mean = step_of(model, batch, skips(2, layers=(1, 3), order="top"), objective=lambda losses: losses.mean(-1))
    model.zero_grad()
    total = model(**batch).loss
    for kept in (4, 2):
        layers = model.bert.encoder.layer
        model.bert.encoder.layer = layers[:kept]
        total = total + model(**batch).loss
        model.bert.encoder.layer = layers
    (total / 3).backward()
    assert_same(mean, ((total / 3).detach(), gradients(model)))


# How it is run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("execution", ["sequential", "low memory"])
@pytest.mark.parametrize(
    ("others", "ablated_layers"),
    [([], None), ([DROP], None), ([DROP], 2), ([DROP, CmpCrop()], None), ([DROP, CmpCrop()], 2)],
    ids=["alone", "with drops", "of the top layers", "with crops", "with both"],
)
def test_what_is_shared_gives_what_separate_forwards_give(order, execution, others, ablated_layers, model, batch):
    if len(others) > 1:
        batch["crop_segments"] = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]] * 4)
    skip = CmpSkip((1, 3), order)
    ablations = [skip, *others, skip]
    settings = {"ablated_layers": ablated_layers, **EXECUTIONS[execution]}
    ours = step_of(model, batch, ablations, **settings)
    assert ours[2]._shares_lower  # else the first batch has found a difference, and nothing was shared
    settings = {"ablated_layers": ablated_layers, "forward": "sequential"}
    assert_same(ours, step_of(model, batch, ablations, shares=False, **settings), 2e-6)
    assert untouched(model)


def test_with_the_top_layers_skipped_each_layer_runs_once(model, batch):
    step = ComparativeStep(model, skips(2, order="top"))
    step(batch)
    assert layers_called(model, lambda: step(batch).backward()) == list(range(LAYERS))
    assert layers_called(model, lambda: step.losses(batch)) == [*range(LAYERS), *range(3), *range(2)]


def test_random_layers_are_computed_from_the_first_skipped_one_on(model, batch):
    step = ComparativeStep(model, skips(2, layers=(1, 3)))
    step(batch)
    for _ in range(5):
        calls = layers_called(model, lambda: step(batch).backward())
        assert calls[:LAYERS] == list(range(LAYERS))
        assert len(calls) <= LAYERS + (LAYERS - 2) + (LAYERS - 4)


def test_a_loss_that_runs_the_model_twice(model, batch):
    def twice(model, batch):
        first, second = model(**batch), model(**{**batch, "input_ids": batch["input_ids"].flip(1)})
        return first.loss + second.loss

    for order in ORDERS:
        ablations = skips(2, layers=(1, 3), order=order)
        ours = step_of(model, batch, ablations, loss_fn=twice)
        assert ours[2]._shares_lower
        assert_same(ours, step_of(model, batch, ablations, loss_fn=twice, shares=False))


def test_two_runs_of_the_model_in_a_loss_drop_other_neurons(model, batch):
    """As SimCSE and R-Drop need it, in layers as well as outside of them."""
    step = ComparativeStep(model, [CmpDrop(), CmpSkip((1,))])

    def twice(model, batch):
        return nn.functional.cross_entropy(model(**batch).logits + model(**batch).logits, batch["labels"])

    step(batch, twice)
    step._shares_lower, masks = False, []
    site = model.bert.encoder.layer[0].output.dropout
    hook = site.register_forward_hook(lambda module, args, output: masks.append(output == 0))
    step(batch, twice)
    hook.remove()
    first, second = masks[2:4]  # of the first ablated variant
    assert first.any() and not torch.equal(first, second)


def test_layers_that_log_what_they_do_are_not_shared(caplog):
    """Router losses are collected by hooks inside of the layers, which a shared layer does not run."""
    tiny = AVAILABLE["mixtral"]
    model, batch = tiny.build(num_hidden_layers=4, output_router_logits=True).train(), tiny.batch()
    step = ComparativeStep(model, skips(1, layers=(1,)))
    for seed in range(6):
        torch.manual_seed(seed)
        step(batch).backward()
    assert not step._shares_lower
    assert "cannot be shared" in caplog.text


def test_layers_with_two_streams_of_states_are_refused():
    torch.manual_seed(0)
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=32)).train()
    ids = torch.randint(5, 40, (2, 6))
    batch = {"input_ids": ids, "perm_mask": torch.zeros(2, 6, 6), "target_mapping": torch.eye(6).repeat(2, 1, 1)}
    with pytest.raises(ValueError, match=r"cannot skip layers of transformer\.layer"):
        ComparativeStep(model, skips(1, layers=(1,)))({**batch, "labels": ids})


def test_random_skips_of_sharded_weights_are_refused(model, batch, monkeypatch):
    monkeypatch.setattr(layers, "num_processes", lambda: 2)
    monkeypatch.setattr(layers, "_is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"skip the top ones \(--cmp_skip_order top\)"):
        ComparativeStep(model, skips(2))(batch)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(order, reentrant, model, batch, caplog):
    ablations = [*skips(2, layers=(1, 3), order=order), DROP]
    expected = step_of(model, batch, ablations)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(step_of(model, batch, ablations), expected)
    assert ("use_reentrant" in caplog.text) == reentrant


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_gives_the_same_gradients(order, model, batch):
    def run(trained):
        step = ComparativeStep(trained, skips(2, layers=(1, 3), order=order))
        torch.manual_seed(3)
        step(batch)
        torch.manual_seed(1)
        model.zero_grad()
        loss = step(batch)
        loss.backward()
        assert step._shares_lower
        return loss.detach(), gradients(model)

    expected = run(model)
    assert_same(run(torch.compile(model, backend="aot_eager")), expected)


def test_a_step_with_skips_leaves_the_model_and_the_random_state_as_one_forward_does(model, batch):
    step = ComparativeStep(model, skips(2))
    step(batch)
    torch.manual_seed(3)
    step(batch).backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    step(batch).backward()
    assert torch.equal(after, torch.get_rng_state())
    step(batch).backward()
    assert not torch.equal(after, torch.get_rng_state())
    assert untouched(model)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shares", [False, True])
def test_what_is_dropped_stays_dropped_whatever_layers_are_skipped(order, shares, model, batch):
    skip, drop = CmpSkip((1, 3), order), CmpDrop()
    step = ComparativeStep(model, [drop, skip, drop, skip])  # levels (1, 0), (1, 1), (2, 1), (2, 2)
    step(batch)
    step._shares_lower = shares
    dropped, hooks = [], []
    sites = {"head": model.dropout, **dict(enumerate(one.output.dropout for one in model.bert.encoder.layer))}
    hooks.append(model.register_forward_pre_hook(lambda *_: dropped.append({})))
    for name, site in sites.items():
        hooks.append(
            site.register_forward_hook(
                lambda module, args, output, name=name: dropped[-1].update({name: (output == 0) & (args[0] != 0)})
            )
        )
    step(batch)
    for hook in hooks:
        hook.remove()
    full, *variants = dropped
    assert not any(one.any() for one in full.values())
    for before, after in itertools.pairwise(variants):
        common = before.keys() & after.keys()
        assert "head" in common
        assert all((after[name] >= before[name]).all() for name in common)
    assert torch.equal(variants[0]["head"], variants[1]["head"])
    assert (variants[2]["head"].sum() > variants[1]["head"].sum()) and variants[0][0].any()


def test_the_model_does_not_stay_cut_when_a_forward_fails(model, batch):
    step = ComparativeStep(model, skips(2))
    step(batch)
    with pytest.raises(IndexError):
        step({**batch, "input_ids": batch["input_ids"] + 1000})
    assert untouched(model)


# Settings


def test_crops_drops_and_skips_take_turns():
    names = [type(one).__name__.removeprefix("Cmp") for one in plan(6, num_crops=1, num_skips=3)]
    assert names == ["Crop", "Drop", "Skip", "Drop", "Skip", "Skip"]
    with pytest.raises(ValueError, match="1 crops and 2 skips of 2 ablations"):
        plan(2, num_crops=1, num_skips=2)


def test_the_trainer_takes_skips_from_its_arguments(tmp_path):
    model = tiny_bert(num_hidden_layers=LAYERS)
    settings = {"cmp_num_ablations": 3, "cmp_num_skips": 2, "cmp_skip_layers": [1, 3], "cmp_skip_order": "top"}
    trainer = cmp_trainer(tmp_path, model, **settings, cmp_eval_ablations=True, max_steps=2, logging_steps=1)
    trainer.train()
    assert trainer.ablations == [CmpDrop(), CmpSkip((1, 3), "top"), CmpSkip((1, 3), "top")]
    log = trainer.state.log_history[0]
    assert {"loss_full", "loss_ablated_1", "loss_ablated_2", "loss_ablated_3", "violation_rate"} <= log.keys()
    assert {"eval_loss_full", "eval_loss_ablated_3"} <= trainer.evaluate().keys()
    curve = trainer.evaluate_ablations(drops=1, seeds=[0])
    layers = curve[curve["ablation"] == "layers"]
    assert layers["level"].tolist() == [0, 1, 2, 3]
    kept = tiny_bert(num_hidden_layers=LAYERS)
    kept.load_state_dict(model.state_dict())
    kept.bert.encoder.layer = kept.bert.encoder.layer[:3]
    trainer.model, trainer.args.cmp_eval_ablations = kept, False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(layers["loss"].tolist()[2], rel=1e-6)


def test_a_curve_counts_the_layers_of_the_stack_that_is_skipped(tmp_path):
    tiny = AVAILABLE["bart"]
    data = Dataset.from_dict({name: column.tolist() for name, column in tiny.batch().items()})
    model = tiny.build(encoder_layers=4, decoder_layers=3)
    trainer = cmp_trainer(tmp_path, model, data=data, cmp_num_ablations=1, cmp_num_skips=1)
    curve = trainer.evaluate_ablations(data, drops=0, seeds=[0])
    assert curve["level"].tolist() == [0, 1]  # a third of the decoder's three layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cmp_num_skips": 3}, "--cmp_num_skips 3 is more than the 2 of --cmp_num_ablations 2 that are not crops"),
        ({"cmp_num_skips": -1}, "--cmp_num_skips -1 must be a non-negative integer"),
        ({"cmp_num_skips": 2, "cmp_skip_layers": [2, 2]}, r"--cmp_skip_layers \[2, 2\] must be increasing positive"),
        ({"cmp_num_skips": 2, "cmp_skip_layers": [0, 2]}, r"--cmp_skip_layers \[0, 2\] must be increasing positive"),
        ({"cmp_num_skips": 2, "cmp_skip_layers": [2]}, r"--cmp_skip_layers \[2\] are 1 numbers for --cmp_num_skips 2"),
        ({"cmp_num_skips": 1, "cmp_skip_order": "bottom"}, "--cmp_skip_order bottom is not a valid choice"),
    ],
)
def test_bad_settings_are_rejected(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        cmp_trainer(tmp_path, cmp_num_ablations=2, **settings)


def test_more_layers_than_there_are_cannot_be_skipped(model, batch):
    with pytest.raises(ValueError, match=r"bert.encoder.layer, the stack of Bert.*: 5 of 5 layers cannot be skipped"):
        ComparativeStep(model, skips(2, layers=(2, 5)))(batch)
    with pytest.raises(ValueError, match="2 of 2 layers cannot be skipped"):
        ComparativeStep(tiny_bert(num_hidden_layers=2), skips(2))(batch)


def test_layers_that_change_nothing_are_told(model, batch, caplog):
    identity = model.bert.encoder.layer[-1]
    identity.forward = lambda hidden_states, *args, **kwargs: hidden_states
    ComparativeStep(model, skips(1, layers=(1,), order="top"))(batch)
    assert (
        "the variants full and ablated_1 have the same losses on the first batch: the layers that CmpSkip skips"
        in (caplog.text)
    )


def test_an_ablation_that_skips_layers_and_does_more_is_rejected(model, batch):
    class Both(SkipLayers):
        def batches(self, batch, num_levels):
            return [batch] * (1 + num_levels)

    with pytest.raises(ValueError, match=r"Both skips layers and also overrides batches, .* Make two ablations"):
        ComparativeStep(model, [Both([1])])(batch)


def test_a_model_without_a_stack_is_rejected():
    step = ComparativeStep(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), skips(1, layers=(1,)))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    with pytest.raises(ValueError, match="layers are to be skipped, but no stack of layers was found in Sequential"):
        step({"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 0, 1])}, loss)


def test_the_log_says_what_is_skipped(model, batch, caplog):
    with caplog.at_level(logging.INFO):
        ComparativeStep(model, skips(2))(batch)
    assert "some of the 5 layers of bert.encoder.layer are skipped" in caplog.text

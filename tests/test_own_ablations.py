"""Ablations that users write: those of docs/howto_ablations.md, taken from the page, in the step and the trainer."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import TrainingArguments

from cmp_trainer import CmpDrop, CmpTrainer, ComparativeLoss, ComparativeStep
from cmp_trainer.ablations import Ablation
from cmp_trainer.reports.curves import plot_curves
from tests.helpers import batch_of, gradients, tiny_bert, token_data, training_arguments

PAGE = Path(__file__).parent.parent / "docs" / "howto_ablations.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
CLASSES = [block for block in BLOCKS if re.search(r"^class ", block, flags=re.M)]
CODE = "\n".join(CLASSES)
page = {}
exec(CODE, page)
HeadAblation, LayerAblation = page["HeadAblation"], page["LayerAblation"]

HEADS, LAYERS = 4, 3
KINDS = {"heads": HeadAblation, "layers": LayerAblation}
every_kind = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def model():
    """Four heads and three layers, whose weights are large enough for each to matter."""
    return tiny_bert(num_attention_heads=HEADS, num_hidden_layers=LAYERS, initializer_range=0.2).train()


@pytest.fixture
def batch():
    return batch_of(token_data())


def step_of(model, name, levels=2, **settings):
    return ComparativeStep(model, [KINDS[name]()] * levels, **settings)


def run(step, batch, seed=5):
    """Gradients of one step from a seed."""
    torch.manual_seed(seed)
    step.model.zero_grad()
    step(batch).backward()
    return gradients(step.model)


def test_the_page_shows_two_classes_of_less_than_60_lines():
    assert len(CLASSES) == 2
    assert all(block.count("\n") < 60 for block in CLASSES)


def taken_away(model, step, batch, seed=5):
    """What each forward of a step, the full model's first, takes away: (layer, head) or (layer,)."""
    run(step, batch)  # the first step makes further forwards, for its checks
    step._shares_lower = False
    forwards, hooks = [], []

    def begin(module, args, kwargs):
        forwards.append({(layer,) for layer in range(LAYERS)})

    def note(number, projection, args, output):
        forwards[-1].discard((number,))  # the layer runs
        by_head = args[0].detach().unflatten(-1, (HEADS, -1)).abs().sum((0, 1, 3))
        forwards[-1] |= {(number, head) for head in range(HEADS) if by_head[head] == 0}

    hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    for number, layer in enumerate(model.bert.encoder.layer):
        dense = layer.attention.output.dense
        hooks.append(dense.register_forward_hook(lambda *args, number=number: note(number, *args)))
    run(step, batch, seed)
    for hook in hooks:
        hook.remove()
    return forwards


@every_kind
def test_what_is_taken_away_at_a_level_is_taken_away_at_the_next(name, model, batch):
    forwards = taken_away(model, step_of(model, name, levels=3), batch)
    per_level = LAYERS if name == "heads" else 1  # a head of every layer, or a layer
    assert [len(one) for one in forwards] == [0, per_level, 2 * per_level, 3 * per_level]
    assert all(before < after for before, after in itertools.pairwise(forwards))


@every_kind
def test_steps_draw_anew(name, model, batch):
    step = step_of(model, name, levels=1)
    assert len({frozenset(taken_away(model, step, batch, seed)[1]) for seed in range(8)}) > 1
    state = torch.get_rng_state()
    step(batch)
    assert not torch.equal(torch.get_rng_state(), state)  # the next step starts from another random state


def test_a_skipped_layer_is_not_computed(model, batch):
    calls = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda *_: calls.append(1))
    step = step_of(model, "layers")
    run(step, batch)
    calls.clear()
    run(step, batch)
    assert len(calls) <= LAYERS + (LAYERS - 1) + (LAYERS - 2)  # less where the first ones are those of the full model


@every_kind
def test_the_full_variant_is_the_eval_model(name, model, batch):
    step, outputs = step_of(model, name), []
    run(step, batch)
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    run(step, batch)
    hook.remove()
    assert torch.equal(outputs[0], model.eval()(**batch).logits)
    assert not torch.equal(outputs[1], outputs[0])


def losses_by_hand(model, name, batch, levels=2, seed=5):
    """Cross entropies `(batch, 1 + levels)` of the eval model without the heads or layers, from its weights alone."""
    torch.manual_seed(seed)
    encoder, losses = model.bert.encoder, []
    whole, orders = encoder.layer, [torch.randperm(HEADS) for _ in range(LAYERS)]
    torch.manual_seed(seed)
    layer_order = torch.randperm(LAYERS).tolist()
    for level in range(1 + levels):
        weights = {}
        if name == "heads":
            for number, order in enumerate(orders):
                columns = torch.isin(torch.arange(HEADS), order[:level]).repeat_interleave(16 // HEADS)
                dense = f"bert.encoder.layer.{number}.attention.output.dense.weight"
                weights[dense] = model.get_parameter(dense) * ~columns
        else:
            encoder.layer = nn.ModuleList(whole[n] for n in range(LAYERS) if n not in layer_order[:level])
        logits = functional_call(model, weights, (), dict(batch)).logits
        losses.append(nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
        encoder.layer = whole
    return torch.stack(losses, -1)


@every_kind
@pytest.mark.parametrize("low_memory", [False, True], ids=["ordinary", "low_memory"])
def test_gradients_are_those_of_separate_forwards_by_hand(name, low_memory, model, batch):
    objective = ComparativeLoss(baseline="first")
    found = run(step_of(model, name, objective=objective, low_memory=low_memory), batch)
    model.eval().zero_grad()
    objective(losses_by_hand(model, name, batch)).mean().backward()
    torch.testing.assert_close(found, gradients(model), rtol=1e-5, atol=1e-7)


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("others", [[], [CmpDrop()]], ids=["alone", "with_drops"])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant, others, model, batch):
    ablations = [KINDS[name]()] * 2 + others
    expected = run(ComparativeStep(model, ablations), batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    rounding = {"rtol": 1e-5, "atol": 1e-7} if name == "layers" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(run(ComparativeStep(model, ablations), batch), expected, **rounding)


@pytest.mark.parametrize("arguments", ["TrainingArguments", "CmpTrainingArguments"])
def test_variants_have_their_own_names_in_logs_evaluation_and_curves(arguments, model, tmp_path):
    plain = arguments == "TrainingArguments"
    args = training_arguments(tmp_path, TrainingArguments) if plain else training_arguments(tmp_path)
    args.cmp_eval_ablations = True  # plain arguments have no such field, but are asked for it
    heads, layers, data = HeadAblation(), LayerAblation(), token_data()
    trainer = CmpTrainer(model, args, train_dataset=data, eval_dataset=data, ablations=[heads, heads, layers])
    trainer.train()
    names = {"loss_full", "loss_heads_1", "loss_heads_2", "loss_layers_1", "violation_rate"}
    assert {name for name in trainer.state.log_history[0] if "_" in name} >= names
    assert trainer.num_comparisons == 6
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in names} <= metrics.keys()
    assert metrics["eval_loss_full"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    curve = trainer.evaluate_ablations(seeds=[0, 1])
    assert list(curve["ablation"].unique()) == ["heads", "layers"]
    assert curve.groupby("ablation")["level"].max().to_dict() == {"heads": 2, "layers": 1}
    full = curve[curve["level"] == 0]["loss"]
    assert full.tolist() == pytest.approx([metrics["eval_loss"]] * 4, rel=1e-5)


def test_the_curve_of_an_own_ablation_is_drawn(model, tmp_path):
    pytest.importorskip("matplotlib")
    args = training_arguments(tmp_path, TrainingArguments)
    trainer = CmpTrainer(model, args, eval_dataset=token_data(), ablations=[HeadAblation(), CmpDrop()])
    axes = plot_curves(trainer.evaluate_ablations(seeds=[0])).axes  # loss and violations of heads, then of drops
    assert [one.get_xlabel() for one in axes[::2]] == [
        "level of heads (0: full model)",
        "cumulative drops k (0: full model)",
    ]


def state_of(model):
    """All that a step could change: attributes and hooks of every module, modes, weights, the random state."""
    modules = {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }
    return modules, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, weights = state_of(model)
    assert modules == before[0]
    torch.testing.assert_close(weights, before[1], rtol=0, atol=0)


@every_kind
def test_a_step_leaves_nothing_on_the_model(name, model, batch):
    before = state_of(model)
    run(step_of(model, name), batch)
    model.zero_grad()
    assert_unchanged(model, before)


@every_kind
@pytest.mark.parametrize("variant", [0, 1, 2])
def test_a_forward_that_raises_leaves_nothing_on_the_model(name, variant, model, batch):
    calls = []

    def loss_fn(model, batch):
        loss = model(**batch).loss
        calls.append(1)
        if len(calls) > variant and raises:
            raise RuntimeError("out of memory")
        return loss

    raises, step = False, step_of(model, name)
    step(batch, loss_fn)
    calls.clear()
    raises, before, state = True, state_of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        step(batch, loss_fn)
    assert len(calls) == variant + 1
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_set_on_a_layer_is_put_back(model, batch):
    layer = model.bert.encoder.layer[0]
    layer.forward = own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    run(step_of(model, "layers", levels=3), batch)
    assert layer.forward is own


def test_an_ablation_that_takes_nothing_away_is_rejected(model, batch):
    class Nothing(Ablation):
        name = "nothing"

    with pytest.raises(ValueError, match=r"full and nothing_1 .* Nothing takes nothing away at level 1"):
        ComparativeStep(model, [Nothing()])(batch)


def test_a_level_past_what_the_model_has_is_rejected(model, batch, tmp_path):
    with pytest.raises(ValueError, match=r"heads_4 and heads_5 .* HeadAblation takes nothing away at level 5"):
        step_of(model, "heads", levels=5)(batch)
    args = training_arguments(tmp_path, TrainingArguments)
    trainer = CmpTrainer(model, args, train_dataset=token_data(), ablations=[LayerAblation(), *[CmpDrop()] * 2])
    trainer.train()
    layers = LayerAblation()
    trainer = CmpTrainer(model, args, train_dataset=token_data(), ablations=[layers] * 4)
    with pytest.raises(
        ValueError, match=r"LayerAblation skips .* at level 4, after \[0, 1, 2\]; expected more of them"
    ):
        trainer.train()


def test_two_kinds_of_the_same_name_are_rejected(model):
    with pytest.raises(ValueError, match=r"2 ablations are named 'heads'; pass one object"):
        ComparativeStep(model, [HeadAblation(), HeadAblation()])


def test_the_model_card_names_own_ablations_and_an_own_objective(model, tmp_path):
    def worst(losses):
        return losses.amax(-1)

    heads, args = HeadAblation(), training_arguments(tmp_path, TrainingArguments)
    trainer = CmpTrainer(model, args, eval_dataset=token_data(), ablations=[heads, heads, CmpDrop()], objective=worst)
    trainer.evaluate_ablations(seeds=[0])
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "3 ablated versions of itself (2 by ablation of heads, 1 by dropout of hidden neurons)" in text
    assert "the objective `worst` was minimized" in text
    assert "| heads | 2 |" in text
    assert "--cmp_" not in text

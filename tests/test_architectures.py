"""CmpDrop on the architectures of transformers: tiny models of more than a hundred types, eager and sdpa."""

import copy
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments

from cmp_trainer import CmpTrainer
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.execution.ablated import Ablated
from tests.helpers import training_arguments
from tests.tiny_models import AVAILABLE, SWITCH, TINY_MODELS

every_model_type = pytest.mark.parametrize("tiny", AVAILABLE.values(), ids=AVAILABLE)


def test_the_matrix_covers_text_vision_and_speech_as_encoders_decoders_and_both():
    assert len(AVAILABLE) >= 100
    assert {tiny.kind for tiny in AVAILABLE.values()} == {tiny.kind for tiny in TINY_MODELS}
    assert {tiny.kind for tiny in TINY_MODELS} == {
        "text encoder",
        "text decoder",
        "text encoder-decoder",
        "image encoder",
        "image and text decoder",
        "video encoder",
        "speech encoder",
        "speech encoder-decoder",
    }


def test_the_table_in_the_documentation_lists_the_matrix():
    page = Path(__file__).parent.parent / "docs" / "compatibility.md"
    kinds = {tiny.kind: [other.model_type for other in TINY_MODELS if other.kind == tiny.kind] for tiny in TINY_MODELS}
    for kind, model_types in kinds.items():
        assert f"| {kind} ({len(model_types)}) | {', '.join(sorted(model_types))} |\n" in page.read_text()


def test_every_test_that_the_documentation_names_is_there():
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "compatibility.md").read_text()
    named = re.findall(r"((?:cuda/)?test_\w+\.py)::(test_\w+)", page)
    assert len(named) > 20
    for file, name in named:
        assert f"def {name}(" in (tests / file).read_text(), f"{file}::{name}"


@every_model_type
def test_the_full_variant_is_the_eval_model(tiny):
    batch = tiny.batch()
    for model in tiny.builds():
        with torch.no_grad():
            expected = model.eval()(**batch)
            dropped = model.train()(**batch)
            with Ablated([CmpDrop()], [0]):
                full = model(**batch)
        torch.testing.assert_close(full.logits, expected.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(full.loss, expected.loss, rtol=1e-6, atol=1e-6)
        assert not torch.equal(dropped.logits, expected.logits)  # else the claim would be empty


@every_model_type
def test_what_k_drops_ablate_stays_ablated_after_more(tiny):
    batch = tiny.batch()
    for model in tiny.builds():
        kept = [kept_neurons(model, batch, drops) for drops in range(4)]
        for fewer_drops, more_drops in itertools.pairwise(kept):
            for before, after in zip(fewer_drops, more_drops, strict=True):
                assert not (after & ~before).any()
        counts = [sum(site.sum() for site in sites) for sites in kept]
        assert counts[0] > counts[1] > counts[3]


def test_dropout_inside_of_routed_experts_meets_other_tokens_in_every_variant():
    kept = [kept_neurons(SWITCH.build(), SWITCH.batch(), drops) for drops in (1, 2)]
    assert [site.shape for site in kept[0]] != [site.shape for site in kept[1]]


@every_model_type
def test_a_step_gives_finite_gradients_for_the_parameters_that_the_trainer_trains(tiny, arguments):
    plain_arguments, cmp_arguments = arguments
    batch = tiny.batch()
    for model in tiny.builds():
        plain = gradients(Trainer(copy.deepcopy(model), plain_arguments), batch)
        compared = gradients(CmpTrainer(model, cmp_arguments), batch)
        assert compared.keys() == plain.keys()
        assert all(gradient.isfinite().all() for gradient in compared.values())
        assert any(gradient.any() for gradient in compared.values())


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    plain = training_arguments(folder, TrainingArguments)
    return plain, training_arguments(folder, cmp_num_ablations=2, cmp_dropout=0.1)


def gradients(trainer, batch):
    """Name and gradient of what one training step has trained."""
    trainer.current_gradient_accumulation_steps = 1
    _, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.training_step(trainer.model, dict(batch), num_items)
    return {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


def kept_neurons(model, batch, drops):
    """What each dropout site of a forward keeps after so many drops of rate 0.3, from one random state."""
    torch.manual_seed(0)
    with torch.no_grad(), KeptNeurons() as sites, Ablated([CmpDrop(base_rate=0.3)], [drops]):
        model.train()(**batch)
    return sites.kept


class KeptNeurons(TorchFunctionMode):
    """Notes at each dropout call which elements it keeps; to be entered around the ablation, whose rates it then sees.

    The call is made a second time from the same random state on inputs that show the mask: ones, or, for attention,
    values that are the identity, so that the output is the attention weights.
    """

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        show = {
            F.dropout: _ones_through,
            F.dropout1d: _ones_through,
            F.dropout2d: _ones_through,
            torch.dropout: _ones_through,
            F.scaled_dot_product_attention: _attention_weights,
            F.multi_head_attention_forward: _multi_head_weights,
        }.get(func)
        if show is not None:
            before = torch.get_rng_state()
            self.kept.append(show(func, args, kwargs) != 0)
            torch.set_rng_state(before)
        return func(*args, **kwargs)


def _ones_through(func, args, kwargs):
    bound = inspect.signature(F.dropout).bind(*args, **kwargs)
    bound.arguments["input"] = torch.ones_like(bound.arguments["input"])
    return func(*bound.args, **bound.kwargs)


def _attention_weights(func, args, kwargs):
    query, key, value, *others = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
    others_by_name = {name: other for name, other in kwargs.items() if name not in ("query", "key", "value")}
    identity = torch.eye(key.shape[-2]).expand(*value.shape[:-1], -1)
    return func(query, key, identity, *others, **others_by_name)


def _multi_head_weights(func, args, kwargs):
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.arguments.update(need_weights=True, average_attn_weights=False)
    return func(*bound.args, **bound.kwargs)[1]

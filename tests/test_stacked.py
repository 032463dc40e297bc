"""Stacked forwards compute what single ones do, and are refused where they cannot."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from cmp_trainer import ComparativeStep, RegularizedLoss, plan
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.execution import stacked, stacking
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.stacked import CannotStack, StackedDrop
from cmp_trainer.execution.stacking import prefer_stacked
from tests.helpers import SMALL, batch_of, cmp_trainer, gradients, tiny_bert, token_data

ROWS = torch.ones(3, 5, 40)


def stacked_drop(levels):
    """The context of a stacked forward."""
    return Ablated([StackedDrop(CmpDrop(), levels)], [0])


def drops_of(level):
    """The context of a forward of one group."""
    return Ablated([CmpDrop()], [level])


QUERY, IDENTITY = torch.zeros(3, 2, 6, 4), torch.eye(6).expand(3, 2, 6, 6)


def tiny_bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForSequenceClassification(BartConfig(vocab_size=40, **sizes, **heads, num_labels=3, eos_token_id=2))


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, decoder_start_token_id=0))


def eos_batch():
    batch = batch_of(token_data())
    batch["input_ids"][:, -1] = 2
    return batch


def text_batch():
    batch = batch_of(token_data())
    return {**batch, "labels": batch["input_ids"]}


def permuted(rows):
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


CALLS = {
    "plain": F.dropout,
    "torch's own": lambda rows, p: torch.dropout(rows, p, True),
    "by keywords": lambda rows, p: F.dropout(rows, training=True, p=p),
    "in eval mode": lambda rows, p: F.dropout(rows, p, training=False),
    "whole channels": lambda rows, p: F.dropout1d(rows, p),
    "rows in another memory order": lambda rows, p: F.dropout(permuted(rows), p),
}


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_every_group_gets_the_masks_of_a_forward_of_its_own(call, dtype, p):
    rows = ROWS.to(dtype)
    torch.manual_seed(3)
    with stacked_drop([0, 1, 3]):
        groups = CALLS[call](torch.cat([rows] * 3), p).chunk(3)
    state_after = torch.get_rng_state()
    for drops, group in zip([0, 1, 3], groups, strict=True):
        torch.manual_seed(3)
        with drops_of(drops):
            assert torch.equal(CALLS[call](rows, p), group)
    assert torch.equal(torch.get_rng_state(), state_after)


def test_the_masks_are_the_same_where_another_library_draws_them(monkeypatch):
    """On processors of Intel MKL does: each group is then dropped by the call itself."""
    monkeypatch.setattr(torch, "dropout", lambda rows, p, training: rows * (torch.rand_like(rows) > p))
    stacked._kernel_draws_doubles.cache_clear()
    assert not stacked._kernel_draws_doubles()
    monkeypatch.undo()
    stacked._kernel_draws_doubles.cache_clear()
    monkeypatch.setattr(stacked, "_kernel_draws_doubles", lambda: False)
    monkeypatch.setattr(stacked, "_drop_groups_at_once", lambda *args: pytest.fail("drawn at once"))
    test_every_group_gets_the_masks_of_a_forward_of_its_own("plain", torch.float32, 0.1)


def test_the_rows_of_the_full_model_get_no_mask():
    rows, kept = ROWS.clone().requires_grad_(), []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None)
    with watch, stacked_drop([0, 1, 2]):
        F.dropout(torch.cat([rows] * 3), 0.4)
    assert sum(kept) == 2 * ROWS.numel()


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 6, 6), torch.randn(3, 1, 6, 6)], ids=["no", "shared", "own"])
def test_attention_gets_them_too_with_any_mask(mask):
    def attend(query, key, value, attn_mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=0.4)

    stacked_mask = torch.cat([mask] * 2) if mask is not None and len(mask) > 1 else mask
    torch.manual_seed(3)
    with stacked_drop([0, 2]):
        groups = attend(*(torch.cat([t] * 2) for t in (QUERY, QUERY, IDENTITY)), stacked_mask).chunk(2)
    for drops, group in zip([0, 2], groups, strict=True):
        torch.manual_seed(3)
        with drops_of(drops):
            torch.testing.assert_close(attend(QUERY, QUERY, IDENTITY, mask), group)


def test_attention_called_by_keywords_gets_them_too():
    query, key, value = torch.randn(3, 6, 2, 5, 4).unbind()
    torch.manual_seed(0)
    with stacked_drop([1, 2]):
        named = F.scaled_dot_product_attention(query=query, key=key, value=value, dropout_p=0.3)
    torch.manual_seed(0)
    with stacked_drop([1, 2]):
        torch.testing.assert_close(named, F.scaled_dot_product_attention(query, key, value, dropout_p=0.3))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize(
    ("make_model", "make_batch"),
    [(tiny_bert, lambda: batch_of(token_data())), (tiny_bart, eos_batch), (tiny_t5, text_batch)],
    ids=["bert", "bart", "t5"],
)
def test_losses_and_gradients_are_those_of_single_forwards(make_model, make_batch, checkpointing, tmp_path):
    found = []
    for forward in ("sequential", "stacked"):
        model = make_model()
        trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=2, cmp_forward=forward)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        loss = trainer.compute_loss(model.train(), make_batch())
        assert (trainer.comparative_step()._stacking is not None) == (forward == "stacked")
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_outputs_of_a_stacked_step_are_those_of_the_full_model(tmp_path):
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2, cmp_forward="stacked")
    batch = batch_of(token_data())
    _, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    torch.testing.assert_close(outputs.logits, trainer.model.eval()(**batch).logits)


def bert_with_batch_norm():
    model = tiny_bert()
    model.classifier = nn.Sequential(nn.BatchNorm1d(16), model.classifier)
    return model


def test_a_model_whose_rows_depend_on_each_other_is_run_variant_by_variant(tmp_path):
    trainer = cmp_trainer(tmp_path, bert_with_batch_norm(), cmp_num_ablations=2)
    trainer.compute_loss(trainer.model.train(), batch_of(token_data()))
    assert trainer.comparative_step()._stacking is None


def test_a_dropout_of_other_rows_is_found_also_where_it_hardly_moves_the_loss(tmp_path):
    """DeBERTa drops its table of relative positions, whose rows are as many as two groups of a batch could be."""
    torch.manual_seed(0)
    relative = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 16}
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**SMALL, **relative, num_labels=3))
    model.classifier.weight.data *= 0.1
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=1)
    trainer.compute_loss(model.train(), batch_of(token_data()))
    assert trainer.comparative_step()._stacking is None


class NestedInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = tiny_bert()

    def forward(self, text, labels=None):
        return self.bert(**text, labels=labels)


class NamedOutputs(nn.Module):
    Outputs = namedtuple("Outputs", ["loss", "logits"])

    def __init__(self):
        super().__init__()
        self.bert = tiny_bert()

    def forward(self, input_ids, attention_mask, labels=None):
        outputs = self.bert(input_ids, attention_mask, labels=labels)
        return self.Outputs(outputs.loss, outputs.logits)


def test_outputs_in_a_named_tuple_are_stacked_too(tmp_path):
    losses = []
    for forward in ("sequential", "stacked"):
        trainer = cmp_trainer(tmp_path, NamedOutputs(), cmp_num_ablations=1, cmp_forward=forward)
        torch.manual_seed(5)
        losses.append(trainer.compute_loss(trainer.model.train(), batch_of(token_data())))
    torch.testing.assert_close(*losses)


def test_a_model_that_cannot_be_stacked_at_all_is_run_variant_by_variant(tmp_path):
    batch, model = batch_of(token_data()), NestedInputs()
    batch = {"labels": batch.pop("labels"), "text": batch}
    trainer = cmp_trainer(tmp_path, model, cmp_num_ablations=1)
    assert trainer.compute_loss(model.train(), batch) > 0
    assert trainer.comparative_step()._stacking is None


def test_of_several_processes_none_stacks_by_itself(tmp_path, monkeypatch):
    """Their batches differ in size, and all of them have to do equally many forwards."""
    monkeypatch.setattr(stacking, "num_processes", lambda: 2)
    trainer = cmp_trainer(tmp_path, cmp_num_ablations=2)
    trainer.compute_loss(trainer.model.train(), batch_of(token_data()))
    assert trainer.comparative_step()._stacking is None


def test_and_refused_where_stacking_was_asked_for(tmp_path):
    trainer = cmp_trainer(tmp_path, bert_with_batch_norm(), cmp_num_ablations=2, cmp_forward="stacked")
    with pytest.raises(ValueError, match=r"--cmp_forward stacked .* model: classifier\.0 is a batch norm"):
        trainer.compute_loss(trainer.model.train(), batch_of(token_data()))


def test_time_major_layers_are_refused():
    layer = nn.MultiheadAttention(40, 2, dropout=0.5)
    with pytest.raises(CannotStack, match="multi_head_attention_forward drops"), stacked_drop([0, 1]):
        layer(ROWS, ROWS, ROWS)


def test_auto_stacks_small_batches_on_the_cpu_only():
    small, large = torch.ones(4, 64, dtype=torch.long), torch.ones(32, 128, dtype=torch.long)
    assert prefer_stacked({"input_ids": small}, "auto")
    assert not prefer_stacked({"input_ids": large}, "auto")
    assert not prefer_stacked({"input_ids": small.to("meta")}, "auto")  # not measured there
    assert prefer_stacked({"input_ids": large}, "stacked")
    assert not prefer_stacked({"input_ids": small}, "sequential")


def test_dropout_in_place_is_not_stacked():
    with pytest.raises(CannotStack, match="dropout drops in place"), stacked_drop([0, 1, 2]):
        F.dropout(ROWS.clone(), 0.1, inplace=True)


def test_an_attention_mask_of_as_many_columns_as_rows_is_not_split():
    query, mask = torch.randn(6, 2, 6, 4), torch.zeros(6, 6)  # two groups of three rows, and six tokens
    with stacked_drop([1, 2]):
        found = F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.3)
    assert found.shape == query.shape


class SilentLora(nn.Module):
    """A frozen layer whose trained part moves no loss yet, with dropout over the time-major dimension."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.embed(input_ids).transpose(0, 1)  # (length, batch, 8)
        hidden = hidden + self.up(self.down(F.dropout(hidden, 0.3, self.training)))
        logits = self.head(hidden.mean(0))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_dropout_of_other_rows_is_found_also_where_it_moves_no_loss_yet(tmp_path):
    trainer = cmp_trainer(tmp_path, SilentLora(), cmp_num_ablations=1)
    trainer.compute_loss(trainer.model.train(), batch_of(token_data()))
    assert trainer.comparative_step()._stacking is None


@pytest.mark.parametrize("part", ["weights", "outputs"])
def test_a_part_of_the_loss_that_appears_later_and_belongs_to_no_example_ends_stacking(part, caplog):
    """A norm is no reduction that is followed. That of the stacked outputs would be that of all variants together."""
    later = []

    def loss_fn(model, batch):
        outputs = model(**batch)
        of = {"weights": model.classifier.weight, "outputs": outputs.logits}[part]
        return outputs.loss + of.norm() if later else outputs.loss

    loss_fn.stackable = True
    model, batch = tiny_bert().train(), batch_of(token_data())
    step = ComparativeStep(model, plan(2), RegularizedLoss(primary="full", weight=0.0), forward="stacked")
    step(batch, loss_fn).backward()
    assert "no example" not in caplog.text
    later.append(True)
    model.zero_grad()
    loss = step(batch, loss_fn)
    loss.backward()
    found = gradients(model)
    assert caplog.text.count("From here on the variants run one after the other") == 1
    model.zero_grad()
    with drops_of(0):
        expected = loss_fn(model, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(model))
    step(batch, loss_fn).backward()
    assert caplog.text.count("From here on") == 1

"""CmpCrop: what a crop keeps, where everything moves, and what is rejected."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertLMHeadModel,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerForQuestionAnswering,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5ForTokenClassification,
)

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.ablations.crop import CmpCrop, nested_keeps, removed_tokens, shifts_labels
from cmp_trainer.ablations.crop_checks import check_croppable
from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.ablations.crop_columns import crop_batch
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.segments import crop_segments_from_sequence_ids, crop_segments_from_spans
from tests.helpers import operations_counted, waits

FIRST_ID = 100  # token t of an example has the id FIRST_ID + t, so a token can be told after it moved
fast = settings(deadline=None, max_examples=60)


@st.composite
def batches(draw, max_batch=4, max_length=16, padding_side="right"):
    """A padded batch with segments, labels, an answer span and a feature per token; each example keeps a token."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_batch))
    width = max(lengths)
    rows = [example_row(draw, length, width, padding_side) for length in lengths]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return batch | {"features": torch.stack([batch["input_ids"]] * 3, dim=2).float(), "weights": torch.rand(len(rows))}


def example_row(draw, length, width, padding_side):
    segments = draw(st.lists(st.integers(0, 6), min_size=length, max_size=length))
    segments[draw(st.integers(0, length - 1))] = 0
    # An answer: a stretch without removable tokens.
    kept = [t for t in range(length) if segments[t] == 0]
    start = end = draw(st.sampled_from(kept))
    while end + 1 < length and segments[end + 1] == 0 and draw(st.booleans()):
        end += 1
    ids = list(range(FIRST_ID, FIRST_ID + length))
    labels = [
        one if segment == 0 and draw(st.booleans()) else -100 for one, segment in zip(ids, segments, strict=True)
    ]

    def pad(values, value):
        padding = [value] * (width - length)
        return padding + values if padding_side == "left" else values + padding

    shift = width - length if padding_side == "left" else 0
    return {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([1] * length, 0),
        "crop_segments": pad(segments, 0),
        "labels": pad(labels, -100),
        "start_positions": start + shift,
        "end_positions": end + shift,
    }


any_batch = st.one_of(batches(padding_side="right"), batches(padding_side="left"))
any_order = st.sampled_from(["random", "prefix"])


def crops_of(batch, num_crops=3, order="random", seed=0, **options):
    torch.manual_seed(seed)
    return CmpCrop(order, pad_values={"input_ids": 0}, **options).batches(batch, num_crops)


def tokens(batch, example):
    return batch["input_ids"][example][batch["attention_mask"][example].bool()].tolist()


# --- which segments stay ---


@fast
@given(any_batch, st.integers(1, 5), any_order)
def test_a_crop_keeps_a_subset_of_the_crop_before(batch, num_crops, order):
    keeps = nested_keeps(batch["crop_segments"], num_crops, order)
    assert keeps.shape == (1 + num_crops, *batch["crop_segments"].shape)
    assert keeps[0].all()
    assert (keeps[1:] <= keeps[:-1]).all()


@fast
@given(any_batch, st.integers(1, 5), any_order)
def test_each_crop_keeps_fewer_segments_while_any_are_left(batch, num_crops, order):
    segments = batch["crop_segments"]
    for keep_by_crop, row in zip(nested_keeps(segments, num_crops, order).transpose(0, 1), segments, strict=True):
        counts = [len(set(row[keep].tolist()) - {0}) for keep in keep_by_crop]
        assert counts[0] == len(set(row.tolist()) - {0})
        assert all(later < earlier or later == earlier == 0 for earlier, later in pairwise(counts))


@fast
@given(any_batch, st.integers(1, 3), any_order)
def test_a_segment_stays_or_goes_as_a_whole_and_segment_0_always_stays(batch, num_crops, order):
    segments = batch["crop_segments"]
    for keep in nested_keeps(segments, num_crops, order):
        for row, kept in zip(segments, keep, strict=True):
            for segment in row.unique():
                assert len(kept[row == segment].unique()) == 1
            assert kept[row == 0].all()


@fast
@given(any_batch, st.integers(1, 3))
def test_prefix_order_keeps_the_first_segments(batch, num_crops):
    segments = batch["crop_segments"]
    for keep in nested_keeps(segments, num_crops, "prefix"):
        for row, kept in zip(segments, keep, strict=True):
            stay, go = row[kept], row[~kept]
            assert not len(go) or stay.max() < go.min()


def test_every_number_of_kept_segments_is_equally_likely():
    torch.manual_seed(0)
    segments = torch.arange(5).expand(8000, 5)
    counts = nested_keeps(segments, 1)[1].sum(dim=1) - 1
    assert_close(counts.bincount() / 8000, torch.full((4,), 0.25), atol=0.02, rtol=0)


def test_every_segment_is_equally_likely_to_be_kept():
    torch.manual_seed(0)
    segments = torch.arange(5).expand(8000, 5)
    kept = nested_keeps(segments, 1)[1].float().mean(dim=0)
    assert_close(kept, torch.tensor([1.0, 0.375, 0.375, 0.375, 0.375]), atol=0.02, rtol=0)


def test_segment_numbers_may_have_gaps_and_be_large():
    keeps = nested_keeps(torch.tensor([[0, 7, 7, 900_000, 0]]), 2, "prefix")
    assert keeps.sum(dim=2).flatten().tolist()[0] == 5
    assert keeps[2, 0].tolist() == [True, False, False, False, True]
    assert not keeps[:, 0, 3][1:].any()


def test_crops_beyond_the_last_segment_keep_none():
    keeps = nested_keeps(torch.tensor([[0, 1], [0, 0]]), 40)
    assert (keeps[1:] == torch.tensor([[True, False], [True, True]])).all()


@fast
@given(any_batch, st.integers(0, 3))
def test_the_same_seed_draws_the_same_crops(batch, seed):
    for one, other in zip(crops_of(batch, seed=seed), crops_of(batch, seed=seed), strict=True):
        assert_close(one, other, rtol=0, atol=0)


def test_an_examples_crops_do_not_depend_on_the_other_examples():
    torch.manual_seed(0)
    segments = torch.randint(0, 6, (4, 20))
    others = torch.randint(0, 9, (4, 20))
    others[2] = segments[2]
    torch.manual_seed(1)
    keeps = nested_keeps(segments, 3)
    torch.manual_seed(1)
    assert (nested_keeps(others, 3)[:, 2] == keeps[:, 2]).all()


# --- where everything moves ---


@fast
@given(any_batch, any_order)
def test_a_cropped_row_holds_its_kept_tokens_in_order(batch, order):
    torch.manual_seed(3)
    keeps = nested_keeps(batch["crop_segments"], 3, order)
    for keep, crop in zip(keeps, crops_of(batch, 3, order, seed=3), strict=True):
        for example in range(len(keep)):
            kept = keep[example] & batch["attention_mask"][example].bool()
            assert tokens(crop, example) == batch["input_ids"][example][kept].tolist()


@fast
@given(any_batch)
def test_an_answer_is_never_cut_and_its_positions_follow_it(batch):
    def answers(of):
        starts, ends = of["start_positions"].tolist(), of["end_positions"].tolist()
        return [ids[a : b + 1].tolist() for ids, a, b in zip(of["input_ids"], starts, ends, strict=True)]

    expected = answers(batch)
    assert all(answers(crop) == expected for crop in crops_of(batch))


@fast
@given(any_batch)
def test_labels_and_features_still_lie_on_their_tokens(batch):
    labelled = [sorted(row[row != -100].tolist()) for row in batch["labels"]]
    for crop in crops_of(batch)[1:]:
        on_label = crop["labels"] != -100
        assert (crop["labels"][on_label] == crop["input_ids"][on_label]).all()
        assert [sorted(row[row != -100].tolist()) for row in crop["labels"]] == labelled
        assert (crop["features"] == crop["input_ids"].unsqueeze(2)).all()


@fast
@given(any_batch, any_order)
def test_a_row_with_nothing_to_remove_equals_the_full_one(batch, order):
    batch["crop_segments"][0] = 0
    for crop in crops_of(batch, 3, order):
        assert tokens(crop, 0) == tokens(batch, 0)
        length, full = crop["input_ids"].size(1), batch["input_ids"].size(1)
        shift = full - length if (batch["attention_mask"][:, 0] == 0).any() else 0
        kept = slice(shift, shift + length)
        for name in ("input_ids", "labels", "features"):
            assert_close(crop[name][0], batch[name][0, kept])
        assert crop["start_positions"][0] == batch["start_positions"][0] - shift


@fast
@given(any_batch)
def test_without_crops_the_batch_is_unchanged(batch):
    (full,) = CmpCrop().batches(batch, num_levels=0)
    assert "crop_segments" not in full
    assert all(full[name] is batch[name] for name in full)
    assert set(full) | {"crop_segments"} == set(batch)


@fast
@given(any_batch)
def test_level_0_has_the_same_tensors_as_the_batch(batch):
    before = {name: value.clone() for name, value in batch.items()}
    full = crops_of(batch)[0]
    assert all(full[name] is batch[name] for name in full)
    assert_close(batch, before)


@fast
@given(any_batch)
def test_keeping_all_tokens_twice_changes_nothing_more(batch):
    inputs = {name: value for name, value in batch.items() if name != "crop_segments"}
    all_true = torch.ones_like(batch["crop_segments"], dtype=torch.bool)
    once = crop_batch(inputs, all_true, {"input_ids": 0})
    still_true = torch.ones_like(once["attention_mask"], dtype=torch.bool)
    assert_close(crop_batch(once, still_true, {"input_ids": 0}), once)


@fast
@given(any_batch, st.integers(1, 8))
def test_a_crop_is_as_long_as_its_longest_row_rounded_up_to_the_multiple(batch, multiple):
    full_length = batch["input_ids"].size(1)
    for crop in crops_of(batch, pad_to_multiple_of=multiple)[1:]:
        longest = crop["attention_mask"].sum(dim=1).max()
        length = crop["input_ids"].size(1)
        assert longest <= length < longest + multiple
        assert length % multiple == 0 or length == full_length


def test_left_padded_batches_stay_left_padded():
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
        "crop_segments": torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]]),
    }
    crop = crops_of(batch, 1)[1]
    assert crop["input_ids"].tolist() == [[1, 3, 4], [0, 0, 6]]


def test_a_given_padding_side_is_used_when_the_batch_has_no_padding():
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    batch["crop_segments"] = torch.tensor([[0, 0, 0], [0, 1, 0]])
    assert crops_of(batch, 1, padding_side="left")[1]["input_ids"].tolist() == [[1, 2, 3], [0, 4, 6]]
    assert crops_of(batch, 1)[1]["input_ids"].tolist() == [[1, 2, 3], [4, 6, 0]]


def test_position_ids_count_as_if_the_removed_text_had_never_been_there():
    ids = torch.tensor([[2, 3, 4, 5, 6, 0, 1, 2]])  # two runs: 2 … 6 and 0 … 2
    batch = {"input_ids": ids, "position_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["crop_segments"] = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0]])
    crop = crops_of(batch, 1)[1]
    assert crop["input_ids"].tolist() == [[2, 5, 6, 0, 2]]
    assert crop["position_ids"].tolist() == [[2, 3, 4, 0, 1]]


@pytest.mark.parametrize("position", [4, 9, -100, -1])
def test_positions_outside_the_row_stay_ignored(position):
    batch = small_batch() | {"start_positions": torch.tensor([position]), "end_positions": torch.tensor([position])}
    crop = crops_of(batch, 1)[1]
    assert crop["start_positions"].tolist() == crop["end_positions"].tolist() == [position]


def test_decoder_columns_and_multi_label_targets_are_not_cropped_even_if_their_shape_fits():
    batch = small_batch() | {
        "decoder_input_ids": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.tensor([[1.0, 0.0, 1.0, 0.0]]),
        "scores": torch.ones(1, 4),
        "texts": ["as it was"],
    }
    crop = crops_of(batch, 1, per_example=("scores",))[1]
    assert all(crop[name] is batch[name] for name in ("decoder_input_ids", "labels", "scores", "texts"))


def small_batch():
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1]]),
        "crop_segments": torch.tensor([[0, 1, 2, 0]]),
    }


# --- labels of causal language models: position i predicts label i + 1 ---


def predicted_labels(batch):
    """The labels of each row that a causal language model predicts: all but column 0."""
    return [row[row != -100].tolist() for row in batch["labels"][:, 1:]]


def loses_its_first_label(batch):
    """(batch,) bool: the first token that stays has a label, and removable tokens before it."""
    lost = []
    for segments, mask, labels in zip(batch["crop_segments"], batch["attention_mask"], batch["labels"], strict=True):
        staying = [t for t in range(len(mask)) if mask[t] and segments[t] == 0]
        lost.append(bool(labels[staying[0]] != -100 and segments[: staying[0]].any()))
    return torch.tensor(lost)


@settings(deadline=None, max_examples=200)
@given(any_batch, any_order, st.integers(1, 4))
def test_a_causal_model_predicts_the_same_labels_in_every_crop(batch, order, multiple):
    lost = loses_its_first_label(batch)
    batch["labels"][lost] = -100
    for crop in crops_of(batch, 3, order, shifts_labels=True, pad_to_multiple_of=multiple):
        assert predicted_labels(crop) == predicted_labels(batch)


@settings(deadline=None, max_examples=200)
@given(any_batch)
def test_a_row_whose_first_label_could_be_lost_is_rejected_and_no_other(batch):
    lost = loses_its_first_label(batch)
    crops_of(batch)  # no label is lost where labels are not shifted
    if lost.any():
        with pytest.raises(ValueError, match=f"Example {lost.int().argmax()} .* first token that stays is predicted"):
            crops_of(batch, shifts_labels=True)
    else:
        crops_of(batch, shifts_labels=True)


@pytest.mark.parametrize("fix", [{"crop_segments": [[0, 1, 0, 0]]}, {"labels": [[-100, -100, -100, 8]]}])
def test_the_message_about_the_first_label_names_fixes_that_work(fix):
    batch = small_batch() | {
        "crop_segments": torch.tensor([[1, 1, 0, 0]]),
        "labels": torch.tensor([[-100] * 2 + [7, 8]]),
    }
    with pytest.raises(ValueError, match="set crop_segments to 0 for a token before it, or this label to -100"):
        crops_of(batch, 1, shifts_labels=True)
    crops_of(batch | {name: torch.tensor(rows) for name, rows in fix.items()}, 1, shifts_labels=True)


def test_a_label_in_mid_row_is_predicted_from_the_last_token_before_it_that_stays():
    batch = small_batch() | {"labels": torch.tensor([[-100, -100, -100, 8]])}
    crop = crops_of(batch, 1, "prefix", seed=1, shifts_labels=True)[1]
    assert crop["input_ids"][0, -1] == crop["labels"][0, -1] == 8
    assert len(crop["labels"][0]) < 4


def test_under_left_padding_no_label_is_gained_or_lost():
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
    batch["crop_segments"] = torch.tensor([[0, 0, 1], [0, 0, 0]])
    batch["labels"][0, 2] = -100
    crop = crops_of(batch, 1, shifts_labels=True)[1]
    assert crop["input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
    assert crop["attention_mask"].tolist() == [[0, 1, 1], [0, 1, 1]]
    assert crop["labels"].tolist() == [[-100, -100, 6], [-100, 8, 9]]


def test_shift_labels_are_padded_with_minus_100_and_stay_on_their_tokens():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["crop_segments"] = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    batch["shift_labels"] = torch.tensor([[0, -100, -100, 9], [0, 1, 2, -100]])
    crop = crops_of(batch, 1, "prefix", shifts_labels=True)[1]
    assert crop["shift_labels"].tolist() == [[0, 9, -100], [0, 1, 2]]


@pytest.mark.parametrize("column", ["labels", "shift_labels"])
def test_the_collator_pads_token_labels_with_minus_100(column):
    features = [
        {name: row[name] for name in ("input_ids", "attention_mask", "crop_segments")} for row in features_of(3, 1)
    ]
    features = [row | {column: [0] * len(row["input_ids"])} for row in features]
    assert CmpCropCollator(tokenizer_of(TEXTS))(features)[column].tolist() == [[0, 0, 0], [0, -100, -100]]


# --- as an ablation ---


def test_crops_with_the_same_settings_are_the_same_ablation():
    assert isinstance(CmpCrop(), Ablation)
    assert CmpCrop() == CmpCrop() != CmpCrop("prefix")
    one, other = (CmpCrop(pad_values={"input_ids": 0}, per_example=["scores"]) for _ in range(2))
    assert one == other
    assert len({one, other}) == 1


def test_a_crop_that_is_not_fitted_to_a_model_has_plain_defaults():
    crop, defaults = CmpCrop(pad_values={"input_ids": 0}), CmpCrop("random", {"input_ids": 0}, None, 1, (), False)
    crops = []
    for one in (crop, defaults):
        torch.manual_seed(0)
        crops.append(one.batches(small_batch(), num_levels=2))
    assert_close(*crops, rtol=0, atol=0)


@given(any_batch)
def test_removed_tokens_are_counted(batch):
    for crop in crops_of(batch):
        expected = sum(len(tokens(batch, row)) - len(tokens(crop, row)) for row in range(len(batch["input_ids"])))
        assert removed_tokens(batch, crop) == expected


def test_removed_tokens_are_counted_without_waiting_for_the_device():
    """Tensors on the meta device have no values that could be read."""
    full, crop = ({"attention_mask": torch.ones(2, length, device="meta")} for length in (4, 3))
    assert removed_tokens(full, crop).is_meta


def batch_with_columns_of_every_kind():
    ids = torch.arange(40).view(2, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "crop_segments": ids % 4}
    batch |= {"position_ids": torch.arange(20).expand(2, 20), "features": torch.rand(2, 20, 3)}
    batch |= {"labels": torch.full((2, 20), -100), "start_positions": torch.tensor([0, 4])}
    return batch | {"end_positions": batch["start_positions"]}


@pytest.mark.parametrize("num_crops", [1, 2, 3])
@pytest.mark.parametrize("shifts_labels", [False, True])
@pytest.mark.parametrize("order", ["random", "prefix"])
def test_all_crops_of_a_batch_wait_for_the_device_once(num_crops, shifts_labels, order):
    """Whether the batch can be cropped, and how long each crop is, are read together."""
    with operations_counted() as found:
        crops_of(batch_with_columns_of_every_kind(), num_crops, order, shifts_labels=shifts_labels)
    assert found["cumsum"] and waits(found) == {"tolist": 1}


def test_ways_of_reading_a_tensor_are_counted():
    one, mask = torch.ones(3), torch.tensor([True, False, True])
    ways = [lambda: int(one[0]), lambda: bool(mask[0]), lambda: one[mask], mask.nonzero, mask.unique, one.tolist]
    ways += [lambda: torch.equal(one, one), lambda: one.repeat_interleave(mask.int()), one.numpy, one.cpu]
    for way in ways:
        with operations_counted() as found:
            way()
        assert waits(found)


# --- on models ---


def tiny_bert():
    return BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
    )


def longformer():
    config = LongformerConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attention_window=8,
        max_position_embeddings=80,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
    )
    return LongformerForQuestionAnswering(config).eval()


@pytest.mark.parametrize(
    "build", [lambda: BertForQuestionAnswering(tiny_bert()).eval(), longformer], ids=["bert", "longformer"]
)
def test_a_model_sees_a_crop_as_the_text_that_never_had_the_segment(build):
    torch.manual_seed(0)
    model = build()
    segments = torch.zeros(2, 40, dtype=torch.long)
    segments[0, 10:20], segments[1, 3:33] = 1, 1
    batch = {"input_ids": torch.randint(5, 200, (2, 40)), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    batch["crop_segments"] = segments
    if "Longformer" in type(model).__name__:
        batch["global_attention_mask"] = torch.zeros(2, 40, dtype=torch.long)
        batch["global_attention_mask"][:, [0, 36]] = 1
    crop = CmpCrop().for_model(model).batches(batch, num_levels=1)[1]
    cropped = model(**crop)
    for example in range(2):
        alone = {k: v[[example]][:, segments[example] == 0] for k, v in batch.items() if k != "crop_segments"}
        expected = model(**alone).start_logits[0]
        assert_close(cropped.start_logits[example, : len(expected)], expected, atol=1e-5, rtol=1e-4)


def test_the_padding_multiple_comes_from_the_models_window_and_the_collator():
    collator = type("Collator", (), {"pad_to_multiple_of": 12})()
    assert CmpCrop().for_model(longformer(), data_collator=collator).pad_to_multiple_of == 24
    assert CmpCrop().for_model(longformer()).pad_values["input_ids"] == 1


def test_settings_that_were_given_win_over_what_the_model_says():
    tokenizer = tokenizer_of(TEXTS, padding_side="left")
    given_settings = CmpCrop(
        "prefix",
        {"input_ids": 7, "bbox": 3},
        "right",
        pad_to_multiple_of=5,
        per_example=["scores"],
        shifts_labels=True,
    )
    crop = given_settings.for_model(longformer(), tokenizer)
    assert crop.pad_values == {"input_ids": 7, "bbox": 3, "token_type_ids": 0}
    assert (crop.order, crop.padding_side, crop.pad_to_multiple_of) == ("prefix", "right", 5)
    assert (crop.per_example, crop.shifts_labels) == (("scores",), True)
    found = CmpCrop().for_model(longformer(), tokenizer)
    assert (found.padding_side, found.pad_to_multiple_of, found.shifts_labels) == ("left", 8, False)
    assert found.for_model(longformer(), tokenizer) == found


def tiny_causal(kind, config, **settings):
    tiny = {
        "vocab_size": 50,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    return lambda: kind(config(**tiny, **settings)).eval()


def tiny_bart():
    config = BartConfig(vocab_size=50, d_model=8, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8)
    return BartForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)).eval(), True),
        (tiny_causal(LlamaForCausalLM, LlamaConfig), True),
        (tiny_causal(BertLMHeadModel, BertConfig, is_decoder=True), True),
        (tiny_causal(BertForMaskedLM, BertConfig), False),
        (tiny_bart, False),
    ],
    ids=["gpt2", "llama", "bert_decoder", "masked", "bart_decoder"],
)
def test_whether_a_model_shifts_its_labels_is_known(build, expected):
    """A model that shifts does not read the label in column 0."""
    model = build()
    assert shifts_labels(model) == expected
    assert CmpCrop().for_model(model).shifts_labels == expected
    ids = torch.arange(1, 7).unsqueeze(0)
    without = ids.clone()
    without[:, 0] = -100
    losses = [model(input_ids=ids, labels=labels).loss for labels in (ids, without)]
    assert (losses[0] == losses[1]).item() == expected


def test_labels_belong_to_the_decoder_where_there_is_one():
    config = T5Config(vocab_size=100, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert "labels" in CmpCrop().for_model(T5ForConditionalGeneration(config)).per_example
    assert "labels" not in CmpCrop().for_model(T5ForTokenClassification(config)).per_example
    assert "labels" not in CmpCrop().for_model(BertForTokenClassification(tiny_bert())).per_example


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_segments": None}, "CmpCropCollator"),
        ({"crop_segments": torch.zeros(1, 3, dtype=torch.long)}, r"shape \(1, 3\), but the batch is \(1, 4\)"),
        ({"crop_segments": torch.zeros(4, dtype=torch.long)}, r"shape \(4,\)"),
        ({"crop_segments": torch.zeros(1, 4)}, "integers"),
        ({"crop_segments": torch.tensor([[0, -1, 1, 0]])}, "Example 0.*negative"),
        ({"crop_segments": torch.tensor([[1, 1, 2, 2]])}, "Example 0.*every token is removable"),
        ({"attention_mask": None}, "attention_mask of shape"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"\(1, 1, 4, 4\)"),
        ({"start_positions": torch.tensor([1]), "end_positions": torch.tensor([1])}, "Example 0.*answer"),
        ({"start_positions": torch.tensor([0]), "end_positions": torch.tensor([3])}, "Example 0.*answer"),
        ({"labels": torch.tensor([[0, 3, 0, 0]])}, "Example 0.*labels other than -100"),
        ({"shift_labels": torch.tensor([[-100, 3, -100, 0]])}, "Example 0.*labels other than -100"),
        (
            {"labels": torch.tensor([[0, -100, -100, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
            "Example 0.*labels other than -100 .* or on padding",
        ),
    ],
)
def test_a_batch_that_cannot_be_cropped_is_rejected_with_the_fix(change, message):
    batch = {name: value for name, value in (small_batch() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        crops_of(batch, 1)


def test_the_message_names_the_example():
    batch = {name: value.repeat(3, 1) for name, value in small_batch().items()}
    batch["crop_segments"][2] = 1
    with pytest.raises(ValueError, match="Example 2"):
        check_croppable(batch)


def test_a_removable_answer_is_rejected_in_later_positions_too():
    batch = small_batch() | {"entity_position_ids": torch.tensor([[[0, -1], [3, 2]]])}
    with pytest.raises(ValueError, match="another position"):
        check_croppable(batch)


def test_a_missing_padding_token_is_rejected():
    with pytest.raises(ValueError, match="pad_token"):
        CmpCrop().batches(small_batch(), num_levels=1)


@pytest.mark.parametrize(
    "use", [CmpCrop, lambda order: nested_keeps(torch.zeros(1, 2, dtype=torch.long), 1, order)], ids=["class", "keeps"]
)
def test_an_unknown_order_is_rejected(use):
    with pytest.raises(ValueError, match="must be 'random' or 'prefix', got 'suffix'"):
        use("suffix")


# --- the collator ---


def tokenizer_of(texts, padding_side="right"):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return wrapped(tokenizer, padding_side)


def byte_tokenizer_of(texts, padding_side="right"):
    """Every byte of an emoji is a token of its own, and a space belongs to the token behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, padding_side)


def wrapped(tokenizer, padding_side):
    specials = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **specials)


TEXTS = ["One fish. Two fish! Red 🐟 fish.", "Blue fish.", ""]


def features_of(*lengths):
    return [
        {
            "input_ids": list(range(1, n + 1)),
            "attention_mask": [1] * n,
            "crop_segments": [7] * n,
            "global_attention_mask": [1] * n,
            "bbox": [[1, 2, 3, 4]] * n,
            "labels": [5] * n,
        }
        for n in lengths
    ]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_collator_pads_every_per_token_column_on_the_tokenizers_side(padding_side):
    batch = CmpCropCollator(tokenizer_of(TEXTS, padding_side))(features_of(3, 1))
    padding = slice(1, 3) if padding_side == "right" else slice(0, 2)
    assert batch["bbox"].shape == (2, 3, 4)
    for name, value in {"crop_segments": 0, "global_attention_mask": 0, "labels": -100, "bbox": 0}.items():
        assert (batch[name][1, padding] == value).all()
        assert (batch[name][0] != value).all()


def test_the_collator_pads_to_a_multiple_and_leaves_per_example_columns_alone():
    features = [one | {"start_positions": 1, "labels": 3} for one in features_of(3, 2)]
    batch = CmpCropCollator(tokenizer_of(TEXTS), pad_to_multiple_of=8)(features)
    assert batch["crop_segments"].shape == batch["input_ids"].shape == (2, 8)
    assert batch["labels"].tolist() == [3, 3]


def test_the_collator_leaves_labels_to_the_collator_it_is_given():
    tokenizer = tokenizer_of(TEXTS)
    collator = CmpCropCollator(tokenizer, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-7))
    features = [{**one, "labels": [1] * n} for one, n in zip(features_of(3, 2), [4, 6], strict=True)]
    batch = collator([{k: v for k, v in one.items() if k != "bbox"} for one in features])
    assert batch["labels"][0].tolist() == [1, 1, 1, 1, -7, -7]
    assert batch["crop_segments"].shape == (2, 3)


def test_multi_label_targets_are_not_mistaken_for_token_labels():
    features = [one | {"labels": [1.0, 0.0, 1.0]} for one in features_of(3, 3)]
    assert CmpCropCollator(tokenizer_of(TEXTS))(features)["labels"].tolist() == [[1, 0, 1]] * 2


def test_a_batch_without_crop_segments_is_collated_as_it_is():
    features = [{k: v for k, v in one.items() if k != "crop_segments"} for one in features_of(2, 3)]
    assert "crop_segments" not in CmpCropCollator(tokenizer_of(TEXTS))(features)


def test_crop_segments_in_some_examples_or_of_another_length_are_rejected():
    missing = features_of(2, 3)
    del missing[1]["crop_segments"]
    with pytest.raises(ValueError, match=r"Example 1 .* has no crop_segments"):
        CmpCropCollator(tokenizer_of(TEXTS))(missing)
    short = features_of(2, 3)
    short[1]["crop_segments"] = [0, 0]
    with pytest.raises(ValueError, match=r"Example 1 .* 2 crop_segments for 3 input_ids"):
        CmpCropCollator(tokenizer_of(TEXTS))(short)


# --- making the column ---


def sentences_of(text):
    return [match.span() for match in re.finditer(r"[^.!]+[.!]", text)]


@pytest.mark.parametrize("build", [tokenizer_of, byte_tokenizer_of])
def test_a_spans_tokens_belong_to_its_segment_whatever_the_tokenizer_does_to_unicode(build):
    text = (
        "Zoë ate ﬁsh 🐟🐟. A ½ dog barked!  Red e\u0301toile."  # é in two code points, a ligature, a fraction, emoji
    )
    spans = sentences_of(text)
    assert len(spans) == 3
    encoding = build([text])([text], return_offsets_mapping=True)
    (segments,) = crop_segments_from_spans(encoding, [text], [spans[1:]])
    for segment, span in ((1, spans[1]), (2, spans[2])):
        offsets = [pair for pair, one in zip(encoding["offset_mapping"][0], segments, strict=True) if one == segment]
        assert text[offsets[0][0] : offsets[-1][1]].strip() == text[slice(*span)].strip()
    of_special = [one for one, who in zip(segments, encoding.sequence_ids(0), strict=True) if who is None]
    assert not any(of_special)


def test_a_token_that_is_only_partly_in_a_span_stays():
    tokenizer = tokenizer_of(["wonderful"])
    encoding = tokenizer(["wonderful wonderful"], return_offsets_mapping=True)
    (segments,) = crop_segments_from_spans(encoding, ["wonderful wonderful"], [[(4, 19)]])
    assert segments == [0, 0, 1, 0]


def test_the_other_text_of_a_pair_stays():
    tokenizer = tokenizer_of(TEXTS)
    encoding = tokenizer(["Two fish!"], ["One fish."], return_offsets_mapping=True)
    (segments,) = crop_segments_from_spans(encoding, ["One fish."], [[(0, 9)]], sequence=1)
    expected = [int(who == 1) for who in encoding.sequence_ids(0)]
    assert segments == expected


def test_the_windows_of_a_long_text_use_the_spans_of_that_text():
    text = "One fish. Two fish!"
    tokenizer = tokenizer_of([text])
    encoding = tokenizer(["Blue.", text], max_length=6, truncation=True, stride=1, return_overflowing_tokens=True,
                         return_offsets_mapping=True)  # fmt: skip
    rows = crop_segments_from_spans(encoding, ["Blue.", text], [[], [(9, 19)]])
    for row, (segments, sample) in enumerate(zip(rows, encoding["overflow_to_sample_mapping"], strict=True)):
        starts = [start for start, _ in encoding["offset_mapping"][row]]
        inside = [who == 0 for who in encoding.sequence_ids(row)]
        assert segments == [int(sample == 1 and a >= 9 and b) for a, b in zip(starts, inside, strict=True)]


def test_an_empty_text_has_nothing_to_remove():
    encoding = tokenizer_of(TEXTS)(["", "One fish."], return_offsets_mapping=True)
    assert not any(crop_segments_from_spans(encoding, ["", "One fish."], [[], []])[0])


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 4), (3, 6)], r"span \(3, 6\) is empty, leaves the text or overlaps"),
        ([(0, 99)], "Text 0 has 9 characters"),
        ([(4, 4)], "is empty"),
        ([(0, 9)], "Every token of text 0 is removable"),
    ],
)
def test_invalid_spans_are_rejected(spans, message):
    encoding = tokenizer_of(TEXTS)(["One fish."], return_offsets_mapping=True)
    with pytest.raises(ValueError, match=message):
        crop_segments_from_spans(encoding, ["One fish."], [spans])


def test_spans_without_offsets_or_texts_are_rejected():
    tokenizer = tokenizer_of(TEXTS)
    with pytest.raises(ValueError, match="return_offsets_mapping=True"):
        crop_segments_from_spans(tokenizer(["One fish."]), ["One fish."], [[]])
    encoding = tokenizer(["One fish."], return_offsets_mapping=True)
    with pytest.raises(ValueError, match="texts must be the list"):
        crop_segments_from_spans(encoding, "One fish.", [[]])
    with pytest.raises(ValueError, match="1 texts, but spans for 0"):
        crop_segments_from_spans(encoding, ["One fish."], [])


def test_sequences_are_numbered_in_order_of_appearance():
    rows = [[None, 2, 2, 0, 1, None], [1, 1, 2, 2, None, None]]
    assert crop_segments_from_sequence_ids(rows, [2, 1]) == [[0, 1, 1, 0, 2, 0], [1, 1, 2, 2, 0, 0]]
    assert crop_segments_from_sequence_ids(rows, [[0], []]) == [[0, 0, 0, 1, 0, 0], [0] * 6]
    with pytest.raises(ValueError, match="2 rows, but removable sequences for 1"):
        crop_segments_from_sequence_ids(rows, [[1]])


# --- in training ---


def trainer_of(tmp_path, columns=(), removable=True, **arguments):
    segments = [0] * 5 + [1] * 5 + [2] * 5 + [0] * 7
    row = {"input_ids": [2, *range(10, 30), 3], "crop_segments": segments if removable else [0] * 22}
    row |= {"attention_mask": [1] * 22, "start_positions": 3, "end_positions": 4}
    torch.manual_seed(0)
    tokenizer = tokenizer_of(TEXTS)
    args = CmpTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        **arguments,
    )
    return CmpTrainer(
        BertForQuestionAnswering(tiny_bert()),
        args,
        train_dataset=[{name: row[name] for name in columns or row}] * 4,
        processing_class=tokenizer,
        data_collator=CmpCropCollator(tokenizer),
    )


def logged_without_removable_text(tmp_path, **arguments):
    """The losses of the first step; training then ends with an error because no crop removed anything."""
    trainer = trainer_of(tmp_path, removable=False, **arguments)
    with pytest.raises(ValueError, match="crop_segments"):
        trainer.train()
    return trainer.state.log_history[0]


def test_drops_and_crops_take_turns(tmp_path):
    counts = {"cmp_num_ablations": 4, "cmp_num_crops": 2}
    trainer = trainer_of(tmp_path, cmp_forward="sequential", per_device_train_batch_size=2, **counts)
    lengths = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, inputs: lengths.append(inputs["attention_mask"].sum().item()), with_kwargs=True
    )
    trainer.train()
    full, crop, drop, second_crop, second_drop = lengths[-5:]  # the first step's checks come before
    assert full == 44
    assert full > crop == drop > second_crop == second_drop


def test_with_crops_alone_no_variant_has_dropout(tmp_path):
    """If nothing is removable, the losses of the crops then equal that of the full model, to the bit."""
    losses = logged_without_removable_text(tmp_path, cmp_num_ablations=2, cmp_num_crops=2)
    assert losses["loss_full"] == losses["loss_ablated_1"] == losses["loss_ablated_2"]
    with_drop = logged_without_removable_text(tmp_path, cmp_num_ablations=2, cmp_num_crops=1)
    assert with_drop["loss_full"] == with_drop["loss_ablated_1"] != with_drop["loss_ablated_2"]
    assert losses["loss_full"] == pytest.approx(with_drop["loss_full"])


def test_crops_without_crop_segments_fail_on_the_first_step_and_name_the_collator(tmp_path):
    columns = ("input_ids", "attention_mask", "start_positions", "end_positions")
    trainer = trainer_of(tmp_path, columns, cmp_num_ablations=1, cmp_num_crops=1)
    with pytest.raises(ValueError, match="CmpCropCollator"):
        trainer.train()


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "cropping.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    tokenizer_of([page]).save_pretrained(tmp_path / "model")
    BertForQuestionAnswering(tiny_bert()).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("distilbert-base-uncased", str(tmp_path / "model")), names)
    sentences = [sentence for row in names["documents"]["sentences"] for sentence in row]
    assert len(sentences) == 8
    for row, matters in zip(names["train_dataset"], names["documents"]["matters"], strict=True):
        assert max(row["crop_segments"]) == matters.count(False)
    assert {"loss_full", "loss_ablated_1", "loss_ablated_2"} <= set(names["trainer"].state.log_history[0])

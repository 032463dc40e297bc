"""cmp_trainer/data: files as people have them, and lengths that a model takes."""

import json
import logging
from typing import Any

import pytest
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForQuestionAnswering,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    LongformerConfig,
    LongformerModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from cmp_trainer.data.lengths import check_length, longest_input
from cmp_trainer.data.tables import check_texts, load_file
from cmp_trainer.scripting import distinct_names
from tests.helpers import letter_tokenizer

# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["data[1].csv", "da*ta.csv", "data?.csv", "a:b/data.csv", "a b/dätä.csv"])
def test_a_path_is_a_path_and_no_pattern(name, tmp_path):
    """The files beside it are what the name would find as a pattern."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("text\nright\n")
    for other in ("data1.csv", "daxta.csv", "datax.csv"):
        (file.parent / other).write_text("text\nwrong\n")
    assert load_file(file, "train")["text"][:] == ["right"]


def test_a_path_that_datasets_would_read_as_a_url_is_rejected(tmp_path):
    (tmp_path / "a::b.csv").write_text("text\nright\n")
    with pytest.raises(ValueError, match=r"a::b\.csv contains '::', which datasets reads as a URL; rename the file"):
        load_file(tmp_path / "a::b.csv", "train")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", "text,label\nnaïve,1\n"),
        (".tsv", "text\tlabel\nnaïve\t1\n"),
        (".json", json.dumps([{"text": "naïve", "label": 1}], ensure_ascii=False)),
        (".jsonl", json.dumps({"text": "naïve", "label": 1}, ensure_ascii=False)),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_data(suffix, content, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content.encode("utf-8-sig"))
    assert load_file(file, "train").to_list() == [{"text": "naïve", "label": 1}]


def test_a_row_with_too_many_fields_is_rejected_with_its_line(tmp_path):
    (tmp_path / "rows.tsv").write_text("a\tb\n1\t2\n1\t2\t3\n")
    with pytest.raises(ValueError, match=r"cannot be read as tsv: .*Expected 2 fields in line 3, saw 3"):
        load_file(tmp_path / "rows.tsv", "train")


def test_empty_texts_are_counted_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        check_texts(Dataset.from_dict({"text": ["a", " ", "", "b"]}), "train", ["text"])
    assert "column 'text' of train is an empty text in 2 of 4 rows (first: row 2)" in caplog.text


# --------------------------------------------------------------------------------------------------- lengths

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


def tokenizer_of(length):
    tokenizer = letter_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (lambda: BertModel(BertConfig(**SMALL, max_position_embeddings=64)), 64),
        (lambda: RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1)), 64),
        (
            lambda: LongformerModel(
                LongformerConfig(**SMALL, max_position_embeddings=66, pad_token_id=1, attention_window=4)
            ),
            64,
        ),
        (
            lambda: BartForQuestionAnswering(
                BartConfig(
                    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                    decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=64,
                )
            ),
            64,
        ),
        (lambda: T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)), None),
        (lambda: LlamaModel(LlamaConfig(**SMALL, max_position_embeddings=64)), None),
    ],
    ids=["bert", "roberta", "longformer", "bart", "t5", "llama"],
)  # fmt: skip
def test_the_longest_input_is_the_number_of_positions_that_tokens_can_have(model, longest):
    model = model()
    assert longest_input(tokenizer_of(10**30), model) == longest
    assert longest_input(tokenizer_of(32), model) == 32


def test_a_length_that_the_model_does_not_take_is_rejected_with_the_limit():
    model = BertModel(BertConfig(**SMALL, max_position_embeddings=64))
    check_length("--max_length", 64, tokenizer_of(10**30), model)
    for length, message in ((65, "--max_length 65 is more than the model takes; pass at most 64"), (0, "expected 1")):
        with pytest.raises(ValueError, match=message):
            check_length("--max_length", length, tokenizer_of(10**30), model)


# ----------------------------------------------------------------------------------------------------- names


def test_folders_of_one_name_are_told_apart_by_those_above(tmp_path, monkeypatch):
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "b" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    assert distinct_names(["run", "../b/run"]) == ["a/run", "b/run"]
    assert distinct_names(["run/.", "../b"]) == ["run", "b"]


def test_one_folder_twice_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="is given twice"):
        distinct_names([tmp_path, f"{tmp_path}/."])

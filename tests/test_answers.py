"""Questions, windows, answers and metrics (cmp_trainer/data), each against something slower and more obvious."""

import ast
import csv
import doctest
import json
import os
import time
import unicodedata
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cmp_trainer.data import answer_batches, answer_metrics
from cmp_trainer.data import windows as windows
from cmp_trainer.data import windows as windows_module
from cmp_trainer.data.answer_batches import AnswerCollator, loss_of_all
from cmp_trainer.data.answers import AnswerSettings, read_answers
from cmp_trainer.data.questions import FEATURES, read_questions, to_questions
from cmp_trainer.data.windows import NO_LABEL, WindowSettings, evaluation_windows, training_windows
from tests.answer_helpers import (
    CONTEXT,
    SMALL,
    about,
    byte_pairs,
    labelled_texts,
    oracle_logits,
    questions,
    word_pieces,
    wrapped,
)
from tests.helpers import free_port


@pytest.fixture(scope="module", params=[word_pieces, byte_pairs])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return wrapped(request.param())


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    return wrapped(word_pieces())


# --- questions ---

ROW = {"id": "1", "question": "who?", "context": "a man", "answers": {"text": ["man"], "answer_start": [2]}}
NESTED_QUESTION = {"id": "1", "question": "who?", "answers": [{"text": "man", "answer_start": 2}]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nested.json", {"data": [{"title": "t", "paragraphs": [{"context": "a man", "qas": [NESTED_QUESTION]}]}]}),
        ("list.json", [ROW]),
        ("data.json", {"data": [ROW], "version": "1.1"}),
        ("rows.jsonl", ROW),
        ("other_answers.jsonl", {**ROW, "answers": NESTED_QUESTION["answers"]}),
    ],
)
def test_all_forms_of_file_give_the_same_questions(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    dataset = read_questions(tmp_path / name)
    assert dataset.to_list() == [ROW]
    assert dataset.features == FEATURES


ANSWERS_IN_CELLS = [json.dumps(ROW["answers"]), str(ROW["answers"]), json.dumps(NESTED_QUESTION["answers"])]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("answers", ANSWERS_IN_CELLS)
def test_tables_give_the_same_questions(tmp_path, suffix, answers):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        Dataset.from_list([{**ROW, "answers": ast.literal_eval(answers), "title": "t"}]).to_parquet(path)
    else:
        options = {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
        pd.DataFrame([{**ROW, "answers": answers, "title": "t"}]).to_csv(path, index=False, **options)
    dataset = read_questions(path)
    assert dataset.to_list() == [ROW]
    assert dataset.features == FEATURES


def test_a_cell_that_holds_no_answers_is_refused_with_its_row(tmp_path):
    pd.DataFrame([ROW | {"answers": ANSWERS_IN_CELLS[0]}, ROW | {"id": 2, "answers": "man"}]).to_csv(
        tmp_path / "a.csv"
    )
    with pytest.raises(ValueError, match=r"a\.csv, row 2 \(id 2\): its answers are 'man'; expected"):
        read_questions(tmp_path / "a.csv")


NO_ANSWER = [
    {"answers": {"text": [], "answer_start": []}},
    {"answers": {"text": [""], "answer_start": [-1]}},
    {"answers": {"text": [" "], "answer_start": []}},
    {"answers": []},
    {"answers": [{"text": "", "answer_start": -1}]},
    {"is_impossible": True},
    {"answers": None, "is_impossible": True},
    {"answers": {"text": ["man"], "answer_start": [2]}, "is_impossible": True},
]


@pytest.mark.parametrize("form", NO_ANSWER, ids=json.dumps)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_question_without_answer_has_none_in_every_written_form(tmp_path, suffix, form):
    path, row = tmp_path / f"rows{suffix}", {**{k: v for k, v in ROW.items() if k != "answers"}, **form}
    if suffix == ".parquet":
        Dataset.from_list([row]).to_parquet(path)
    elif suffix == ".csv":
        cells = {
            key: json.dumps(value) if key == "answers" and value is not None else value for key, value in row.items()
        }
        pd.DataFrame([cells]).to_csv(path, index=False)
    elif suffix == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        question = {key: value for key, value in row.items() if key != "context"}
        path.write_text(json.dumps({"data": [{"paragraphs": [{"context": ROW["context"], "qas": [question]}]}]}))
    assert read_questions(path)["answers"][:] == [{"text": [], "answer_start": []}]


def test_answers_without_text_are_dropped_beside_others(tmp_path):
    row = {**ROW, "answers": {"text": ["", "man"], "answer_start": [-1, 2]}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_questions(tmp_path / "rows.jsonl").to_list() == [ROW]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_read(tmp_path, suffix):
    text = {".json": json.dumps([ROW]), ".jsonl": json.dumps(ROW)}
    text[".csv"] = pd.DataFrame([{**ROW, "answers": ANSWERS_IN_CELLS[0]}]).to_csv(index=False)
    (tmp_path / f"rows{suffix}").write_text(text[suffix], encoding="utf-8-sig")
    assert read_questions(tmp_path / f"rows{suffix}").to_list() == [ROW]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_ids_that_are_whole_numbers_become_text(tmp_path, suffix):
    path, row = tmp_path / f"rows{suffix}", {**ROW, "id": 262}
    if suffix == ".parquet":
        Dataset.from_list([row]).to_parquet(path)
    elif suffix == ".csv":
        pd.DataFrame([{**row, "answers": ANSWERS_IN_CELLS[0]}]).to_csv(path, index=False)
    else:
        path.write_text(json.dumps(row if suffix == ".jsonl" else [row]))
    assert read_questions(path).to_list() == [{**ROW, "id": "262"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_questions_of_a_file_without_ids_are_numbered(tmp_path, suffix, caplog):
    path, row = tmp_path / f"rows{suffix}", {key: value for key, value in ROW.items() if key != "id"}
    Dataset.from_list([row, row]).to_parquet(path) if suffix == ".parquet" else path.write_text(
        f"{json.dumps(row)}\n{json.dumps(row)}"
    )
    assert read_questions(path)["id"][:] == ["1", "2"]
    assert "has no ids; its questions are numbered from 1" in caplog.text


def test_a_line_separator_inside_a_text_does_not_break_a_row(tmp_path):
    row = {**ROW, "context": "a man\u2028of\x85words"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_questions(tmp_path / "rows.jsonl")["context"][0] == row["context"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", {k: v for k, v in ROW.items() if k != "context"}, "line 1 has no text as context; it has"),
        ("rows.jsonl", {k: v for k, v in ROW.items() if k != "answers"}, r"line 1 \(id 1\): its answers are None"),
        ("rows.jsonl", {**ROW, "question": None}, "line 1 has no text as question"),
        ("rows.jsonl", {**ROW, "id": None}, "line 1 has no text as id"),
        ("rows.jsonl", {**ROW, "id": 1.5}, "line 1 has no text as id"),
        ("rows.jsonl", {**ROW, "answers": {"text": ["man"], "answer_start": []}}, "lists of equal length"),
        ("rows.jsonl", {**ROW, "answers": "man"}, "its answers are 'man'; expected"),
        ("rows.jsonl", {**ROW, "answers": {"text": [None], "answer_start": [2]}}, "line 1 .* answers are .*None"),
        ("rows.jsonl", {**ROW, "answers": [{"text": "man", "answer_start": "2"}]}, "line 1 .*whole numbers"),
        ("rows.json", [ROW, ROW], "1 ids stand for more than one question, e.g. 1"),
        ("rows.json", [ROW, {**ROW, "id": 1}], "1 ids stand for more than one question, e.g. 1"),
        ("rows.json", {"rows": [ROW]}, "none of the forms that are read"),
        ("rows.json", [ROW, 3], "none of the forms that are read"),
        ("rows.json", [], "holds no questions"),
        (
            "nested.json",
            {"data": [{"title": "t", "paragraphs": [{"qas": []}]}]},
            r"row 1 \(t\), paragraph 1 has qas; expected context and qas, a list of questions",
        ),
        ("nested.json", {"data": [{"paragraphs": [{"qas": None, "context": "c"}]}]}, "untitled.* paragraph 1 has"),
        ("nested.json", {"data": [{"paragraphs": [None]}]}, "paragraph 1 has None"),
        (
            "nested.json",
            {"data": [{"title": "t", "paragraphs": [{"context": "a", "qas": [NESTED_QUESTION, {"id": 2}]}]}]},
            r"row 1 \(t\), paragraph 1, question 2 has no text as question",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_questions(tmp_path / name)
    assert name in str(error.value)


def test_rows_on_lines_need_the_right_file_name(tmp_path):
    (tmp_path / "rows.json").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be named \.jsonl"):
        read_questions(tmp_path / "rows.json")


def test_a_file_of_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"data": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8"):
        read_questions(tmp_path / "latin.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_questions(tmp_path / "nowhere.json")


def test_a_file_to_predict_for_needs_no_answers(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({k: v for k, v in ROW.items() if k != "answers"}))
    assert read_questions(tmp_path / "rows.jsonl", need_answers=False)["answers"][0] == {
        "text": [],
        "answer_start": [],
    }


def test_a_dataset_that_lacks_columns_is_refused():
    with pytest.raises(ValueError, match="some/data has no column 'context'; found: id, question"):
        to_questions(Dataset.from_dict({"id": ["1"], "question": ["who?"]}), "some/data")
    with pytest.raises(ValueError, match="some/data has no column 'answers'"):
        to_questions(Dataset.from_list([{k: v for k, v in ROW.items() if k != "answers"}]), "some/data")


# --- windows ---


@pytest.mark.parametrize("answer", ["The", "river", "nine old towns", "map.", "north, passes", "lake"])
def test_labels_stand_for_the_answer_in_every_window_that_holds_it(tokenizer, answer):
    examples = about(CONTEXT, answer)
    windows, _ = evaluation_windows(examples, tokenizer, SMALL)
    texts = labelled_texts(examples, windows)
    assert len(texts) > 2
    assert {text.strip() for text in texts if text is not None} == {answer}
    for window, text in zip(windows, texts, strict=True):
        seen = CONTEXT[min(s for s in window["token_starts"] if s >= 0) : max(window["token_ends"])]
        assert (text is not None) == (answer in seen)


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("🌍🌍 the 👩‍🚀 flew to 🌙 twice", "👩‍🚀"),
        ("🌍🌍 the 👩‍🚀 flew to 🌙 twice", "🌙 twice"),
        ("the cafe\u0301 of Ame\u0301lie is shut", "cafe\u0301"),  # e and a combining accent
        ("the cafe\u0301 of Ame\u0301lie is shut", "Ame\u0301lie"),
        ("the café of Amélie is shut", "Amélie"),  # one character each
        ("東京都は日本の首都", "日本"),
        ("İstanbul and Straße 9", "Straße"),  # lower case of İ is two characters
        ("a\u200bb \x07 zero\u200dwidth end", "zero\u200dwidth"),
        ("\u200bfirst of all", "\u200bfirst"),  # a character that has no token
        ("$308 million", "308"),  # inside a token of some tokenizers
    ],
)
def test_offsets_survive_unicode(tokenizer, context, answer):
    examples = about(context, answer)
    windows, report = training_windows(examples, tokenizer, SMALL)
    assert report.misaligned_answers == report.answers_in_no_window == 0
    windows, _ = evaluation_windows(examples, tokenizer, SMALL)
    found = [text for text in labelled_texts(examples, windows) if text is not None]
    assert found
    for text in found:
        # whole tokens: a tokenizer may not be able to cut where the answer does, or have no token for its ends
        assert text.strip(" $\u200b") == answer.strip("\u200b")


HINDI, THAI = "नदी उत्तर में पहाड़ों से निकलती है", "แม่น้ำ ไหล จาก เหนือ ผ่าน ที่นี่ นะ"


@pytest.mark.parametrize(
    "context", [HINDI, THAI, "Ame\u0301lie\u0301 va au cafe\u0301 de Ze\u0301"], ids=["hi", "th", "fr"]
)
def test_a_model_that_is_sure_of_words_that_end_in_marks_has_them_all_right(context):
    """Tokenizers that strip accents give such marks to no token; `unicodedata.combining` is 0 for many of them."""
    tokenizer, words = wrapped(word_pieces(context)), context.split()
    assert sum(unicodedata.category(word[-1]) == "Mn" for word in words) > 0
    examples = questions(*(("what is it?", context, [(word, context.index(word))]) for word in words))
    windows, report = evaluation_windows(examples, tokenizer, WindowSettings(64, 6, 20))
    assert report.misaligned_answers == report.answers_in_no_window == 0
    answers = read_answers(examples, windows, *oracle_logits(windows), AnswerSettings(), progress=False)
    assert list(answers.predictions.values()) == words


def test_an_answer_inside_a_word_is_labelled_with_the_tokens_that_touch_it(bert_tokenizer):
    examples = about(CONTEXT, "owns an")
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    assert all(text is None or "owns an" in text for text in labelled_texts(examples, windows))
    assert any(labelled_texts(examples, windows))


def test_answers_that_do_not_stand_where_they_say_are_left_out_of_training_and_counted(tokenizer):
    context = "🌍🌍 the moon is far"
    utf16_start = len("🌍🌍 the ".encode("utf-16-le")) // 2
    examples = questions(
        ("what?", context, [("moon", utf16_start)]),
        ("what?", context, [("moon", context.index("moon"))]),
        ("what?", context, [("moon", -4)]),
        ("what?", context, [("moon", 1), ("far", context.index("far"))]),
    )
    windows, report = training_windows(examples, tokenizer, SMALL)
    assert (report.questions, report.misaligned_answers) == (4, 2)
    assert NO_LABEL not in windows["start_positions"]
    kept, _ = evaluation_windows(examples, tokenizer, SMALL)
    assert set(kept["example_index"]) == {0, 1, 2, 3}  # still answered and scored


def test_training_without_any_usable_answer_is_refused(bert_tokenizer):
    with pytest.raises(ValueError, match="None of the 1 questions has an answer that stands"):
        training_windows(questions(("what?", "the moon", [("moon", 0)])), bert_tokenizer, SMALL)


def test_answers_that_every_window_cuts_are_counted(bert_tokenizer):
    examples = questions(
        ("what?", CONTEXT, [(CONTEXT, 0)]),  # longer than a window
        ("what?", CONTEXT, [("river", CONTEXT.index("river"))]),
        ("what?", CONTEXT, []),
    )
    windows, report = evaluation_windows(examples, bert_tokenizer, SMALL)
    assert report.answers_in_no_window == 1
    texts = labelled_texts(examples, windows)
    assert all(texts[n] is None for n, row in enumerate(windows["example_index"]) if row in (0, 2))


def test_an_answer_as_long_as_the_overlap_stands_whole_in_some_window(tokenizer):
    """A window may only start so that the tokens it shares with the one before hold any answer of that length."""
    encoded = tokenizer(CONTEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for n in range(len(encoded) - SMALL.doc_stride + 1):
        first, last = encoded[n][0], encoded[n + SMALL.doc_stride - 1][1]
        _, report = evaluation_windows(questions(("what?", CONTEXT, [(CONTEXT[first:last], first)])), tokenizer, SMALL)
        assert report.answers_in_no_window == 0


@pytest.mark.parametrize("context", ["", "  \n"])
def test_empty_contexts_are_counted_and_answered_with_nothing(tokenizer, context):
    examples = questions(("what?", context, []), ("what?", CONTEXT, [("river", CONTEXT.index("river"))]))
    windows, report = evaluation_windows(examples, tokenizer, SMALL)
    assert report.empty_contexts == 1
    for unanswerable in (True, False):
        answers = read_answers(
            examples, windows, *oracle_logits(windows), AnswerSettings(unanswerable=unanswerable), progress=False
        )
        assert answers.predictions == {"q0": "", "q1": "river"}
        if not context:  # white space is a token, and no answer, to some tokenizers
            assert answers.without_span == 1


def test_long_questions_are_cut_between_words_and_counted(bert_tokenizer):
    question = "river towns lake map river towns lake map river towns"
    examples = questions((question, CONTEXT, [("lake", CONTEXT.index("lake"))]))
    windows, report = evaluation_windows(examples, bert_tokenizer, SMALL)
    assert report.cut_questions == 1
    ids = windows["input_ids"][0]
    kept = ids[1 : ids.index(bert_tokenizer.sep_token_id)]
    assert 0 < len(kept) <= SMALL.max_question_length
    assert question.startswith(bert_tokenizer.decode(kept))


def test_a_question_that_is_one_long_word_is_cut_inside_it(bert_tokenizer):
    examples = questions(("x" * 90, CONTEXT, [("lake", CONTEXT.index("lake"))]), ("river" * 9, CONTEXT, []))
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    assert max(len(ids) for ids in windows["input_ids"]) <= SMALL.max_seq_length


def test_settings_without_room_for_context_are_refused(bert_tokenizer):
    with pytest.raises(ValueError, match=r"--max_seq_length 17 leaves no room .* at least 18"):
        evaluation_windows(about(CONTEXT, "river"), bert_tokenizer, WindowSettings(17, 6, 8))
    evaluation_windows(about(CONTEXT, "river"), bert_tokenizer, WindowSettings(18, 6, 8))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer keeps no character offsets"):
        evaluation_windows(about(CONTEXT, "river"), ByT5Tokenizer(), SMALL)


# --- answers ---


@st.composite
def logits_of_windows(draw):
    """Questions of 1 … 3 windows; whole-number logits, so that scores tie; some tokens share characters, and a window
    has one or more segments."""
    length = draw(st.integers(3, 9))
    question = sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)))
    question = np.unique(question, return_inverse=True)[1]  # no question without a window
    shape = (len(question), length)
    token_starts = np.full(shape, -1)
    token_ends = np.full(shape, -1)
    for row in range(len(question)):
        first = draw(st.integers(1, length))
        inside = draw(st.integers(0, length - first))
        steps = draw(st.lists(st.sampled_from([0, 2, 2]), min_size=inside, max_size=inside))
        begins = draw(st.sampled_from([0, 4])) + np.cumsum(np.array(steps, dtype=int))
        token_starts[row, first : first + inside] = begins
        token_ends[row, first : first + inside] = begins + 2
    segments = np.sort(np.array([[draw(st.integers(0, 2)) for _ in range(length)] for _ in question]))
    values = st.lists(st.integers(-3, 3), min_size=question.size * length, max_size=question.size * length)
    start, end = (np.array(draw(values), dtype=np.float32).reshape(shape) for _ in range(2))
    settings_ = AnswerSettings(
        n_best=draw(st.integers(1, 6)),
        max_answer_length=draw(st.integers(1, 5)),
        unanswerable=draw(st.booleans()),
        null_threshold=draw(st.sampled_from([-2.0, 0.0, 1.0])),
        all_spans=draw(st.booleans()),
    )
    return question, start, end, token_starts, token_ends, segments, settings_


def slow_answers(question, start, end, token_starts, token_ends, segments, settings_, contexts):
    """The definition, one question, window and pair of tokens after another."""
    answers = {}
    for q, context in enumerate(contexts):
        found = []
        rows = [row for row in range(len(question)) if question[row] == q]
        for row in rows:
            tokens = [t for t in range(start.shape[1]) if token_starts[row, t] >= 0]
            ends = tokens if settings_.all_spans else sorted(tokens, key=lambda t: -end[row, t])[: settings_.n_best]
            spans = [
                (s, e)
                for s, e in product(tokens, sorted(ends))
                if s <= e < s + settings_.max_answer_length and segments[row, s] == segments[row, e]
            ]
            scores = {s: start[row, s] + max(end[row, e] for t, e in spans if t == s) for s, _ in spans}
            ranked = sorted(tokens, key=lambda t: -(scores[t] if settings_.all_spans else start[row, t]))
            for s, e in spans:
                if s in ranked[: settings_.n_best]:
                    characters = (token_starts[row, s], token_ends[row, e])
                    found.append((float(start[row, s]), float(end[row, e]), characters))
        found.sort(key=lambda span: -(span[0] + span[1]))
        seen, nbest = set(), []
        for s, e, characters in found:
            if characters not in seen and len(nbest) < settings_.n_best:
                seen.add(characters)
                nbest.append((s, e, context[characters[0] : characters[1]].strip()))
        prediction, odds = nbest[0][2] if nbest else "", None
        if settings_.unanswerable:
            null = min(((float(start[row, 0]), float(end[row, 0])) for row in rows), key=sum)
            odds = sum(null) - sum(nbest[0][:2]) if nbest else float("inf")
            prediction = "" if odds > settings_.null_threshold else prediction
            nbest = sorted([*nbest, (*null, "")], key=lambda span: -(span[0] + span[1]))
        weights = np.exp([s + e for s, e, _ in nbest])
        answers[f"q{q}"] = (prediction, odds, nbest, weights / weights.sum())
    return answers


@settings(deadline=None, max_examples=100)
@given(logits_of_windows())
def test_answers_equal_the_slow_definition(case):
    question, start, end, token_starts, token_ends, segments, settings_ = case
    contexts = [f"{'ab cd ef gh ij kl mn op qr st'[q:]}" for q in range(question.max() + 1)]
    examples = questions(*(("what?", context, []) for context in contexts))
    windows = Dataset.from_dict(
        {
            "example_index": question.tolist(),
            "null_position": [0] * len(question),
            "token_starts": token_starts.tolist(),
            "token_ends": token_ends.tolist(),
            "segments": segments.tolist(),
        }
    )
    answers = read_answers(examples, windows, start, end, settings_, progress=False)
    slow = slow_answers(question, start, end, token_starts, token_ends, segments, settings_, contexts)
    for key, (prediction, odds, nbest, probabilities) in slow.items():
        assert answers.predictions[key] == prediction
        assert answers.null_odds.get(key) == odds
        assert [(e["start_logit"], e["end_logit"], e["text"]) for e in answers.nbest[key]] == nbest
        np.testing.assert_allclose([e["probability"] for e in answers.nbest[key]], probabilities, rtol=1e-12)
        assert answers.spans[key] == next((text for _, _, text in nbest if text), "")


def test_the_best_of_all_spans_need_not_start_or_end_among_the_best():
    examples = questions(("what?", "a b c d e f", []))
    columns = {"token_starts": [[0, 2, 4, 6, 8, 10]], "token_ends": [[1, 3, 5, 7, 9, 11]]}
    windows = Dataset.from_dict({"example_index": [0], **columns, "segments": [[0, 0, 0, 1, 1, 1]]})
    starts, ends = np.array([[4.0, 0, 0, 3, 0, 5]]), np.array([[0.0, 0, 0, 5, 6, 0]])
    for all_spans, expected in ((False, ""), (True, "d e")):  # the best start comes after the best end
        settings_ = AnswerSettings(n_best=1, all_spans=all_spans)
        assert read_answers(examples, windows, starts, ends, settings_, False).predictions == {"q0": expected}


def test_answers_do_not_depend_on_padding(bert_tokenizer):
    examples = about(CONTEXT, "nine old towns")
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    start, end = oracle_logits(windows)
    expected = read_answers(examples, windows, start, end, AnswerSettings(), progress=False)
    for value in (-100.0, 1000.0, np.nan):
        wider = [np.pad(logits, ((0, 0), (0, 8)), constant_values=value) for logits in (start, end)]
        assert read_answers(examples, windows, *wider, AnswerSettings(), progress=False) == expected


def test_logits_of_other_windows_and_nan_are_refused(bert_tokenizer):
    examples = about(CONTEXT, "nine old towns")
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    start, end = oracle_logits(windows)
    with pytest.raises(ValueError, match="logits and windows must be of the same data"):
        read_answers(examples, windows, start[1:], end[1:], AnswerSettings(), progress=False)
    with pytest.raises(ValueError, match="logits and windows must be of the same data"):
        read_answers(examples, windows, start[:, :-1], end[:, :-1], AnswerSettings(), progress=False)
    with pytest.raises(ValueError, match="hold NaN"):
        read_answers(examples, windows, np.full_like(start, np.nan), end, AnswerSettings(), progress=False)


@pytest.mark.parametrize("bad", [{"n_best": 0}, {"max_answer_length": 0}])
def test_answer_settings_below_one_are_refused(bad):
    with pytest.raises(ValueError, match="expected 1 or more"):
        AnswerSettings(**bad)


def test_ten_thousand_windows_are_scored_in_seconds():
    """10,000 windows of 384 tokens, SQuAD v2: spans, texts and all metrics."""
    count, length = 10_000, 384
    generator = np.random.default_rng(0)
    token_starts = np.tile(np.arange(length, dtype=np.int32) * 4, (count, 1))
    token_starts[:, :16] = -1
    token_ends = np.where(token_starts >= 0, token_starts + 3, -1)
    start, end = generator.normal(size=(2, count, length)).astype(np.float32)
    context = "abc " * length
    examples = questions(*(("what?", context, [("abc", 0)] * (n % 2)) for n in range(count)))
    windows = Dataset.from_dict(
        {
            "example_index": np.arange(count),
            "null_position": np.zeros(count, dtype=int),
            "token_starts": token_starts,
            "token_ends": token_ends,
        }
    )
    before = time.process_time()  # of this process alone, so that a busy machine does not matter
    answers = read_answers(examples, windows, start, end, AnswerSettings(unanswerable=True), progress=False)
    answer_metrics.squad_v2_metrics(
        list(answers.predictions.values()),
        list(answers.spans.values()),
        list(answers.null_odds.values()),
        [a["text"] for a in examples["answers"][:]],
    )
    assert time.process_time() - before < 15  # 4.3 s on one core at 2.5 GHz


def test_inputs_of_4096_tokens_are_answered_in_seconds():
    """512 questions, all spans of up to 64 tokens, in ten paragraphs."""
    count, length = 512, 4096
    starts, ends = np.random.default_rng(0).normal(size=(2, count, length)).astype(np.float32)
    places = np.arange(length, dtype=np.int32)
    columns = {"token_starts": places * 2, "token_ends": places * 2 + 1, "segments": places // 410}
    windows = Dataset.from_dict(
        {"example_index": np.arange(count), **{name: np.tile(one, (count, 1)) for name, one in columns.items()}}
    )
    examples = questions(*(("what?", "a " * length, []) for _ in range(count)))
    before = time.process_time()
    answers = read_answers(examples, windows, starts, ends, AnswerSettings(1, 64, all_spans=True), progress=False)
    assert time.process_time() - before < 15
    assert max(len(text.split()) for text in answers.predictions.values()) <= 64


# --- batches ---


def test_a_batch_without_any_label_has_no_positions(bert_tokenizer):
    rows = [{"input_ids": [2, 5, 3], "start_positions": p, "end_positions": p} for p in (NO_LABEL, 1)]
    bert_tokenizer.padding_side = "left"
    collator = AnswerCollator(bert_tokenizer, 8)
    assert set(collator(rows[:1])) == {"input_ids", "attention_mask"}
    assert collator(rows)["start_positions"].tolist() == [NO_LABEL, 1]
    assert collator(rows)["input_ids"].tolist() == [[2, 5, 3, 0, 0, 0, 0, 0]] * 2
    assert set(collator([{"input_ids": [2, 3]}])) == {"input_ids", "attention_mask"}


LOSSES = [(1.5, None), (1.5, 2.0), (None, None)]  # of two processes, for three batches; None has no label


def losses_in_each_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    accelerator, found = Accelerator(cpu=True), []
    collator = AnswerCollator(wrapped(word_pieces()))
    for losses in LOSSES:
        is_labelled = losses[rank] is not None
        position = 1 if is_labelled else NO_LABEL
        batch = collator([{"input_ids": [2, 5, 3], "start_positions": position, "end_positions": position}])
        loss = loss_of_all(torch.tensor(losses[rank] if is_labelled else torch.nan), batch, accelerator)
        found.append(None if loss is None else loss.item())
    found.append(loss_of_all(None, {"input_ids": torch.ones(1, 3)}, accelerator))  # data without positions
    Path(folder, str(rank)).write_text(json.dumps(found))


def test_every_process_has_a_loss_or_none_has(tmp_path):
    torch.multiprocessing.spawn(losses_in_each_process, (free_port(), str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert (first, second) == ([1.5, 1.5, None, None], [1.5, 2.0, None, None])


# --- metrics ---


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Cat!", ["a cat"], 100, 100),
        ("black cat", ["cat", "the dog"], 0, 200 / 3),
        ("cat cat", ["cat"], 0, 200 / 3),
        ("dog", ["cat"], 0, 0),
        ("", [], 100, 100),
        ("dog", [], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
def test_question_scores_follow_the_official_normalization(prediction, answers, exact, f1):
    scores = answer_metrics.question_scores([prediction], [answers])
    np.testing.assert_allclose(np.concatenate(scores), [exact, f1], rtol=1e-6)


def test_v2_metrics_are_apart_for_answerable_and_unanswerable_questions():
    metrics = answer_metrics.squad_v2_metrics(
        predictions=["cat", "dog", "", "cow"],
        spans=["cat", "dog", "pig", "cow"],
        null_odds=[-3.0, -2.0, 4.0, 1.0],
        answers=[["cat"], ["big dog"], [], []],
    )
    assert metrics["exact_match"] == pytest.approx(50)
    assert metrics["f1"] == pytest.approx((100 + 200 / 3 + 100) / 4)
    assert (metrics["HasAns_exact"], metrics["HasAns_f1"]) == (50, pytest.approx(250 / 3))
    assert (metrics["NoAns_exact"], metrics["NoAns_f1"]) == (50, 50)
    assert (metrics["questions"], metrics["HasAns_total"], metrics["NoAns_total"]) == (4, 2, 2)
    assert (metrics["best_exact"], metrics["best_exact_threshold"]) == (75, -3)
    assert (metrics["best_f1"], metrics["best_f1_threshold"]) == (pytest.approx((100 + 200 / 3 + 200) / 4), -2)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 50.0, 100.0]), st.booleans(), st.sampled_from([-2.0, 0.0, 0.5, np.inf])),
        min_size=1,
        max_size=8,
    )
)
def test_the_best_null_threshold_equals_trying_all(cases):
    scores = np.array([score if answerable else 0.0 for score, answerable, _ in cases])
    answerable, odds = np.array([case[1] for case in cases]), np.array([case[2] for case in cases])

    def mean_at(threshold: float) -> float:
        return float(np.where(odds > threshold, np.where(answerable, 0.0, 100.0), scores).mean())

    best, threshold = answer_metrics.best_null_threshold(scores, answerable, odds)
    assert best == pytest.approx(max(mean_at(t) for t in (-9.0, -2.0, 0.0, 0.5)))
    assert mean_at(threshold) == pytest.approx(best)


@pytest.mark.parametrize("module", [answer_batches, answer_metrics, windows_module])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0

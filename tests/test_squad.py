"""examples/squad: questions, windows, answers and metrics, each against something slower and more obvious."""

import doctest
import json
import os
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import split_squad
import squad_metrics
import squad_windows
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from qa_trainer import QuestionAnsweringTrainer
from run_squad import ModelArguments, SquadArguments, main
from squad_answers import AnswerSettings, read_answers
from squad_data import FEATURES, check_columns, read_squad_file
from squad_windows import NO_LABEL, WindowSettings, evaluation_windows, training_windows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    ByT5Tokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.scripting import parse_arguments

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "squad" / "configs"
XQUAD = Path(os.environ.get("CMP_TRAINER_DATA", ROOT.parent / "shared" / "data")) / "squad" / "xquad.en.json"
SMALL = WindowSettings(max_seq_length=24, doc_stride=6, max_question_length=8)
CONTEXT = "The river rises in the north, passes nine old towns and ends in a lake that has no name on any map."


# ---------------------------------------------------------------------------------------------------- fixtures


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([CONTEXT], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_pairs() -> Tokenizer:
    """Every byte of an emoji is a token of its own; spaces belong to the token behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CONTEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=[word_pieces, byte_pairs])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return wrapped(request.param())


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    return wrapped(word_pieces())


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def questions(*rows: tuple[str, str, list[tuple[str, int]]]) -> Dataset:
    """A data set of (question, context, answers)."""
    return Dataset.from_list(
        [
            {
                "id": f"q{n}",
                "question": question,
                "context": context,
                "answers": {"text": [a[0] for a in answers], "answer_start": [a[1] for a in answers]},
            }
            for n, (question, context, answers) in enumerate(rows)
        ],
        features=FEATURES,
    )


def about(context: str, answer: str) -> Dataset:
    return questions(("what is it?", context, [(answer, context.index(answer))]))


def labelled_texts(examples: Dataset, windows: Dataset) -> list[str | None]:
    """The text that each window's labels stand for; None for the null label."""
    texts = []
    for window in windows:
        start, end = window["start_positions"], window["end_positions"]
        context = examples[window["example_index"]]["context"]
        is_null = start == end == window["null_position"]
        texts.append(None if is_null else context[window["token_starts"][start] : window["token_ends"][end]])
    return texts


def oracle_logits(windows: Dataset, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is sure of the labels."""
    width = max(width, max(len(ids) for ids in windows["input_ids"]))
    logits = np.zeros((2, len(windows), width), dtype=np.float32)
    for row, name in enumerate(("start_positions", "end_positions")):
        positions = np.array(windows[name])
        kept = np.flatnonzero(positions != NO_LABEL)
        logits[row, kept, positions[kept]] = 9.0
    return logits[0], logits[1]


# ---------------------------------------------------------------------------------------------------- questions

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
    dataset = read_squad_file(tmp_path / name)
    assert dataset.to_list() == [ROW]
    assert dataset.features == FEATURES


def test_a_line_separator_inside_a_text_does_not_break_a_row(tmp_path):
    row = {**ROW, "context": "a man\u2028of\x85words"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_squad_file(tmp_path / "rows.jsonl")["context"][0] == row["context"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", {k: v for k, v in ROW.items() if k != "context"}, r"row 1 lacks \['context'\].*it has"),
        ("rows.jsonl", {k: v for k, v in ROW.items() if k != "answers"}, r"row 1 lacks \['answers'\]"),
        ("rows.jsonl", {**ROW, "question": None}, r"row 1 lacks \['question'\]"),
        ("rows.jsonl", {**ROW, "answers": {"text": ["man"], "answer_start": []}}, "lists of one length"),
        ("rows.jsonl", {**ROW, "answers": "man"}, "Expected"),
        ("rows.jsonl", {**ROW, "answers": {"text": [None], "answer_start": [2]}}, "row 1: answers are .*None"),
        (
            "rows.jsonl",
            {**ROW, "answers": [{"text": "man", "answer_start": "2"}]},
            "row 1: .*whole",
        ),
        ("rows.json", [ROW, ROW], r"1 ids stand for more than one question, e.g. \['1'\]"),
        ("rows.json", {"rows": [ROW]}, "none of the known forms"),
        ("rows.json", [], "holds no question"),
        ("nested.json", {"data": [{"title": "t", "paragraphs": [{"qas": []}]}]}, "article 't' has the keys"),
        (
            "nested.json",
            {"data": [{"title": "t", "paragraphs": [{"qas": None, "context": "c"}]}]},
            "list of questions",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_squad_file(tmp_path / name)
    assert name in str(error.value)


def test_rows_on_lines_need_the_right_file_name(tmp_path):
    (tmp_path / "rows.json").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be named \.jsonl"):
        read_squad_file(tmp_path / "rows.json")


def test_a_file_of_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "latin.json").write_bytes('{"data": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8"):
        read_squad_file(tmp_path / "latin.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        read_squad_file(tmp_path / "nowhere.json")


def test_a_file_to_predict_for_needs_no_answers(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({k: v for k, v in ROW.items() if k != "answers"}))
    assert read_squad_file(tmp_path / "rows.jsonl", need_answers=False)["answers"][0] == {
        "text": [],
        "answer_start": [],
    }


def test_a_dataset_that_lacks_columns_is_refused():
    with pytest.raises(ValueError, match=r"some/data lacks the columns \['context', 'answers'\]"):
        check_columns(Dataset.from_dict({"id": ["1"], "question": ["who?"]}), "some/data")


# ---------------------------------------------------------------------------------------------------- windows


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


# ---------------------------------------------------------------------------------------------------- answers


@st.composite
def logits_of_windows(draw):
    """Questions of 1 … 3 windows; whole-number logits, so that scores tie; some tokens share characters."""
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
    values = st.lists(st.integers(-3, 3), min_size=question.size * length, max_size=question.size * length)
    start, end = (np.array(draw(values), dtype=np.float32).reshape(shape) for _ in range(2))
    settings_ = AnswerSettings(
        n_best=draw(st.integers(1, 6)),
        max_answer_length=draw(st.integers(1, 5)),
        unanswerable=draw(st.booleans()),
        null_threshold=draw(st.sampled_from([-2.0, 0.0, 1.0])),
    )
    return question, start, end, token_starts, token_ends, settings_


def slow_answers(question, start, end, token_starts, token_ends, settings_, contexts):
    """The definition, one question, window and pair of tokens after another."""
    answers = {}
    for q, context in enumerate(contexts):
        found = []
        rows = [row for row in range(len(question)) if question[row] == q]
        for row in rows:
            tokens = [t for t in range(start.shape[1]) if token_starts[row, t] >= 0]
            best_starts = sorted(tokens, key=lambda t: -start[row, t])[: settings_.n_best]
            best_ends = sorted(tokens, key=lambda t: -end[row, t])[: settings_.n_best]
            for s, e in product(sorted(best_starts), sorted(best_ends)):
                if s <= e < s + settings_.max_answer_length:
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
    question, start, end, token_starts, token_ends, settings_ = case
    contexts = [f"{'ab cd ef gh ij kl mn op qr st'[q:]}" for q in range(question.max() + 1)]
    examples = questions(*(("what?", context, []) for context in contexts))
    windows = Dataset.from_dict(
        {
            "example_index": question.tolist(),
            "null_position": [0] * len(question),
            "token_starts": token_starts.tolist(),
            "token_ends": token_ends.tolist(),
        }
    )
    answers = read_answers(examples, windows, start, end, settings_, progress=False)
    slow = slow_answers(question, start, end, token_starts, token_ends, settings_, contexts)
    for key, (prediction, odds, nbest, probabilities) in slow.items():
        assert answers.predictions[key] == prediction
        assert answers.null_odds.get(key) == odds
        assert [(e["start_logit"], e["end_logit"], e["text"]) for e in answers.nbest[key]] == nbest
        np.testing.assert_allclose([e["probability"] for e in answers.nbest[key]], probabilities, rtol=1e-12)
        assert answers.spans[key] == next((text for _, _, text in nbest if text), "")


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
    squad_metrics.squad_v2_metrics(
        list(answers.predictions.values()),
        list(answers.spans.values()),
        list(answers.null_odds.values()),
        [a["text"] for a in examples["answers"][:]],
    )
    assert time.process_time() - before < 15  # 4.3 s on one core at 2.5 GHz


# ---------------------------------------------------------------------------------------------------- metrics


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
    scores = squad_metrics.question_scores([prediction], [answers])
    np.testing.assert_allclose(np.concatenate(scores), [exact, f1], rtol=1e-6)


def test_v2_metrics_are_apart_for_answerable_and_unanswerable_questions():
    metrics = squad_metrics.squad_v2_metrics(
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

    best, threshold = squad_metrics.best_null_threshold(scores, answerable, odds)
    assert best == pytest.approx(max(mean_at(t) for t in (-9.0, -2.0, 0.0, 0.5)))
    assert mean_at(threshold) == pytest.approx(best)


@pytest.mark.parametrize("module", [squad_metrics, squad_windows])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------------------------------------------- the run


def write_small_data(folder: Path, tokenizer: PreTrainedTokenizerFast, v2: bool = False) -> list[str]:
    """A tiny model and files of few questions; the arguments that use them."""
    words = ["river", "nine old towns", "lake", "north", "name", "map"]
    rows = [
        {"id": f"q{n}", "question": f"which {word}?", "context": CONTEXT, "answers": answers(word, v2 and n % 3 == 0)}
        for n, word in enumerate(words)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForQuestionAnswering(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return [
        f"--model_name_or_path={folder / 'model'}",
        f"--train_file={folder / 'rows.json'}",
        f"--validation_file={folder / 'rows.json'}",
        f"--test_file={folder / 'rows.json'}",
        f"--output_dir={folder / 'out'}",
        "--max_seq_length=24",
        "--doc_stride=6",
        "--max_question_length=8",
        "--per_device_train_batch_size=4",
        "--max_steps=3",
        "--learning_rate=1e-3",
        "--report_to=none",
        "--use_cpu=true",
        "--disable_tqdm=true",
    ]


def answers(word: str, unanswerable: bool) -> dict[str, list]:
    if unanswerable:
        return {"text": [], "answer_start": []}
    return {"text": [word], "answer_start": [CONTEXT.index(word)]}


@pytest.mark.parametrize("ablations", [0, 2])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_the_script_trains_evaluates_and_predicts(tmp_path, bert_tokenizer, v2, ablations):
    arguments = write_small_data(tmp_path, bert_tokenizer, v2)
    flags = ["--do_train", "--do_eval", "--do_predict", f"--version_2_with_negative={v2}"]
    main([*arguments, *flags, f"--cmp_num_ablations={ablations}"])
    out = tmp_path / "out"
    metrics = json.loads((out / "all_results.json").read_text())
    assert metrics["eval_questions"] == 6
    assert metrics["eval_samples"] > 6  # windows
    assert np.isfinite([metrics["eval_loss"], metrics["train_loss"]]).all()
    assert metrics["eval_f1"] == metrics["test_f1"]  # the same file
    predictions = json.loads((out / "eval_predictions.json").read_text())
    nbest = json.loads((out / "eval_nbest_predictions.json").read_text())
    assert list(predictions) == list(nbest) == [f"q{n}" for n in range(6)]
    assert (out / "eval_null_odds.json").exists() == v2
    assert ("eval_HasAns_f1" in metrics) == v2
    BertForQuestionAnswering.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert "local files (train: rows.json, validation: rows.json, test: rows.json)" in card
    assert str(tmp_path) not in card


def test_unanswerable_questions_need_their_argument(tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer, v2=True)
    with pytest.raises((ValueError, SystemExit)):
        main([*arguments, "--do_eval"])


def test_a_test_file_without_answers_is_predicted_and_not_scored(tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer)
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps([{k: r[k] for k in r if k != "answers"} for r in rows]))
    main([*arguments, "--do_predict", f"--test_file={tmp_path / 'test.json'}"])
    assert len(json.loads((tmp_path / "out" / "test_predictions.json").read_text())) == 6
    assert "test_f1" not in json.loads((tmp_path / "out" / "test_results.json").read_text())


PUBLISHED = {  # model, max length, learning rate, epochs, batch, baseline
    "bert_tiny": ("google/bert_uncased_L-2_H-128_A-2", 512, 2e-4, 3, 12, "zero"),
    "bert_small": ("google/bert_uncased_L-12_H-256_A-4", 512, 1e-4, 2, 12, "zero"),
    "electra_small": ("google/electra-small-discriminator", 512, 1e-4, 2, 12, "zero"),
    "bert_medium": ("google/bert_uncased_L-8_H-512_A-8", 512, 5e-5, 2, 12, "zero"),
    "bert_base": ("bert-base-uncased", 512, 3e-5, 2, 12, "zero"),
    "electra_base": ("google/electra-base-discriminator", 512, 3e-5, 2, 12, "zero"),
    "bert_large": ("bert-large-uncased", 384, 3e-5, 2, 24, "first"),
    "electra_large": ("google/electra-large-discriminator", 512, 1e-5, 2, 12, "first"),
}


@pytest.mark.parametrize("kind", ["baseline", "comparative"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_hold_the_published_settings(name, kind):
    model, data, args = parse_arguments(
        ModelArguments, SquadArguments, CmpTrainingArguments, argv=[str(CONFIGS / f"{name}_{kind}.yaml"), "--use_cpu"]
    )
    batch = args.per_device_train_batch_size
    got = (model.model_name_or_path, data.max_seq_length, args.learning_rate, args.num_train_epochs, batch)
    assert got == PUBLISHED[name][:-1]
    assert (data.doc_stride, data.max_answer_length, data.n_best_size) == (128, 30, 20)
    assert args.get_warmup_steps(1000) == 100
    assert args.lr_scheduler_type == "linear"
    assert args.cmp_num_ablations == (2 if kind == "comparative" else 0)
    if kind == "comparative":
        assert args.cmp_baseline == PUBLISHED[name][-1]


def test_there_is_no_config_beside_the_published_ones():
    assert {path.stem.rsplit("_", 1)[0] for path in CONFIGS.glob("*.yaml")} == set(PUBLISHED)


# ---------------------------------------------------------------------------------------------------- splits


def articles(paragraphs: int = 8) -> list[dict]:
    return [
        {
            "title": f"article {a}",
            "paragraphs": [
                {
                    "context": f"paragraph {a}.{p} holds word{p}",
                    "qas": [
                        {
                            "id": f"{a}-{p}",
                            "question": f"what {p}?",
                            "answers": [{"text": f"word{p}", "answer_start": len(f"paragraph {a}.{p} holds ")}],
                        }
                    ],
                }
                for p in range(paragraphs)
            ],
        }
        for a in range(3)
    ]


def contexts_of(side: list[dict]) -> list[str]:
    return [paragraph["context"] for article in side for paragraph in article["paragraphs"]]


@pytest.mark.parametrize("seed", [0, 1])
def test_the_split_is_by_paragraph_complete_and_the_same_for_a_seed(seed):
    train, test = split_squad.split_by_paragraph(articles(), 0.25, seed)
    assert len(contexts_of(test)) == 6
    assert sorted(contexts_of(train) + contexts_of(test)) == sorted(contexts_of(articles()))
    assert (train, test) == split_squad.split_by_paragraph(articles(), 0.25, seed)
    assert test != split_squad.split_by_paragraph(articles(), 0.25, seed + 1)[1]


def test_added_unanswerable_questions_have_new_ids_and_no_answer_in_their_paragraph():
    before = articles()
    after = split_squad.add_unanswerable(before, 0.5, seed=0)
    assert before == articles()
    pairs = [(p["context"], q) for article in after for p in article["paragraphs"] for q in p["qas"]]
    added = [(context, question) for context, question in pairs if not question["answers"]]
    assert len(pairs) == 24 + 12
    assert len(added) == 12
    assert len({question["id"] for _, question in pairs}) == len(pairs)
    for context, question in added:
        number = question["question"].removeprefix("what ").removesuffix("?")
        assert f"word{number}" not in context


@pytest.mark.skipif(not XQUAD.exists(), reason=f"{XQUAD} is missing; set CMP_TRAINER_DATA")
def test_a_model_that_is_sure_of_the_labels_of_real_questions_answers_them(bert_tokenizer):
    examples = read_squad_file(XQUAD)
    windows, report = evaluation_windows(examples, bert_tokenizer, WindowSettings(384, 128, 128))
    assert (report.questions, report.misaligned_answers, report.cut_questions) == (1190, 0, 0)
    answers = read_answers(
        examples, windows, *oracle_logits(windows), AnswerSettings(max_answer_length=128), progress=False
    )
    metrics = squad_metrics.squad_metrics(
        list(answers.predictions.values()), [answer["text"] for answer in examples["answers"]]
    )
    assert metrics["exact_match"] > 98  # the rest begin or end inside a token


@pytest.mark.skipif(not XQUAD.exists(), reason=f"{XQUAD} is missing; set CMP_TRAINER_DATA")
def test_v2_questions_made_of_real_ones_are_told_apart_by_a_model_that_is_sure(tmp_path, bert_tokenizer):
    _, test = split_squad.split_by_paragraph(json.loads(XQUAD.read_text(encoding="utf-8"))["data"], 0.25, seed=0)
    (tmp_path / "test.json").write_text(json.dumps({"data": split_squad.add_unanswerable(test, 0.5, seed=0)}))
    examples = read_squad_file(tmp_path / "test.json")
    right = [answer["text"] for answer in examples["answers"][:]]
    windows, _ = evaluation_windows(examples, bert_tokenizer, WindowSettings(384, 128, 128))
    for threshold, is_answered in ((0.0, True), (-1000.0, False)):
        answer_settings = AnswerSettings(max_answer_length=128, unanswerable=True, null_threshold=threshold)
        answers = read_answers(examples, windows, *oracle_logits(windows), answer_settings, progress=False)
        metrics = squad_metrics.squad_v2_metrics(
            list(answers.predictions.values()), list(answers.spans.values()), list(answers.null_odds.values()), right
        )
        assert (metrics["HasAns_total"], metrics["NoAns_total"]) == (301, 150)
        assert metrics["NoAns_f1"] == 100
        assert metrics["HasAns_f1"] > 98 if is_answered else metrics["HasAns_f1"] == 0
        # whatever threshold was chosen, the best one is found
        assert metrics["best_f1"] > 99


def test_metrics_are_there_during_training_and_choose_the_best_checkpoint(tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer)
    steps = ["--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps", "--save_steps=1"]
    best = ["--load_best_model_at_end=true", "--metric_for_best_model=f1", "--cmp_num_ablations=1"]
    main([*arguments, "--do_train", *steps, *best])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logged = [entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry]
    assert len(logged) == 3
    assert state["best_metric"] == max(logged)


def test_the_loss_of_evaluation_is_the_model_s_own_on_the_labels(tmp_path, bert_tokenizer):
    """eval_loss and the scores come from one pass over the windows; neither changes the other."""
    arguments = write_small_data(tmp_path, bert_tokenizer)
    main([*arguments, "--do_eval", "--per_device_eval_batch_size=64"])
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    examples = read_squad_file(tmp_path / "rows.json")
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    columns = ["input_ids", "attention_mask", "start_positions", "end_positions"]
    batch = DataCollatorWithPadding(bert_tokenizer)([{c: window[c] for c in columns} for window in windows])
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_a_prefix_without_scorer_is_refused_by_name(tmp_path, bert_tokenizer):
    write_small_data(tmp_path, bert_tokenizer)
    windows, _ = evaluation_windows(read_squad_file(tmp_path / "rows.json"), bert_tokenizer, SMALL)
    trainer = QuestionAnsweringTrainer(
        model=BertForQuestionAnswering.from_pretrained(tmp_path / "model"),
        args=CmpTrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True),
        data_collator=DataCollatorWithPadding(bert_tokenizer),
        scorers={"eval": lambda start, end: {}},
    )
    with pytest.raises(ValueError, match=r"no scorer for metric_key_prefix='other'; there are some for \['eval'\]"):
        trainer.evaluate(windows, metric_key_prefix="other")

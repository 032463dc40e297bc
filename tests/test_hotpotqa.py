"""examples/hotpotqa: inputs, answers in them, metrics and whole runs."""

import doctest
import json
import os
import shutil
from itertools import combinations_with_replacement
from pathlib import Path

import analyze_hotpotqa
import hotpot_answers
import hotpot_data
import hotpot_inputs
import numpy as np
import pytest
import torch
from datasets import Dataset
from hotpot_answers import answer_scores, best_spans, joint_predictions, read_answers, score_answers
from hotpot_data import NO, QUESTION, TEXT, TITLE, YES, Limits, add_markers, encode_questions
from hotpot_inputs import (
    NO_POSITION,
    NO_SPAN,
    NOT_TEXT,
    YES_SPAN,
    EvaluationInputs,
    InputBuilder,
    NewEpochs,
    TrainingInputs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from run_hotpotqa import HotpotArguments, main
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    LongformerConfig,
    LongformerForQuestionAnswering,
    PreTrainedTokenizerFast,
    TrainerState,
)

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.scripting import ModelArguments, parse_arguments

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "hotpotqa" / "configs").glob("*.yaml"))
DATA = Path(os.environ.get("CMP_TRAINER_DATA", ROOT.parent / "shared" / "data")) / "hotpotqa" / "distractor_100.jsonl"


def question(number, answer, kind="bridge"):
    """A question with two supporting paragraphs, the second of which holds "Lake Zoë" twice, and two distractors."""
    titles = [f"Town {number}", "Lake", "Hill", "Mill"]
    sentences = [
        [f"Town {number} lies at the lake.", " It is an old town with a mill."],
        ["The name of the lake is Lake Zoë 🐟.", " Lake Zoë is deep.", " Nobody swims in Lake Zoë."],
        ["The hill is not far.", " Lake Zoë is seen from it."],
        ["The mill stands still.", ""],
    ]
    return {
        "id": f"q{number}",
        "question": f"Which lake lies at town {number}?",
        "answer": answer,
        "type": kind,
        "level": "easy",
        "supporting_facts": {"title": [titles[0], "Lake", "Lake"], "sent_id": [0, 0, 1]},
        "context": {"title": titles, "sentences": sentences},
    }


QUESTIONS = [question(0, "Lake Zoë"), question(1, "yes"), question(2, "No"), question(3, "Atlantis")]
LIMITS = Limits(max_length=128)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["".join(p) for one in QUESTIONS for p in one["context"]["sentences"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    add_markers(made)
    return made


def longformer_of(tokenizer):
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=len(tokenizer) - 5,  # add_markers has to make room
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        attention_window=16,
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    return LongformerForQuestionAnswering(config)


def bert_of(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer) - 5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForQuestionAnswering(config)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return encode_questions(Dataset.from_list(QUESTIONS), tokenizer, LIMITS, "train")


def builder_of(tokenizer, limits=LIMITS, model=longformer_of):
    return InputBuilder(tokenizer, limits, model(tokenizer))


# --- questions and inputs ---


def test_an_input_is_markers_question_and_paragraphs(tokenizer, encoded):
    row = EvaluationInputs(encoded, builder_of(tokenizer))[0]
    text = tokenizer.decode(row["input_ids"])
    parts = "".join(
        f"{TITLE}{title}{TEXT}{''.join(sentences)}"
        for title, sentences in zip(*(QUESTIONS[0]["context"][name] for name in ("title", "sentences")), strict=True)
    )
    assert text.replace(" ", "") == f"<s>{YES}{NO}{QUESTION}{QUESTIONS[0]['question']}</s>{parts}</s>".replace(" ", "")


def test_yes_no_question_and_markers_are_attended_globally(tokenizer, encoded):
    row = EvaluationInputs(encoded, builder_of(tokenizer))[0]
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    end_of_question = tokens.index("</s>")
    expected = [int(t in (YES, NO, TITLE, TEXT) or 0 < n < end_of_question) for n, t in enumerate(tokens)]
    assert row["global_attention_mask"] == expected


def test_models_without_global_attention_get_token_types_where_their_tokenizer_has_them(tokenizer, encoded):
    row = EvaluationInputs(encoded, builder_of(tokenizer, model=bert_of))[0]
    assert "global_attention_mask" not in row
    end_of_question = row["input_ids"].index(tokenizer.sep_token_id)
    assert row["token_type_ids"] == [int(n > end_of_question) for n in range(len(row["input_ids"]))]


def test_distractors_are_the_removable_segments(tokenizer, encoded):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    row = inputs[0]
    batch = CmpCropCollator(tokenizer)([row])
    crop = CmpCrop(pad_values={"input_ids": 1})
    (full, once) = crop.batches(batch | {"crop_segments": (batch["crop_segments"] > 0).long()}, num_levels=1)
    assert once["input_ids"][0].tolist() == EvaluationInputs(encoded, builder_of(tokenizer), 2)[0]["input_ids"]
    assert set(row["crop_segments"]) == {0, 1, 2}
    assert full["input_ids"].shape > once["input_ids"].shape


def test_training_draws_shuffles_and_occurrences_anew_for_each_epoch_and_the_same_for_one_seed(tokenizer, encoded):
    inputs = TrainingInputs(encoded, builder_of(tokenizer), seed=3)
    again = TrainingInputs(encoded, builder_of(tokenizer), seed=3)
    rows = []
    for epoch in range(12):
        inputs.set_epoch(epoch), again.set_epoch(epoch)
        assert inputs[0] == again[0]
        rows.append(inputs[0])
    assert len({tuple(row["input_ids"]) for row in rows}) > 6
    answers = [tokenizer.decode(r["input_ids"][r["start_positions"] : r["end_positions"] + 1]).strip() for r in rows]
    assert set(answers) == {"Lake Zoë"}
    follow = {tokenizer.decode(row["input_ids"][row["end_positions"] + 1 :])[:6] for row in rows}
    assert len(follow) == 2  # both occurrences in supporting sentences, none of the other sentences'


@pytest.mark.parametrize(("at", "epoch"), [(None, 0), (1.0, 1), (0.9999999999, 1), (1.4, 1)])
def test_training_inputs_are_told_which_epoch_begins_also_in_the_middle_of_one(tokenizer, encoded, at, epoch):
    inputs = TrainingInputs(encoded, builder_of(tokenizer))
    NewEpochs(inputs).on_epoch_begin(None, TrainerState(epoch=at), None)
    assert inputs.epoch == epoch


@pytest.mark.parametrize(("row", "marker"), [(1, YES), (2, NO)])
def test_yes_and_no_are_spans_of_one_token(tokenizer, encoded, row, marker):
    made = EvaluationInputs(encoded, builder_of(tokenizer))[row]
    assert made["start_positions"] == made["end_positions"]
    assert tokenizer.convert_ids_to_tokens(made["input_ids"][made["start_positions"]]) == marker


def test_questions_without_a_found_answer_are_counted_left_out_of_training_and_kept_in_evaluation(tokenizer, caplog):
    encoded = encode_questions(Dataset.from_list(QUESTIONS), tokenizer, LIMITS, "train")
    assert "1 of 4 questions are not found" in caplog.text
    assert len(TrainingInputs(encoded, builder_of(tokenizer))) == 3
    assert "1 of 4 questions are left out" in caplog.text
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    assert len(inputs) == 4
    assert inputs[3]["start_positions"] == NO_POSITION


@pytest.mark.parametrize("max_length", [128, 90, 70, 52])
def test_distractors_give_way_so_that_training_keeps_the_answer(tokenizer, encoded, max_length):
    limits = Limits(max_length)
    inputs = TrainingInputs(encoded, builder_of(tokenizer, limits))
    for epoch in range(5):
        inputs.set_epoch(epoch)
        for row in inputs:
            assert len(row["input_ids"]) <= max_length
            assert row["end_positions"] < max_length


def test_cut_evaluation_inputs_are_counted_and_their_lost_answers_ignored(tokenizer, encoded, caplog):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer, Limits(40)))
    assert "4 of 4 questions have their last paragraphs cut off" in caplog.text
    assert inputs[0]["start_positions"] == NO_POSITION
    assert max(len(row["input_ids"]) for row in inputs) <= 40


def test_training_without_any_answer_is_refused(tokenizer, encoded):
    with pytest.raises(ValueError, match="no question of the training data has an answer that fits"):
        TrainingInputs(encoded.select([3]), builder_of(tokenizer))


def test_inputs_longer_than_the_model_takes_are_refused(tokenizer):
    with pytest.raises(ValueError, match="--max_length 301, but the model takes at most 300"):
        builder_of(tokenizer, Limits(301))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, r"row 1 \(id q1\) has an empty question"),
        ({"context": {"title": ["One"], "sentences": [["A."], ["B."]]}}, r"id q1\) has 1 titles for 2 paragraphs"),
        ({"context": {"title": [], "sentences": []}}, "0 titles for 0 paragraphs"),
        ({"id": "q0"}, "row 1 has the id 'q0' of row 0"),
        ({"id": None}, "row 1 has no id"),
    ],
)
def test_rows_that_are_not_hotpotqas_are_refused_by_name(tokenizer, change, message):
    rows = Dataset.from_list([QUESTIONS[0], QUESTIONS[1] | change])
    with pytest.raises(ValueError, match=message):
        encode_questions(rows, tokenizer, LIMITS, "train")


def test_contexts_of_other_shape_are_refused(tokenizer):
    rows = Dataset.from_list([{"id": "q", "question": "Where?", "context": "Here."}])
    with pytest.raises(ValueError, match="context is str; expected title and sentences"):
        encode_questions(rows, tokenizer, LIMITS, "test")


def test_supporting_facts_of_another_form_are_refused(tokenizer):
    rows = Dataset.from_list([QUESTIONS[0] | {"supporting_facts": [["Lake", "0"]]}])
    with pytest.raises(ValueError, match="row 0: supporting_facts is list; expected title and sent_id"):
        encode_questions(rows, tokenizer, LIMITS, "train")


# --- answers ---


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_best_span_is_the_best_of_all_that_are_allowed(data):
    length = data.draw(st.integers(1, 10))
    logits = st.lists(st.floats(-9, 9, width=32), min_size=length, max_size=length)
    starts, ends = torch.tensor(data.draw(logits)), torch.tensor(data.draw(logits))
    paragraph = [YES_SPAN, NO_SPAN, *sorted(data.draw(st.lists(st.integers(NOT_TEXT, 2), max_size=length)))]
    starts, ends = torch.cat([torch.zeros(2), starts]), torch.cat([torch.zeros(2), ends])
    paragraph = torch.tensor(paragraph + [NOT_TEXT] * (len(starts) - len(paragraph)))
    longest = data.draw(st.integers(1, 5))
    allowed = [
        (first, last)
        for first, last in combinations_with_replacement(range(len(starts)), 2)
        if last - first < longest and paragraph[first] == paragraph[last] != NOT_TEXT
    ]
    ((first, last),) = best_spans(starts[None], ends[None], paragraph[None], longest).tolist()
    assert (first, last) in allowed
    assert starts[first] + ends[last] == max(starts[a] + ends[b] for a, b in allowed)


def test_logits_at_the_labels_give_back_the_answers(tokenizer, encoded):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    logits = np.zeros((2, len(inputs), 128), dtype=np.float32)
    for row, made in enumerate(inputs):
        if made["start_positions"] != NO_POSITION:
            logits[0, row, made["start_positions"]] = logits[1, row, made["end_positions"]] = 9
    answers = read_answers(inputs, *logits)
    assert list(answers.values())[:3] == ["Lake Zoë", "yes", "no"]
    assert score_answers(answers, encoded) == {"exact_match": 75.0, "f1": 75.0, "questions": 4}
    assert joint_predictions(answers) == {"answer": answers, "sp": {one: [] for one in answers}}


def test_nan_logits_are_refused(tokenizer, encoded):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    with pytest.raises(ValueError, match="NaN"):
        read_answers(inputs, *np.full((2, 4, 128), np.nan, dtype=np.float32))


@pytest.mark.parametrize(
    ("prediction", "answer", "scores"),
    [
        ("The Lake Zoë!", "lake Zoë", (100, 100)),
        ("deep Lake Zoë", "Lake Zoë", (0, 80)),
        ("no", "no man", (0, 0)),
        ("yes sir", "yes", (0, 0)),
        ("No.", "no man", (0, 0)),  # special after the normalization, as in HotpotQA's evaluation
        ("Yes", "yes", (100, 100)),
    ],
)
def test_scores_are_squads_and_a_wrong_yes_or_no_shares_no_words(prediction, answer, scores):
    assert answer_scores(prediction, answer) == pytest.approx(scores, abs=1e-4)


def test_questions_without_an_answer_are_counted_and_not_scored(tokenizer, caplog):
    rows = Dataset.from_list([QUESTIONS[0], QUESTIONS[1] | {"answer": None}])
    encoded = encode_questions(rows, tokenizer, LIMITS, "validation")
    scores = score_answers({"q0": "Lake Zoë", "q1": "?"}, encoded)
    assert scores == {"exact_match": 100.0, "f1": 100.0, "questions": 1}
    assert "1 of 2 questions come without an answer" in caplog.text


@pytest.mark.parametrize("module", [hotpot_data, hotpot_inputs, hotpot_answers])
def test_examples_in_docstrings_are_right(module):
    assert doctest.testmod(module).failed == 0


# --- runs ---


@pytest.fixture(scope="module", params=[longformer_of, bert_of], ids=["longformer", "bert"])
def folder(request, tokenizer, tmp_path_factory):
    """A model, its tokenizer and data to run the scripts on."""
    folder = tmp_path_factory.mktemp("hotpotqa")
    request.param(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return folder


def run_main(folder, config, *more, output=None):
    output = output or folder / config.stem
    main(
        [str(config), "--model_name_or_path", str(folder / "model"), "--output_dir", str(output)]
        + ["--train_file", str(folder / "data.jsonl"), "--validation_file", str(folder / "data.jsonl")]
        + ["--max_length", "128", "--eval_max_length", "128", "--per_device_train_batch_size", "2", "--max_steps", "2"]
        + ["--report_to", "none", "--logging_steps", "1", "--use_cpu", "true", *more]
    )
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name", ["longformer_crop_drop", "longformer_baseline"])
def test_a_run_trains_evaluates_and_writes_hotpotqas_predictions(folder, name):
    config = next(one for one in CONFIGS if one.stem == name)
    log = run_main(folder, config)
    assert ("loss_ablated_2" in log[0]) == (name == "longformer_crop_drop")
    results = json.loads((folder / name / "eval_results.json").read_text())
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(results)
    predictions = json.loads((folder / name / "eval_predictions.json").read_text())
    assert list(predictions["answer"]) == list(predictions["sp"]) == ["q0", "q1", "q2", "q3"]
    card = (folder / name / "README.md").read_text()
    assert "local files (train: data.jsonl, validation: data.jsonl)" in card and str(folder) not in card


def test_a_run_that_is_resumed_in_an_epoch_ends_with_the_weights_of_an_unbroken_one(folder, tmp_path):
    config = next(one for one in CONFIGS if one.stem == "longformer_crop_drop")
    settings = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--do_eval", "false"]
    log = run_main(folder, config, *settings, output=tmp_path)  # two steps an epoch, with shuffled paragraphs
    unbroken = load_file(tmp_path / "model.safetensors")
    half = shutil.move(tmp_path / "checkpoint-3", tmp_path / "half")
    log_of_half = run_main(folder, config, *settings, "--resume_from_checkpoint", str(half), output=tmp_path / "2")
    assert log_of_half[-1]["train_loss"] != log[-1]["train_loss"]  # the mean of the last three steps, and of all six
    resumed = load_file(tmp_path / "2" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in unbroken.items())


def test_unlabelled_questions_are_predicted_and_not_scored(folder):
    rows = [{name: one[name] for name in ("id", "question", "context")} for one in QUESTIONS]
    test_file = folder / "test.jsonl"
    test_file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    main(
        ["--model_name_or_path", str(folder / "model"), "--test_file", str(test_file), "--do_predict"]
        + ["--max_length", "128", "--output_dir", str(folder / "predicted"), "--report_to", "none", "--use_cpu"]
    )
    assert len(json.loads((folder / "predicted" / "test_predictions.json").read_text())["answer"]) == 4
    assert "test_f1" not in json.loads((folder / "predicted" / "test_results.json").read_text())


def test_missing_columns_are_named(folder):
    rows = [{name: value for name, value in one.items() if name != "context"} for one in QUESTIONS]
    (folder / "no_context.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    arguments = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "never"), "--do_eval"]
    with pytest.raises(ValueError, match="no column 'context'"):
        main.__wrapped__([*arguments, "--validation_file", str(folder / "no_context.jsonl")])


def test_checkpoints_are_analyzed_side_by_side(folder, capsys):
    model = str(folder / "model")
    analyze_hotpotqa.main(
        ["--checkpoints", f"one={model}", f"other={model}", "--validation_file", str(folder / "data.jsonl")]
        + ["--max_length", "128", "--paragraphs", "2", "4", "--drops", "0", "3"]
        + ["--output_dir", str(folder / "analysis")]
    )
    points = json.loads((folder / "analysis" / "analysis.json").read_text())
    assert [(p["curve"], p["at"]) for p in points[:4]] == [
        ("paragraphs", 2),
        ("paragraphs", 4),
        ("drops", 0),
        ("drops", 3),
    ]
    assert points[:4] == [{**point, "checkpoint": "one"} for point in points[4:]]
    assert "| Cumulative drops | one | other |" in capsys.readouterr().out
    assert (folder / "analysis" / "analysis.png").stat().st_size > 10_000


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_configs_are_valid_and_train_as_published(config):
    _, data_args, args = parse_arguments(
        ModelArguments, HotpotArguments, CmpTrainingArguments, argv=[str(config), "--use_cpu"]
    )
    assert (data_args.max_length, data_args.eval_max_length, args.learning_rate) == (2048, 4096, 3e-5)
    assert (data_args.max_question_length, data_args.max_paragraph_length) == (160, 256)
    assert (data_args.max_answer_length, args.lr_scheduler_type) == (64, "linear")
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (3, 6)
    assert args.get_warmup_steps(1000) == 100
    ablations = {"baseline": (0, 0), "drop": (1, 0), "crop": (1, 1)}
    shape = config.stem.removeprefix("longformer_")
    assert (args.cmp_num_ablations, args.cmp_num_crops) == ablations.get(shape, (2, 1))
    weighting = {"weighting_average": "mean", "weighting_first": "full", "weighting_max": "max"}
    if shape in weighting:
        assert (args.cmp_objective, args.cmp_primary, args.cmp_weight) == ("regularized", weighting[shape], 0)
    else:
        assert (args.cmp_objective, args.cmp_baseline) == ("comparative", "zero")


def test_there_is_a_config_for_each_published_shape():
    shapes = ["baseline", "crop", "crop_drop", "drop", "weighting_average", "weighting_first", "weighting_max"]
    assert [config.stem.removeprefix("longformer_") for config in CONFIGS] == shapes


# --- real data ---


@pytest.mark.skipif(not DATA.exists(), reason=f"real data is not at {DATA}")
def test_answers_of_real_questions_are_found_where_they_stand(tokenizer):
    rows = Dataset.from_json(str(DATA)).select(range(30))
    limits = Limits(8000, 500, 4000)  # the small vocabulary makes many tokens
    encoded = encode_questions(rows, tokenizer, limits, "train")
    assert set(encoded["kind"]) <= {"yes", "no", "span"}
    for example in encoded:
        for number, spans in enumerate(example["spans"]):
            for first, last in spans:
                found = slice(example["text_starts"][number][first], example["text_ends"][number][last])
                assert example["answer"] in example["paragraphs"][number][found]
        assert sum(example["supporting"]) == 2

"""examples/hotpotqa: inputs, answers in them, metrics and whole runs."""

import doctest
import json
import os
import shutil
from pathlib import Path

import analyze_hotpotqa
import hotpot_answers
import hotpot_data
import hotpot_inputs
import numpy as np
import pytest
import torch
from datasets import Dataset
from hotpot_answers import answer_scores, joint_predictions, score_answers
from hotpot_data import NO, QUESTION, TEXT, TITLE, YES, Limits, add_markers, encode_questions
from hotpot_inputs import EvaluationInputs, InputBuilder, NewEpochs, TrainingInputs
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
from cmp_trainer.data.answers import AnswerSettings, read_answers
from cmp_trainer.data.tables import load_file as load_table
from cmp_trainer.data.windows import NO_LABEL
from cmp_trainer.scripting import ModelArguments, parse_arguments
from tests.answer_helpers import word_pieces, wrapped

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
    assert inputs[3]["start_positions"] == NO_LABEL


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
    assert inputs[0]["start_positions"] == NO_LABEL
    assert max(len(row["input_ids"]) for row in inputs) <= 40


def test_training_without_any_answer_is_refused(tokenizer, encoded):
    with pytest.raises(ValueError, match="no question of the training data has an answer that fits"):
        TrainingInputs(encoded.select([3]), builder_of(tokenizer))


TITLES, SENTENCES = (QUESTIONS[1]["context"][name] for name in ("title", "sentences"))


def context(titles, sentences):
    return {"context": {"title": titles, "sentences": sentences}}


def facts(titles, numbers):
    return {"supporting_facts": {"title": titles, "sent_id": numbers}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "no text as question"),
        (context(["One"], [["A."], ["B."]]), "1 entries in the title of context and 2 in its sentences"),
        (context([], []), "no paragraphs"),
        (context(None, SENTENCES), "context of another form; expected lists of title and sentences"),
        (context(TITLES, None), "context of another form; expected lists of title and sentences"),
        (context([None, *TITLES[1:]], SENTENCES), "no text as title 1 of context, but None"),
        (context(TITLES, [None, *SENTENCES[1:]]), "no list as sentences 1 of context, but None"),
        (context(TITLES, [["A.", None], *SENTENCES[1:]]), "a sentence that is no text in paragraph 1"),
        (facts(["Lake"], [0, 1]), "1 entries in the title of supporting_facts and 2 in its sent_id"),
        (facts(["Lake"], [None]), "no int as sent_id 1 of supporting_facts, but None"),
        ({"id": "q0"}, "the id of row 1; give each its own"),
    ],
)
def test_rows_that_are_not_hotpotqas_are_refused_with_id_and_fault(tokenizer, tmp_path, change, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (QUESTIONS[0], QUESTIONS[1] | change)))
    with pytest.raises(ValueError, match=rf"train, row 2 \(id {change.get('id', 'q1')}\) has {message}"):
        encode_questions(load_table(path, "train"), tokenizer, LIMITS, "train")


def test_a_row_without_id_is_refused(tokenizer):
    with pytest.raises(ValueError, match="train, row 2 has no id"):
        encode_questions(Dataset.from_list([QUESTIONS[0], QUESTIONS[1] | {"id": None}]), tokenizer, LIMITS, "train")


@pytest.mark.parametrize("change", [{"context": "Here."}, {"supporting_facts": [["Lake", "0"]]}])
def test_columns_of_another_form_are_refused(tokenizer, change):
    with pytest.raises(ValueError, match=r"row 1 \(id q0\) has (context|supporting_facts) of another form; expected"):
        encode_questions(Dataset.from_list([QUESTIONS[0] | change]), tokenizer, LIMITS, "train")


def test_numbers_are_read_as_the_text_of_answers_and_ids(tokenizer, tmp_path):
    row = question(0, 1984) | {"id": 7}
    row["context"]["sentences"][1] = ["The lake was made in 1984."]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")  # with a byte order mark
    encoded = encode_questions(load_table(tmp_path / "rows.jsonl", "train"), tokenizer, LIMITS, "train")
    assert (encoded["id"][0], encoded["answer"][0], encoded["kind"][0]) == ("7", "1984", "span")


def test_questions_without_a_removable_paragraph_are_counted_and_all_of_them_are_refused(tokenizer, caplog):
    gold = question(4, "Lake Zoë")
    gold["context"] = {name: values[:2] for name, values in gold["context"].items()}
    builder = builder_of(tokenizer)
    encoded = encode_questions(Dataset.from_list([QUESTIONS[0], gold]), tokenizer, LIMITS, "train")
    TrainingInputs(encoded, builder).check_crops(1)
    assert "1 of 2 questions have no paragraph to remove" in caplog.text
    for rows, num_paragraphs in ((encoded.select([1]), None), (encoded, 2)):
        inputs = TrainingInputs(rows, builder, num_paragraphs)
        inputs.check_crops(0)
        with pytest.raises(ValueError, match="--cmp_num_crops 1, but no training question has a paragraph to remove"):
            inputs.check_crops(1)


# --- answers ---


def read(inputs, logits):
    settings = AnswerSettings(1, 64, all_spans=True)
    return read_answers(inputs.encoded, inputs.tokens(), *logits, settings, progress=False).predictions


def logits_at_the_labels(inputs):
    logits = np.zeros((2, len(inputs), 128), dtype=np.float32)
    for row, made in enumerate(inputs):
        if made["start_positions"] != NO_LABEL:
            logits[0, row, made["start_positions"]] = logits[1, row, made["end_positions"]] = 9
    return logits


def test_logits_at_the_labels_give_back_the_answers(tokenizer, encoded):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    answers = read(inputs, logits_at_the_labels(inputs))
    assert list(answers.values())[:3] == ["Lake Zoë", "yes", "no"]
    assert score_answers(answers, encoded) == {"exact_match": 75.0, "f1": 75.0, "questions": 4}
    assert joint_predictions(answers) == {"answer": answers, "sp": {one: [] for one in answers}}


def test_a_span_lies_within_one_paragraph_and_yes_and_no_are_spans_of_their_own(tokenizer, encoded):
    inputs = EvaluationInputs(encoded, builder_of(tokenizer))
    tokens = inputs.tokens()[0]
    logits = np.zeros((2, len(inputs), 128))
    segments = np.array(tokens["segments"])
    logits[0, 0, np.flatnonzero(segments == 0)[-1]] = logits[1, 0, np.flatnonzero(segments == 1)[0]] = 9
    logits[0, 1, tokens["token_starts"].index(0)] = logits[1, 1, tokens["token_starts"].index(3)] = 9  # yes … no
    answers = read(inputs, logits)
    assert answers["q0"] in "".join(QUESTIONS[0]["context"]["sentences"][0]) or "Zoë" not in answers["q0"]
    assert answers["q1"] in ("yes", "no")


@pytest.mark.parametrize("answer", ["पहाड़ों", "में"])
def test_words_that_end_in_combining_marks_are_found_and_given_back_whole(answer):
    """With a tokenizer that strips accents, as BERT's does, such marks belong to no token."""
    sentence = "नदी उत्तर में पहाड़ों से निकलती है।"
    tokenizer = wrapped(word_pieces(sentence))
    add_markers(tokenizer)
    row = question(0, answer)
    row["context"]["sentences"][1] = [sentence]
    encoded = encode_questions(Dataset.from_list([row]), tokenizer, Limits(500), "validation")
    inputs = EvaluationInputs(encoded, InputBuilder(tokenizer, Limits(500), bert_of(tokenizer)))
    made = inputs[0]
    logits = np.zeros((2, 1, len(made["input_ids"])))
    logits[0, 0, made["start_positions"]] = logits[1, 0, made["end_positions"]] = 9
    assert read(inputs, logits) == {"q0": answer}


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


@pytest.mark.parametrize("module", [hotpot_data, hotpot_inputs, hotpot_answers, analyze_hotpotqa])
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

    results = json.loads((folder / "predicted" / "all_results.json").read_text())
    assert "test_loss" not in results
    assert np.isfinite([value for value in results.values() if not isinstance(value, str)]).all()


def test_batches_without_a_label_do_not_count_in_the_loss(folder):
    arguments = ["--model_name_or_path", str(folder / "model"), "--do_eval", "--max_length", "128"]
    arguments += ["--report_to", "none", "--use_cpu", "--per_device_eval_batch_size", "1"]
    arguments += ["--logging_nan_inf_filter", "false"]  # transformers 5 would leave NaN out, 4 would not
    losses = []
    for name, rows in (("labelled", QUESTIONS[:3]), ("all", QUESTIONS)):  # the answer of the last is not found
        file, output = folder / f"{name}.jsonl", folder / f"{name}_evaluated"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        main([*arguments, "--validation_file", str(file), "--output_dir", str(output)])
        losses.append(json.loads((output / "eval_results.json").read_text())["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--do_train", "--max_length", "301"], "--max_length 301 is more than the model takes; pass at most"),
        (
            ["--do_eval", "--eval_max_length", "999", "--max_length", "9"],
            "--eval_max_length 999 is more than the model",
        ),
        (
            ["--do_train", "--max_length", "128", "--num_paragraphs", "2"],
            "no training question has a paragraph to remove",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_training(folder, arguments, message):
    files = [f"--{split}_file={folder / 'data.jsonl'}" for split in ("train", "validation")]
    base = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "refused"), "--use_cpu"]
    with pytest.raises(ValueError, match=message):
        main.__wrapped__([*base, *files, *arguments, "--cmp_num_ablations=1", "--cmp_num_crops=1"])


def test_missing_columns_are_named(folder):
    rows = [{name: value for name, value in one.items() if name != "context"} for one in QUESTIONS]
    (folder / "no_context.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    arguments = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "never"), "--do_eval"]
    with pytest.raises(ValueError, match="no column 'context'"):
        main.__wrapped__([*arguments, "--validation_file", str(folder / "no_context.jsonl"), "--max_length", "128"])


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


def test_an_analysis_without_ablation_is_the_script_s_evaluation_to_the_digit(folder):
    arguments = ["--validation_file", str(folder / "data.jsonl"), "--max_length", "128"]
    run = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "evaluated"), "--use_cpu"]
    main([*arguments, *run, "--do_eval", "--per_device_eval_batch_size", "3", "--report_to", "none"])
    evaluated = json.loads((folder / "evaluated" / "eval_results.json").read_text())
    which = ["--checkpoints", str(folder / "model"), "--batch_size", "3", "--paragraphs", "4", "--drops", "0", "1"]
    analyze_hotpotqa.main([*arguments, *which, "--output_dir", str(folder / "one_analysis")])
    points = json.loads((folder / "one_analysis" / "analysis.json").read_text())
    assert [(point["curve"], point["at"]) for point in points] == [("paragraphs", 4), ("drops", 0), ("drops", 1)]
    for point in points[:2]:
        for name in ("loss", "exact_match", "f1", "questions"):
            assert point[name] == evaluated[f"eval_{name}"]
    assert points[2]["loss"] != points[1]["loss"]


def test_checkpoints_are_named_by_folders_that_may_have_one_name_or_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a/best", "b/best", "lr=1e-5/best"):
        Path(path).mkdir(parents=True)
    named = analyze_hotpotqa.named(["a/best", "b/best", "lr=1e-5/best", "mine=lr=1e-5/best"])
    assert named == [
        ("a/best", "a/best"),
        ("b/best", "b/best"),
        ("lr=1e-5/best", "lr=1e-5/best"),
        ("mine", "lr=1e-5/best"),
    ]
    with pytest.raises(ValueError, match="two are called x; name them"):
        analyze_hotpotqa.named(["x=a/best", "x=b/best"])


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
                assert example["answer"] in example["context"][found]
        assert sum(example["supporting"]) == 2

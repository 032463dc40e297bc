"""examples/squad: whole runs, its trainer, its configs and the splits of a file."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import split_squad
import torch
from datasets import Dataset
from qa_trainer import QuestionAnsweringTrainer
from run_squad import ModelArguments, SquadArguments, main
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from cmp_trainer import CmpTrainingArguments, cli
from cmp_trainer.curve_data import prepare
from cmp_trainer.data.answer_metrics import squad_metrics, squad_v2_metrics
from cmp_trainer.data.answers import AnswerSettings, read_answers
from cmp_trainer.data.questions import read_questions
from cmp_trainer.data.windows import WindowSettings, evaluation_windows
from cmp_trainer.scripting import parse_arguments
from tests.answer_helpers import CONTEXT, SMALL, about, oracle_logits, word_pieces, wrapped

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "squad" / "configs"
XQUAD = Path(os.environ.get("CMP_TRAINER_DATA", ROOT.parent / "shared" / "data")) / "squad" / "xquad.en.json"
TINY = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

TOWNS = about(CONTEXT, "nine old towns")[0]
UNANSWERABLE = {**TOWNS, "answers": {"text": [""], "answer_start": [-1]}}
OFF_BY_ONE = {**TOWNS, "answers": {"text": ["nine old towns"], "answer_start": [CONTEXT.index("nine") + 1]}}


@pytest.fixture(scope="module")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    return wrapped(word_pieces())


# --- the run ---


def write_small_data(
    folder: Path, tokenizer: PreTrainedTokenizerFast, v2: bool = False, positions: int = 64
) -> list[str]:
    """A tiny model and files of few questions; the arguments that use them."""
    words = ["river", "nine old towns", "lake", "north", "name", "map"]
    rows = [
        {"id": f"q{n}", "question": f"which {word}?", "context": CONTEXT, "answers": answers(word, v2 and n % 3 == 0)}
        for n, word in enumerate(words)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(**{**TINY, "max_position_embeddings": positions})
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
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert not {"test_f1", "test_loss"} & set(results)


def test_every_file_is_json_also_where_a_context_is_empty(tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer)
    rows = [{**UNANSWERABLE, "context": ""}, {**TOWNS, "id": "q1"}]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    files = [f"--validation_file={tmp_path / 'dev.json'}", "--version_2_with_negative=true"]
    main([*arguments, "--do_eval", *files, "--null_score_diff_threshold=1e9"])
    written = sorted((tmp_path / "out").glob("eval_*.json"))
    found = {path.name: json.loads(path.read_text(), parse_constant=pytest.fail) for path in written}
    assert set(found["eval_null_odds.json"]) == {"q0", "q1"}
    assert found["eval_predictions.json"]["q0"] == "" != found["eval_predictions.json"]["q1"]


@pytest.mark.parametrize("length", [65, 0])
def test_inputs_that_the_model_does_not_take_are_refused_at_the_start(length, tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer)
    (tmp_path / "rows.json").unlink()  # nothing is read before
    with pytest.raises(ValueError, match=f"--max_seq_length {length}"):
        main.__wrapped__([*arguments, "--do_train", f"--max_seq_length={length}"])


def test_inputs_of_the_longest_length_are_not_padded_past_it(tmp_path, bert_tokenizer):
    arguments = write_small_data(tmp_path, bert_tokenizer, positions=30)
    main([*arguments, "--do_eval", "--max_seq_length=30"])


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


# --- the command `cmp-trainer curve` gives the same numbers ---

FILES = {
    "v1": ([TOWNS, {**TOWNS, "question": "which lake?"}], []),
    "v2": ([TOWNS, UNANSWERABLE, {**TOWNS, "is_impossible": True}, TOWNS], []),
    "offsets off by one": ([TOWNS, OFF_BY_ONE, OFF_BY_ONE], ["2 of 3 questions: misaligned answers"]),
    "an empty context": ([TOWNS, {**UNANSWERABLE, "context": ""}], ["1 of 2 questions: empty contexts"]),
    "a long question": ([{**TOWNS, "question": "which river? " * 20}, TOWNS], ["2 of 2 questions: cut questions"]),
}


@pytest.mark.parametrize("file", FILES)
def test_a_curve_without_drops_is_the_script_s_evaluation_to_the_digit(file, tmp_path, bert_tokenizer, caplog):
    rows, told = FILES[file]
    arguments = write_small_data(tmp_path, bert_tokenizer)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**row, "id": number}) + "\n" for number, row in enumerate(rows)))
    lengths = ["--doc_stride=8", "--max_question_length=6"]  # those of windows of 24 tokens
    lengths += ["--per_device_eval_batch_size=2", "--logging_nan_inf_filter=false"]  # so that NaN would be seen
    v2 = any(not "".join(row["answers"]["text"]) for row in rows)
    main([*arguments, *lengths, f"--validation_file={data}", "--do_eval", f"--version_2_with_negative={v2}"])
    evaluated = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert all(line in caplog.text for line in told)
    caplog.clear()
    sizes = [
        "--max_length",
        "24",
        "--batch_size",
        "2",
        "--drops",
        "1",
        "--seeds",
        "1",
        "--output",
        str(tmp_path / "c"),
    ]
    cli.main(["curve", str(tmp_path / "model"), "--data", str(data), *sizes])
    assert all(line in caplog.text for line in told)
    measured = pd.read_csv(tmp_path / "c.csv", float_precision="round_trip").iloc[0]
    for name in ("loss", "exact_match", "f1"):
        assert np.isfinite(measured[name])
        assert measured[name] == evaluated[f"eval_{name}"]


def test_the_curve_of_a_model_that_says_no_answer_is_right_about_half_of_half_unanswerable_questions(bert_tokenizer):
    rows = Dataset.from_list([TOWNS, {**UNANSWERABLE, "id": "q1"}])
    data = prepare("question-answering", rows, bert_tokenizer, BertForQuestionAnswering(BertConfig(**TINY)), 24)
    logits = np.zeros((len(data.dataset), 24))
    logits[:, 0], logits[:, 12] = 9, 1  # null, and next some token of the context
    assert data.compute_metrics(EvalPrediction((logits, logits), None)) == {"exact_match": 50.0, "f1": 50.0}


@pytest.mark.parametrize("name", ["nested.json", "rows.csv", "rows.parquet"])
def test_a_curve_reads_questions_from_every_form_of_file(name, tmp_path, bert_tokenizer, capsys):
    write_small_data(tmp_path, bert_tokenizer)
    if name == "nested.json":
        answer = {"text": "lake", "answer_start": CONTEXT.index("lake")}
        paragraph = {"context": CONTEXT, "qas": [{"id": 7, "question": "where?", "answers": [answer]}]}
        (tmp_path / name).write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    elif name == "rows.csv":
        pd.DataFrame([{**TOWNS, "answers": json.dumps(TOWNS["answers"])}]).to_csv(tmp_path / name, index=False)
    else:
        Dataset.from_list([TOWNS]).to_parquet(tmp_path / name)
    sizes = ["--max_length", "24", "--drops", "1", "--seeds", "1"]
    cli.main(["curve", str(tmp_path / "model"), "--data", str(tmp_path / name), *sizes])
    assert "exact_match" in capsys.readouterr().out


# --- splits ---


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
    examples = read_questions(XQUAD)
    windows, report = evaluation_windows(examples, bert_tokenizer, WindowSettings(384, 128, 128))
    assert (report.questions, report.misaligned_answers, report.cut_questions) == (1190, 0, 0)
    answers = read_answers(
        examples, windows, *oracle_logits(windows), AnswerSettings(max_answer_length=128), progress=False
    )
    metrics = squad_metrics(list(answers.predictions.values()), [answer["text"] for answer in examples["answers"]])
    assert metrics["exact_match"] > 98  # the rest begin or end inside a token


@pytest.mark.skipif(not XQUAD.exists(), reason=f"{XQUAD} is missing; set CMP_TRAINER_DATA")
def test_v2_questions_made_of_real_ones_are_told_apart_by_a_model_that_is_sure(tmp_path, bert_tokenizer):
    _, test = split_squad.split_by_paragraph(json.loads(XQUAD.read_text(encoding="utf-8"))["data"], 0.25, seed=0)
    (tmp_path / "test.json").write_text(json.dumps({"data": split_squad.add_unanswerable(test, 0.5, seed=0)}))
    examples = read_questions(tmp_path / "test.json")
    right = [answer["text"] for answer in examples["answers"][:]]
    windows, _ = evaluation_windows(examples, bert_tokenizer, WindowSettings(384, 128, 128))
    for threshold, is_answered in ((0.0, True), (-1000.0, False)):
        answer_settings = AnswerSettings(max_answer_length=128, unanswerable=True, null_threshold=threshold)
        answers = read_answers(examples, windows, *oracle_logits(windows), answer_settings, progress=False)
        metrics = squad_v2_metrics(
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
    examples = read_questions(tmp_path / "rows.json")
    windows, _ = evaluation_windows(examples, bert_tokenizer, SMALL)
    columns = ["input_ids", "attention_mask", "start_positions", "end_positions"]
    batch = DataCollatorWithPadding(bert_tokenizer)([{c: window[c] for c in columns} for window in windows])
    model = BertForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_a_prefix_without_scorer_is_refused_by_name(tmp_path, bert_tokenizer):
    write_small_data(tmp_path, bert_tokenizer)
    windows, _ = evaluation_windows(read_questions(tmp_path / "rows.json"), bert_tokenizer, SMALL)
    trainer = QuestionAnsweringTrainer(
        model=BertForQuestionAnswering.from_pretrained(tmp_path / "model"),
        args=CmpTrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True),
        data_collator=DataCollatorWithPadding(bert_tokenizer),
        scorers={"eval": lambda start, end: {}},
    )
    with pytest.raises(ValueError, match=r"no scorer for metric_key_prefix='other'; there are some for \['eval'\]"):
        trainer.evaluate(windows, metric_key_prefix="other")

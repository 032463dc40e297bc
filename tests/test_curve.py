"""cmp-trainer curve: saved models and a labelled file become a table, files and a plot."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    EvalPrediction,
    XLNetConfig,
    XLNetForSequenceClassification,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from cmp_trainer import cli
from cmp_trainer.curve_data import prepare
from tests.helpers import SMALL, cmp_trainer, letter_tokenizer, tiny_bert, token_data


def save(folder, model):
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def write(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


@pytest.fixture
def models(tmp_path):
    kinds = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return [save(tmp_path / name, tiny_bert(seed, **kinds)) for seed, name in enumerate(["baseline", "comparative"])]


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", [{"sentence": f"{a} b c", "label": "ab".index(a)} for a in "abab"])


def curve(capsys, *arguments):
    cli.main(["curve", *arguments])
    return capsys.readouterr().out


def test_models_stand_side_by_side_in_table_files_and_plot(models, data, tmp_path, capsys):
    out = curve(
        capsys, *models, "--data", data, "--drops", "2", "--seeds", "2", "--output", str(tmp_path / "to" / "x")
    )
    assert len(re.findall(r"^ *(baseline|comparative) +drops +[012]", out, flags=re.M)) == 6
    table = pd.read_csv(tmp_path / "to" / "x.csv")
    assert list(table.columns[:7]) == [
        "model",
        "ablation",
        "level",
        "seed",
        "examples",
        "loss",
        "examples_in_violation",
    ]
    assert {"accuracy", "matthews_correlation", "f1"} <= set(table.columns)
    assert len(table) == 2 * 3 * 2 == len(json.loads((tmp_path / "to" / "x.json").read_text()))
    assert (tmp_path / "to" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_level_0_is_the_saved_models_loss_and_accuracy(models, data, tmp_path, capsys):
    curve(capsys, models[0], "--data", data, "--seeds", "1", "--output", str(tmp_path / "x"))
    batch = letter_tokenizer()(["a b c", "b b c"], return_tensors="pt")
    with torch.no_grad():
        outputs = tiny_bert(0, num_labels=2).eval()(**batch, labels=torch.tensor([0, 1]))
    full = pd.read_csv(tmp_path / "x.csv").query("level == 0").iloc[0]
    assert full["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert full["accuracy"] == (outputs.logits.argmax(-1) == torch.tensor([0, 1])).float().mean().item()


def test_class_names_are_labels_too(models, data, tmp_path, capsys):
    named = write(
        tmp_path / "named.jsonl", [{"sentence": f"{a} b c", "label": {"a": "bad", "b": "good"}[a]} for a in "abab"]
    )
    numbers, names = (curve(capsys, models[0], "--data", file, "--seeds", "1") for file in (data, named))
    assert numbers == names


@pytest.mark.parametrize("names", [("0", "1"), ("1", "0"), ("1", "2")])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_class_names_that_are_digits_are_names(names, suffix, data, tmp_path, capsys):
    kinds = {"num_labels": 2, "id2label": dict(enumerate(names)), "label2id": {names[0]: 0, names[1]: 1}}
    model = save(tmp_path / "model", tiny_bert(0, **kinds))
    rows = pd.DataFrame([{"sentence": f"{a} b c", "label": names["ab".index(a)]} for a in "abab"])
    file = tmp_path / f"named{suffix}"
    rows.to_csv(file, index=False) if suffix == ".csv" else rows.to_json(file, orient="records", lines=True)
    unnamed = save(tmp_path / "unnamed" / "model", tiny_bert(0, num_labels=2))
    out = [curve(capsys, path, "--data", str(rows), "--seeds", "1") for path, rows in ((model, file), (unnamed, data))]
    assert out[0] == out[1]


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("fault", ["truncated", "empty", "deleted"])
def test_a_damaged_model_folder_is_an_error_of_one_line(file, fault, models, data, capsys):
    damaged = Path(models[0], file)
    if fault == "deleted":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2 if fault == "truncated" else 0])
    with pytest.raises(SystemExit) as stop:
        curve(capsys, models[0], "--data", data)
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and line.startswith(f"error: '{models[0]}' could not be loaded (")


def test_nothing_is_written_into_the_working_directory(models, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    curve(capsys, models[0], "--data", data, "--seeds", "1")
    assert not list(Path.cwd().iterdir())


def test_rows_of_tokens_with_segments_get_a_curve_of_crops(tmp_path, capsys):
    model = save(tmp_path / "model", tiny_bert())
    rows = [{**row, "crop_segments": [0, 1, 1, 2, 2, 2, 0, 0]} for row in token_data(rows=6)]
    out = curve(capsys, model, "--data", write(tmp_path / "rows.jsonl", rows), "--seeds", "2", "--drops", "1")
    assert re.findall(r"model +(drops|crops) +(\d)", out) == [
        ("drops", "0"),
        ("drops", "1"),
        *(("crops", str(k)) for k in range(3)),
    ]


def test_answers_to_questions_are_scored_as_text(tmp_path, capsys):
    torch.manual_seed(0)
    model = save(tmp_path / "qa", BertForQuestionAnswering(BertConfig(**SMALL)))
    rows = [
        {"question": "a b", "context": "c d e f g", "answers": {"text": ["d e"], "answer_start": [2]}},
        {"question": "b", "context": " ".join("abcdefghijklm" * 3), "answers": {"text": ["b"], "answer_start": [2]}},
    ]
    out = curve(capsys, model, "--data", write(tmp_path / "qa.jsonl", rows), "--seeds", "1")
    assert "exact_match" in out


def test_a_model_without_a_longest_input_is_measured(data, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
    XLNetForSequenceClassification(XLNetConfig(**sizes)).save_pretrained(tmp_path / "xlnet")
    tokenizer = letter_tokenizer()
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    tokenizer.save_pretrained(tmp_path / "xlnet")
    out = curve(capsys, str(tmp_path / "xlnet"), "--data", data, "--seeds", "1", "--drops", "1")
    assert re.findall(r"xlnet +drops +(\d)", out) == ["0", "1"]


def test_losses_of_a_regression_are_not_counted_in_nats(models, data, tmp_path, monkeypatch):
    labels = []

    def draw(figure, file):
        labels.append(figure.axes[0].get_ylabel())
        file.touch()

    monkeypatch.setattr(Figure, "savefig", draw)
    regression = save(tmp_path / "regression", tiny_bert(num_labels=1))
    for model in (regression, models[0]):
        cli.main(["curve", model, "--data", data, "--seeds", "1", "--output", str(tmp_path / "x")])
    assert labels == ["task loss", "task loss (nats)"]


def test_right_positions_score_100_percent(tmp_path):
    context = " ".join("abcdefghijklm" * 3)
    rows = Dataset.from_list(
        [{"question": "z", "context": context, "answers": {"text": ["k l m a"], "answer_start": [20]}}]
    )
    data = prepare("question-answering", rows, letter_tokenizer(), tiny_bert(), 32)
    starts, ends = (
        torch.nn.functional.one_hot(torch.tensor(data.dataset[name]), 32).float().numpy()
        for name in ("start_positions", "end_positions")
    )
    assert len(starts) > 1  # the context takes several windows
    assert max(data.dataset["start_positions"]) > 0
    scores = data.compute_metrics(EvalPrediction(predictions=(starts, ends), label_ids=None))
    assert scores == {"exact_match": 100.0, "f1": 100.0}
    assert data.metrics == tuple(scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--columns", "text"], "data has no column 'text'; found: sentence, label"),
        (["--names", "a"], "1 names for 2 models"),
        (["--task", "question-answering"], "has no text as question and context; it has id, label, sentence"),
        (["--dropout", "2"], "--cmp_dropout 2.0 must be between 0 and 1"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--batch_size", "0"], "--batch_size 0: expected 1 or more"),
        (["--max_samples", "0"], "0 samples of data were asked for; expected 1 or more"),
        (["--drops", "0"], "no ablation to measure: 0 drops"),
        (["--metric", "exact_match"], "--metric exact_match is none of this task; it has accuracy, matthews_corr"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_command_line_ends_with_one_line(change, message, models, data, capsys):
    with pytest.raises(SystemExit):
        cli.main(["curve", *models, "--data", data, *change])
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": 7}, "2 of 2 labels of data are not 0 (bad) or 1 (good): 7 (first: row 1)"),
        (
            {"sentence": "a", "label": [0, 1]},
            "labels of data are lists of classes, but the model was made for one class a row",
        ),
        ({"sentence": None, "label": 1}, "column 'sentence' of data has no value in 1 of 2 rows (first: row 2)"),
    ],
)
def test_a_row_that_the_model_cannot_take_is_refused(row, message, models, tmp_path, capsys):
    rows = [{**row, "sentence": "b"}, row]
    with pytest.raises(SystemExit):
        curve(capsys, models[0], "--data", write(tmp_path / "x.jsonl", rows))
    assert message in capsys.readouterr().err


def test_a_model_without_dropout_is_measured_at_the_rate_that_its_error_names(data, tmp_path, capsys):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = save(tmp_path / "model", tiny_bert(num_labels=2, **rates))
    with pytest.raises(SystemExit):
        curve(capsys, model, "--data", data)
    assert "Pass --cmp_dropout 0.1" in capsys.readouterr().err
    out = curve(capsys, model, "--data", data, "--cmp_dropout", "0.1", "--seeds", "1")
    assert out.startswith("4 examples, mask seed 0\n")


def test_a_library_that_is_not_installed_is_named_before_anything_is_measured(models, data, monkeypatch, capsys):
    monkeypatch.setattr("cmp_trainer.saved_model.find_spec", lambda name: None if name == "sklearn" else True)
    with pytest.raises(SystemExit):
        curve(capsys, *models, "--data", data)
    assert "cmp-trainer curve needs scikit-learn: pip install 'cmp-trainer[plot]'" in capsys.readouterr().err


def test_the_metrics_that_a_task_names_are_those_it_computes(models, data, tmp_path, capsys):
    curve(capsys, models[0], "--data", data, "--seeds", "1", "--output", str(tmp_path / "x"), "--metric", "f1")
    measured = list(pd.read_csv(tmp_path / "x.csv").columns[7:])
    rows = Dataset.from_json(data)
    data = prepare("text-classification", rows, letter_tokenizer(), tiny_bert(num_labels=2), 32)
    assert list(data.metrics) == measured


def test_what_is_no_model_is_said(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        curve(capsys, str(tmp_path), "--data", data)
    assert "could not be loaded" in capsys.readouterr().err


def test_the_command_and_the_trainer_measure_the_same(models, data, tmp_path, capsys):
    curve(capsys, models[0], "--data", data, "--seeds", "2", "--output", str(tmp_path / "x"))
    encoded = letter_tokenizer()(["a b c", "b b c"] * 2)
    rows = Dataset.from_dict({**encoded, "labels": [0, 1, 0, 1]})
    trainer = cmp_trainer(tmp_path / "baseline", tiny_bert(0, num_labels=2), rows, per_device_eval_batch_size=32)
    ours = trainer.evaluate_ablations(seeds=[0, 1])
    theirs = pd.read_csv(tmp_path / "x.csv")
    assert theirs["loss"].tolist() == pytest.approx(ours["loss"].tolist(), rel=1e-6)

"""examples/text_classification and the labels it shares with GLUE and curves: matched by name, or one line."""

import json
import logging
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from run_glue import TASKS, labels_of_task
from run_text_classification import TableArguments, main
from transformers import BertConfig, BertForSequenceClassification

from cmp_trainer import CmpTrainingArguments, cli
from cmp_trainer.data.classification import Labels, TextArguments, find_labels, load_classifier
from cmp_trainer.scripting import ModelArguments, parse_arguments
from tests.helpers import letter_tokenizer, tiny_bert

ROWS = [("a b", "good"), ("b c d", "bad"), ("a c", "good"), ("d d", "bad"), ("a a b", "good"), ("b", "bad")] * 4
MULTI = {"problem_type": "multi_label_classification"}


@pytest.fixture
def model(tmp_path) -> Path:
    """A saved encoder, without a head."""
    tiny_bert(0, num_labels=2).bert.save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def saved(folder: Path, seed: int = 0, **settings) -> Path:
    tiny_bert(seed, **settings).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


def named(*names: str) -> dict:
    numbers = {name: number for number, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def table(file: Path, rows: list = ROWS, columns: tuple[str, ...] = ("text", "label")) -> Path:
    frame = pd.DataFrame(rows, columns=list(columns))
    if file.suffix in (".csv", ".tsv"):
        frame.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=file.suffix == ".jsonl")
    return file


@pytest.fixture
def classify(monkeypatch, tmp_path, model):
    """Run the script as from the command line, in this process; its results."""

    def call(*options: object, name_or_path: Path = model, train: Path | None = None, dev: Path | None = None) -> dict:
        quick = "--max_steps 4 --per_device_train_batch_size 4 --logging_steps 1 --report_to none --max_seq_length 16"
        quick += " --use_cpu --disable_tqdm true --save_strategy no --cmp_num_ablations 1 --learning_rate 1e-3"
        arguments = [*quick.split(), "--model_name_or_path", str(name_or_path)]
        arguments += ["--do_train", "--train_file", str(train)] if train else []
        arguments += ["--do_eval", "--validation_file", str(dev)] if dev else []
        if "--output_dir" not in options:
            arguments += ["--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["run_text_classification.py", *arguments, *map(str, options)])
        main()
        folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
        return json.loads((folder / "all_results.json").read_text())

    return call


@pytest.fixture
def says(capsys):
    """That a call ends with one line that holds these words."""

    def check(words: str, call) -> None:
        with pytest.raises(SystemExit) as stop:
            call()
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: ") and words in line, line

    return check


# ------------------------------------------------------------------------------------------------ the script


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_any_table_is_trained_on_evaluated_and_predicted(suffix, classify, tmp_path):
    file = table(tmp_path / f"rows{suffix}")
    results = classify("--do_predict", "--test_file", table(tmp_path / f"test{suffix}", columns=("text", "x")),
                       train=file, dev=file)  # fmt: skip
    assert {"eval_accuracy", "eval_matthews_correlation", "eval_f1", "eval_loss"} <= results.keys()
    assert "test_loss" not in results
    model = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "bad", 1: "good"}
    predicted = pd.read_csv(tmp_path / "out" / "test_predictions.csv")
    assert set(predicted["prediction"]) <= {"bad", "good"} and len(predicted) == len(ROWS)
    assert (predicted["p(bad)"] + predicted["p(good)"]).tolist() == pytest.approx([1.0] * len(ROWS), abs=1e-4)


def test_texts_that_only_the_test_file_has_are_none_of_the_inputs(classify, tmp_path):
    train = table(tmp_path / "train.csv")
    plain = table(tmp_path / "plain.csv", [(text,) for text, _ in ROWS], ("text",))
    more = table(tmp_path / "more.csv", [(text, "b b b") for text, _ in ROWS], ("text", "comment"))
    folders = [tmp_path / name for name in ("one", "two")]
    for test, folder in zip((plain, more), folders, strict=True):
        classify("--do_predict", "--test_file", test, "--output_dir", folder, train=train)
    assert folders[0].joinpath("test_predictions.csv").read_text() == (folders[1] / "test_predictions.csv").read_text()


def test_a_test_file_with_labels_is_scored(classify, tmp_path):
    file = table(tmp_path / "rows.csv")
    assert "test_accuracy" in classify("--do_predict", "--test_file", file, train=file)


@pytest.mark.parametrize(
    ("labels", "kind", "metrics"),
    [
        (lambda row: ["x"] if row % 3 else ["x", "y"], "multi", {"f1_micro", "f1_macro", "exact_match"}),
        (lambda row: [1, row % 2, 0], "multi", {"f1_micro", "f1_macro", "exact_match"}),
        (lambda row: row % 5 / 2, "scores", {"pearson", "spearman"}),
        (lambda row: row % 3 + 1, "single", {"accuracy", "f1_macro"}),
    ],
    ids=["lists", "indicators", "scores", "numbers"],
)
def test_the_labels_say_what_they_are(labels, kind, metrics, classify, tmp_path):
    file = table(tmp_path / "rows.jsonl", [(text, labels(row)) for row, (text, _) in enumerate(ROWS)])
    results = classify(train=file, dev=file)
    assert {f"eval_{name}" for name in metrics} <= results.keys()
    config = BertForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.problem_type.startswith({"multi": "multi_label", "single": "single_label", "scores": "regr"}[kind])


def test_several_classes_stand_in_one_cell_of_a_csv(classify, tmp_path):
    file = table(tmp_path / "rows.csv", [(text, "x; y" if row % 2 else "y") for row, (text, _) in enumerate(ROWS)])
    classify("--label_separator", ";", "--do_predict", "--test_file", file, train=file, dev=file)
    assert BertForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "x", 1: "y"}


def test_columns_are_chosen_by_name(classify, tmp_path):
    rows = [(text, text, text, label) for text, label in ROWS]
    file = table(tmp_path / "rows.csv", rows, ("id", "title", "body", "topic"))
    classify("--text_columns", "title", "body", "--label_column", "topic", train=file, dev=file)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "words"),
    [
        (ROWS, ("text", "label"), ("--label_column", "topic"), "train has no column 'topic'; found: text, label"),
        (ROWS, ("text", "label"), ("--text_columns", "body"), "train has no column 'body'; found: text, label"),
        ([(*row, "u", "v") for row in ROWS], ("text", "label", "c", "d"), (), "train has 3 (text, c, d); name them"),
        ([(1, label) for _, label in ROWS], ("text", "label"), (), "train has 0 (none); name them"),
        ([*ROWS, (None, "bad")], ("text", "label"), (), "column 'text' of train has no value in 1 of 25 rows (first"),
        ([*ROWS, ("a", None)], ("text", "label"), (), "1 of 25 labels of train are missing (first: row 25)"),
        ([("a", "bad")] * 3, ("text", "label"), (), "all labels of train are bad; expected two classes or more"),
        ([("a", 0.5)] * 3, ("text", "label"), ("--label_kind", "single"), "labels of train are no classes: 0.5; are"),
        (ROWS, ("text", "label"), ("--label_kind", "scores"), "24 of 24 labels of train are not scores (numbers)"),
        (ROWS, ("text", "label"), ("--label_kind", "one"), "--label_kind one: expected one of single, multi, scores"),
        (ROWS, ("text", "label"), ("--max_seq_length", "65"), "--max_seq_length 65 is more than the model takes"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(rows, columns, options, words, classify, says, tmp_path):
    file = table(tmp_path / "rows.jsonl", rows, columns)
    says(words, lambda: classify(*options, train=file))


def test_a_label_seen_only_in_evaluation_is_named_with_its_row(classify, says, tmp_path):
    train, dev = table(tmp_path / "train.csv"), table(tmp_path / "dev.csv", [*ROWS[:6], ("a", "neither")])
    words = "1 of 7 labels of validation are not 0 (bad) or 1 (good): 'neither' (first: row 7)"
    says(words, lambda: classify(train=train, dev=dev))


def test_empty_texts_are_counted(classify, tmp_path, caplog):
    file = table(tmp_path / "rows.csv", [*ROWS, ("", "bad"), (" ", "good")])
    with caplog.at_level(logging.WARNING):
        classify(train=file)
    assert "column 'text' of train is an empty text in 2 of 26 rows (first: row 25)" in caplog.text


def test_the_config_of_the_hub_is_one_of_the_script():
    config = str(Path(__file__).parents[1] / "examples" / "text_classification" / "trec.yaml")
    _, data, text, args = parse_arguments(
        ModelArguments, TableArguments, TextArguments, CmpTrainingArguments, argv=[config]
    )
    assert (data.text_columns, data.label_column, text.max_seq_length) == (["text"], "coarse_label", 64)
    assert args.cmp_num_ablations == 2


# ------------------------------------------------------------------------------------------ matched by name


def labelled(values: list, feature: object) -> Dataset:
    features = Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": ["a"] * len(values), "label": values}, features=features)


def test_classes_of_a_parquet_file_are_those_of_its_names_not_of_its_numbers(tmp_path):
    """The task's classes are (unacceptable, acceptable); the file counts them the other way round."""
    labelled([0, 1, 1], ClassLabel(names=["acceptable", "unacceptable"])).to_parquet(tmp_path / "x.parquet")
    rows = Dataset.from_parquet(str(tmp_path / "x.parquet"))
    assert labels_of_task(TASKS["cola"], BertConfig()).encode(rows, "train") == [1, 0, 0]


def test_lists_of_class_labels_are_matched_by_name_too():
    rows = labelled([[0], [0, 1]], Sequence(ClassLabel(names=["y", "x"])))
    labels = find_labels(rows, BertConfig())
    assert (labels.kind, labels.names, labels.encode(rows, "train")) == ("multi", ("y", "x"), [[1, 0], [1, 1]])
    assert Labels("multi", ("x", "y")).encode(rows, "train") == [[0, 1], [1, 1]]


def test_a_list_of_two_numbers_is_a_row_of_indicators_only_where_all_are():
    numbers = labelled([[0], [0, 1], [1]], Sequence(Value("int64")))
    labels = find_labels(numbers, BertConfig())
    assert labels.encode(numbers, "train") == [[1, 0], [1, 1], [0, 1]]
    assert labels.encode(labelled([[0, 1]], Sequence(Value("int64"))), "validation") == [[1, 1]]
    rows = labelled([[0, 1], [1, 1]], Sequence(Value("int64")))
    labels = find_labels(rows, BertConfig())
    assert labels.encode(rows, "train") == [[0, 1], [1, 1]]
    with pytest.raises(ValueError, match=r"1 of 1 labels of validation are not rows of 2 times 0 or 1: \[1\]"):
        labels.encode(labelled([[1]], Sequence(Value("int64"))), "validation")


@pytest.mark.parametrize("names", [("good", "bad"), ("bad", "good"), ("GOOD", "Bad")])
def test_a_model_with_another_order_of_classes_is_evaluated_by_name(names, classify, tmp_path):
    """All say the same of every text: what is the first output of one is the second of the other."""
    right = saved(tmp_path / "right", **named("bad", "good"))
    other = saved(tmp_path / "other", **named(*names))
    if names[0].lower() == "good":
        model = BertForSequenceClassification.from_pretrained(other)
        with torch.no_grad():
            for parameter in model.classifier.parameters():
                parameter.copy_(parameter.flip(0))
        model.save_pretrained(other)
    file = table(tmp_path / "dev.csv")
    results = [
        classify("--output_dir", tmp_path / f"out{run}", name_or_path=folder, dev=file)
        for run, folder in enumerate([right, other])
    ]
    assert results[0]["eval_accuracy"] == results[1]["eval_accuracy"]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)


def test_classes_without_names_are_numbers_of_the_outputs(classify, tmp_path):
    rows = [(text, int(label == "good")) for text, label in ROWS]
    unnamed = saved(tmp_path / "unnamed", num_labels=2)
    results = classify(name_or_path=unnamed, dev=table(tmp_path / "numbers.csv", rows))
    results_named = classify(
        "--output_dir", tmp_path / "named", name_or_path=saved(tmp_path / "n", **named("bad", "good")),
        dev=table(tmp_path / "names.csv"),
    )  # fmt: skip
    assert results["eval_accuracy"] == results_named["eval_accuracy"]


def test_names_that_an_unnamed_model_cannot_be_matched_by_are_rejected(classify, says, tmp_path):
    unnamed = saved(tmp_path / "unnamed", num_labels=2)
    words = "24 of 24 labels of validation are not 0 (LABEL_0) or 1 (LABEL_1): 'good', 'bad' (first: row 1)"
    says(words, lambda: classify(name_or_path=unnamed, dev=table(tmp_path / "dev.csv")))


def test_names_that_differ_in_case_alone_are_two_classes():
    labels = Labels("single", ("US", "us"))
    assert labels.encode(labelled(["us", "US"], Value("string")), "train") == [1, 0]
    with pytest.raises(ValueError, match="'Us'"):
        labels.encode(labelled(["Us"], Value("string")), "train")


@pytest.mark.parametrize(("value", "number"), [(1, 0), (2.0, 1), ("2", 1), (0, None), (3, None)])
def test_names_that_are_numbers_are_names(value, number):
    assert Labels("single", ("1", "2"))._number(value) == number


# --------------------------------------------------------------------------------------------- an old head


@pytest.mark.parametrize(
    ("old", "new", "rows"),
    [
        (named("e", "n", "c") | {"problem_type": "single_label_classification"}, "regression", [0.5, 1.5]),
        ({"num_labels": 1, "problem_type": "regression"}, "single_label_classification", ["x", "y"]),
        (named("u", "v") | MULTI, "single_label_classification", ["x", "y"]),
    ],
    ids=["MNLI to STS-B", "STS-B to CoLA", "multi to single"],
)
def test_no_setting_of_an_old_head_stays(old, new, rows, classify, says, tmp_path):
    file = table(tmp_path / "rows.jsonl", [("a b", rows[0]), ("b", rows[1])] * 6)
    model = saved(tmp_path / "old", **old)
    says("to train a new head pass --new_head true", lambda: classify(name_or_path=model, train=file))
    classify("--new_head", "true", "--output_dir", tmp_path / "new", name_or_path=model, train=file, dev=file)
    config = BertForSequenceClassification.from_pretrained(tmp_path / "new").config
    assert config.problem_type == new
    assert list(config.id2label.values()) == (["score"] if new == "regression" else ["x", "y"])


def test_a_new_head_is_new_also_where_the_old_one_has_as_many_outputs(tmp_path):
    folder = saved(tmp_path / "old", seed=1, **named("u", "v"))
    labels = Labels("single", ("x", "y"))
    old, new = (
        load_classifier(
            lambda kind, **settings: kind.from_pretrained(folder, **settings),
            BertForSequenceClassification.from_pretrained(folder).config,
            labels,
            new_head,
        )
        for new_head in (False, True)
    )
    same = {name: torch.equal(old.state_dict()[name], weight) for name, weight in new.state_dict().items()}
    assert same.pop("classifier.weight") is False
    assert all(matches for name, matches in same.items() if name != "classifier.bias")
    assert new.config.id2label == {0: "x", 1: "y"}


# ---------------------------------------------------------------------------------------- the curve agrees


@pytest.mark.parametrize(
    ("labels", "settings"),
    [
        (lambda row: ["bad", "good"][row % 2], named("good", "bad")),
        (lambda row: float(row % 2), {"num_labels": 2}),
        (lambda row: row % 5 / 2, {"num_labels": 1}),
        (
            lambda row: ["x"] if row % 3 else ["x", "y"],
            named("y", "x") | {"problem_type": "multi_label_classification"},
        ),
    ],
    ids=["single", "label 1.0", "scores", "multi"],
)
def test_the_curve_gives_what_the_script_evaluates(labels, settings, classify, tmp_path):
    pytest.importorskip("matplotlib")
    model = saved(tmp_path / "saved", **settings)
    file = table(tmp_path / "rows.jsonl", [(text, labels(row)) for row, (text, _) in enumerate(ROWS)])
    results = classify("--per_device_eval_batch_size", "32", name_or_path=model, dev=file)
    cli.main(["curve", str(model), "--data", str(file), "--seeds", "1", "--drops", "1", "--output", f"{tmp_path}/c",
              "--max_length", "16"])  # fmt: skip
    full = pd.read_csv(tmp_path / "c.csv").query("level == 0").iloc[0]
    metrics = {name: value for name, value in results.items() if f"eval_{name.removeprefix('eval_')}" == name}
    compared = [name.removeprefix("eval_") for name in metrics if name.removeprefix("eval_") in full.index]
    assert {"loss"} < set(compared)
    assert {name: full[name] for name in compared} == {
        name: pytest.approx(metrics[f"eval_{name}"], rel=1e-6 if name == "loss" else 1e-12) for name in compared
    }

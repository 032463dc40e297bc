"""cmp_trainer/scripting.py: arguments, data and the run, and that mistakes in them are said in one line."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from datasets import Dataset
from helpers import cmp_trainer, letter_tokenizer, tiny_bert, token_data, training_arguments
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.scripting import (
    DataArguments,
    ModelArguments,
    check_texts,
    load_file,
    load_pretrained,
    load_splits,
    parse_arguments,
    plain_errors,
    run,
    set_up,
    take_split,
)

ROWS = [{"sentence": '"no, he said', "label": 1}, {"sentence": "None", "label": 0}]
CONFIG = """\
model_name_or_path: ./model
train_file: data/train.csv
learning_rate: 1e-5
eval_strategy: no
do_train: true
max_steps: 50
lr_scheduler_kwargs: {num_cycles: 3}
label_names: [labels, "2"]
cmp_num_ablations: 2
cmp_dropout_rates: [0.1, 0.3]
output_dir: runs/here
"""


def parse(*argv: str) -> tuple[ModelArguments, DataArguments, CmpTrainingArguments]:
    model, data, args = parse_arguments(ModelArguments, DataArguments, CmpTrainingArguments, argv=argv)
    return model, data, args


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


# ------------------------------------------------------------------------------------------------- arguments


def test_yaml_values_mean_what_they_mean_on_the_command_line(config):
    _, _, args = parse(str(config))
    assert (args.learning_rate, str(args.eval_strategy.value), args.do_train) == (1e-5, "no", True)
    assert args.lr_scheduler_kwargs == {"num_cycles": 3}
    assert args.label_names == ["labels", "2"]
    assert args.cmp_dropout_rates == [0.1, 0.3]


def test_json_and_yaml_configs_give_the_same_arguments(config, tmp_path):
    import yaml

    values = yaml.safe_load(CONFIG) | {"learning_rate": 1e-5, "eval_strategy": "no"}
    (tmp_path / "config.json").write_text(json.dumps(values, indent="\t"))
    assert [str(part) for part in parse(str(tmp_path / "config.json"))] == [str(part) for part in parse(str(config))]


def test_command_line_overrides_config(config):
    model, _, args = parse(str(config), "--learning_rate", "2e-5", "--do_train", "false", "--model_name_or_path", "m")
    assert (args.learning_rate, args.do_train, model.model_name_or_path) == (2e-5, False, "m")


def test_epochs_of_the_command_line_replace_steps_of_the_config(config, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, args = parse(str(config), "--num_train_epochs", "1")
    assert (args.num_train_epochs, args.max_steps) == (1, -1)
    assert "max_steps gives way" in caplog.text


def test_steps_of_the_command_line_stay_beside_epochs(config):
    _, _, args = parse(str(config), "--num_train_epochs=1", "--max_steps", "7")
    assert args.max_steps == 7


@pytest.mark.parametrize("option", ["--warmup_ratio", "--warmup-ratio"])
def test_warmup_ratio_is_understood_by_every_transformers(option):
    _, _, args = parse("--model_name_or_path", "m", option, "0.1", "--output_dir", "x")
    assert args.get_warmup_steps(200) == 20


def test_files_of_a_config_start_at_its_folder_and_outputs_at_the_working_directory(config):
    model, data, args = parse(str(config), "--test_file", "here.csv")
    assert data.train_file == str(config.parent / "data/train.csv")
    assert Path(model.model_name_or_path) == config.parent / "model"
    assert (data.test_file, args.output_dir) == ("here.csv", "runs/here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learnin_rate: 1", "unknown key 'learnin_rate' (did you mean learning_rate"),
        ("seed: null", "seed is null"),
        ("seed: abc", "--seed: invalid int value: 'abc'"),
        ("seed: [", "cannot be read"),
        ("cmp_num_crops: 3", "--cmp_num_crops 3 is more than --cmp_num_ablations 2"),
        ("load_best_model_at_end: true", "save and eval strategy"),
    ],
)
def test_a_wrong_line_of_a_config_is_refused_by_name(config, line, message):
    config.write_text(CONFIG + line + "\n")
    with pytest.raises(ValueError) as error:
        parse(str(config))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnin_rate", "1"], "unknown argument --learnin_rate (did you mean --learning_rate"),
        (["--learning", "1"], "unknown argument --learning"),
        (["--max_train_samples", "x"], "invalid int value: 'x'"),
        (["stray"], "unknown argument stray"),
        (["--cmp_baseline", "worst"], "--cmp_baseline worst"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(argv, message):
    with pytest.raises(ValueError) as error:
        parse("--model_name_or_path", "m", "--output_dir", "x", *argv)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "text"), [("no.yaml", None), ("list.yaml", "- a"), ("list.json", "[1]")])
def test_a_config_that_is_missing_or_no_mapping_is_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="the config"):
        parse(str(tmp_path / name))


# ------------------------------------------------------------------------------------------------------ data


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    file, frame = folder / f"rows{suffix}", pandas.DataFrame(rows)
    if suffix == ".csv":
        frame.to_csv(file, index=False)
    elif suffix == ".tsv":
        lines = ["\t".join(frame.columns), *("\t".join(map(str, row.values())) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    elif suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        frame.to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_form_of_file_gives_the_same_rows(tmp_path, suffix):
    """Among them a quote that is never closed and the word None, which is text."""
    assert load_file(write_rows(tmp_path, suffix), "train").to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"sentence,label\n", "holds no rows"),
        ("a.csv", b'sentence\n"open', "cannot be read as csv"),
        ("a.csv", b"\xff\xfe", "cannot be read as csv"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', "cannot be read as jsonl"),
        ("a.parquet", b"no", "cannot be read as parquet"),
        ("a.txt", b"a", "expected one of .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_file(tmp_path / name, "train")
    assert message in str(error.value)
    assert f"--train_file {tmp_path / name}" in str(error.value)


def test_a_missing_file_is_refused_with_the_files_beside_it(tmp_path):
    write_rows(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"--train_file .*no\.csv does not exist; found there: rows\.csv"):
        load_splits(DataArguments(train_file=str(tmp_path / "no.csv")))


def test_files_are_read_in_place_of_the_dataset_of_the_hub(tmp_path):
    file = str(write_rows(tmp_path, ".jsonl"))
    splits = load_splits(DataArguments(dataset_name="nyu-mll/glue", train_file=file, test_file=file))
    assert {split: rows.num_rows for split, rows in splits.items()} == {"train": 2, "test": 2}


def test_a_card_names_the_dataset_of_the_hub_or_the_files_without_their_folders():
    data = DataArguments(dataset_name="nyu-mll/glue", dataset_config_name="cola")
    assert data.card() == {"dataset": "nyu-mll/glue cola", "dataset_tags": "nyu-mll/glue", "dataset_args": "cola"}
    data.train_file, data.test_file = "/private/mine.csv", "~/other.csv"
    assert data.card() == {"dataset": "local files (train: mine.csv, test: other.csv)"}


def test_a_script_adds_a_split_by_adding_a_field(tmp_path):
    @dataclass
    class MoreArguments(DataArguments):
        validation_mismatched_file: str | None = None

    file = str(write_rows(tmp_path, ".csv"))
    assert list(load_splits(MoreArguments(validation_mismatched_file=file))) == ["validation_mismatched"]


def test_without_network_a_dataset_of_the_hub_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"(?s)no-one/nothing .*pass local files: --train_file --validation_file"):
        load_splits(DataArguments(dataset_name="no-one/nothing"))


def test_without_network_a_model_of_the_hub_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"'no-one/nothing' could not be loaded.*folder of a saved model"):
        load_pretrained(AutoConfig, "no-one/nothing", ModelArguments("no-one/nothing"))


@pytest.fixture
def model_folder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_all(folder):
    kinds = (AutoConfig, AutoTokenizer, AutoModelForSequenceClassification)
    return [load_pretrained(kind, str(folder), ModelArguments(str(folder))) for kind in kinds]


def test_a_model_folder_without_a_tokenizer_is_refused_with_what_to_do(model_folder):
    load_all(model_folder)
    for file in model_folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"Save the model's tokenizer in this folder too: tokenizer.save_pretrained"):
        load_all(model_folder)


@pytest.mark.parametrize("kept", [0.0, 0.5])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"])
def test_a_truncated_or_empty_file_of_a_model_is_a_line_that_says_what_to_do(file, kept, model_folder):
    if file == "pytorch_model.bin":
        torch.save(tiny_bert().state_dict(), model_folder / file)
        (model_folder / "model.safetensors").unlink()
        load_all(model_folder)
    content = (model_folder / file).read_bytes()
    (model_folder / file).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError) as error:
        load_all(model_folder)
    advice = "(If some of its files are missing|Save the)"
    assert re.match(rf"'.*model' could not be loaded \(.*\)\. {advice}", str(error.value))


def test_an_empty_model_folder_is_a_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"could not be loaded \(.*\). If some of its files are missing or truncated"):
        load_all(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_rows_that_are_not_utf_8_are_refused_by_line(suffix, encoding, tmp_path):
    rows = pandas.DataFrame([{"sentence": "tea", "label": 0}, {"sentence": "café", "label": 1}])
    file = tmp_path / f"rows{suffix}"
    if suffix in (".csv", ".tsv"):
        text = rows.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",")
    else:
        text = rows.to_json(orient="records", lines=suffix == ".jsonl", force_ascii=False)
    file.write_bytes(text.encode("utf-8"))
    assert load_file(file, "train")["sentence"][1] == "café"
    file.write_bytes(text.encode(encoding))
    line = 1 if encoding == "utf-16" else text[: text.index("é")].count("\n") + 1
    with pytest.raises(ValueError, match=f"line {line} is not UTF-8; convert the file"):
        load_file(file, "train")


def test_no_data_at_all_is_refused():
    with pytest.raises(ValueError, match="no data; pass --dataset_name"):
        load_splits(DataArguments())


def test_a_missing_column_is_refused_with_those_that_were_found():
    splits = {"train": Dataset.from_list(ROWS)}
    with pytest.raises(
        ValueError, match=r"train has no column 'sentences'; found: sentence, label \(did you mean sent"
    ):
        take_split(splits, "train", ["sentences"])


def test_a_missing_split_is_refused_with_those_that_were_found():
    with pytest.raises(ValueError, match=r"no split 'test' \(found: train\); pass --test_file"):
        take_split({"train": Dataset.from_list(ROWS)}, "test", [])


@pytest.mark.parametrize(("asked", "given"), [(None, 2), (1, 1), (2, 2), (5, 2)])
def test_a_subset_is_the_first_rows(asked, given):
    assert take_split({"train": Dataset.from_list(ROWS)}, "train", ["label"], asked).to_list() == ROWS[:given]


@pytest.mark.parametrize("asked", [0, -1])
def test_a_subset_of_nothing_is_refused(asked):
    with pytest.raises(ValueError, match="expected 1 or more"):
        take_split({"train": Dataset.from_list(ROWS)}, "train", [], asked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "holds int64; expected text"),
        ([["a"], ["b"]], "holds (List|Sequence); expected text"),
        (["a", None], r"has no value in 1 of 2 rows \(first: row 2\)"),
    ],
)
def test_columns_that_are_not_text_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        check_texts(Dataset.from_dict({"sentence": values}), "train", ["sentence"])


# --------------------------------------------------------------------------------------------------- the run


def test_nothing_to_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to do"):
        set_up(training_arguments(tmp_path))


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(ValueError, match=r"--output_dir .* cannot be written: .*; give another folder"):
            set_up(training_arguments(folder, do_train=True))


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    args = training_arguments(tmp_path, do_eval=True)
    set_up(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched, but this one knows of 1 .* give --use_cpu true"):
        set_up(args)


def test_checkpoints_of_another_run_are_not_written_over(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"already holds checkpoint-3; pass --resume_from_checkpoint true"):
        set_up(training_arguments(tmp_path, do_train=True))
    set_up(training_arguments(tmp_path, do_train=True, resume_from_checkpoint="true"))
    set_up(training_arguments(tmp_path, do_eval=True))


def test_a_half_written_checkpoint_is_not_offered_for_resuming(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"none of them complete"):
        set_up(training_arguments(tmp_path, do_train=True))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        set_up(training_arguments(tmp_path, do_train=True, resume_from_checkpoint="true"))


def test_run_trains_evaluates_predicts_and_saves(tmp_path):
    data, written = token_data(), {}
    trainer = cmp_trainer(tmp_path, data=data, do_train=True, do_eval=True, do_predict=True, cmp_num_ablations=1)
    metrics = run(
        trainer,
        evaluation={"eval": data, "eval_other": data.select(range(8))},
        prediction={"test": data.remove_columns("labels")},
        write_predictions=lambda name, output: written.update({name: output.predictions.shape}),
        card={"language": "en"},
    )
    assert written == {"test": (32, 3)}
    assert {"train_loss", "eval_loss", "eval_other_loss"} <= set(metrics)
    assert (metrics["train_samples"], metrics["eval_other_samples"], metrics["test_samples"]) == (32, 8, 32)
    found = {file.name for file in tmp_path.iterdir()}
    assert {"model.safetensors", "trainer_state.json", "all_results.json", "README.md"} <= found
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


def test_errors_of_the_input_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as end, plain_errors():
        take_split({}, "train", [])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == ["error: there is no split 'train' (found: ); pass --train_file"]


def test_an_error_under_a_progress_bar_is_a_line_of_its_own(capsys):
    with tqdm(total=3), pytest.raises(SystemExit), plain_errors():
        take_split({}, "train", [])
    assert re.search(r"[\r\n]error: there is no split 'train'", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x.bin"), 1, "error: [Errno 28] No space left on device: 'x.bin'"),
        (OSError(30, "Read-only file system"), 1, "error: [Errno 30] Read-only file system. Free some space or pass"),
        (ModuleNotFoundError("…", name="ir_measures"), 2, "error: ir_measures is not installed; pip install 'cmp-tr"),
        (ModuleNotFoundError("…", name="sklearn.base"), 2, "error: sklearn.base is not installed; pip install 'cmp-t"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_person_at_the_keyboard_can_mend_ends_in_one_line(error, status, line, capsys):
    with pytest.raises(SystemExit) as end, plain_errors():
        raise error
    assert end.value.code == status
    (written,) = capsys.readouterr().err.splitlines()
    assert written.startswith(line)


@pytest.mark.parametrize("error", [ModuleNotFoundError("…", name="my_module"), OSError(2, "No such file"), KeyError()])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error)), plain_errors():
        raise error


def test_errors_of_other_code_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"), plain_errors():
        int("a bug of someone else")


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [
        ("glue/run_glue.py", "evaluate", "examples"),
        ("squad/run_squad.py", "torchmetrics", "examples"),
        ("hotpotqa/run_hotpotqa.py", "torchmetrics", "examples"),
        ("hotpotqa/analyze_hotpotqa.py", "matplotlib", "plot"),
        ("prf/run_prf.py", "faiss", "prf"),
        ("prf/compare.py", "matplotlib", "plot"),
        ("demo/demo.py", "matplotlib", "plot"),
    ],
)
def test_a_script_names_the_package_that_is_missing(script, package, extra, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name='{package}')")
    path = Path(__file__).parents[1] / "examples" / script
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, path, "--help"], env=environment, capture_output=True, text=True)
    line = f"error: {package} is not installed; pip install 'cmp-trainer[{extra}]'"
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (2, [line])
    assert "Traceback" not in done.stderr

"""cmp-trainer run: existing scripts train with comparative loss, and nothing outside of the run is changed."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import transformers
from transformers import trainer as trainer_module

from cmp_trainer import CmpTrainingArguments, cli
from cmp_trainer.run import REPLACEMENTS, run_script, split_arguments
from tests.helpers import free_port

SCRIPT = Path(__file__).parent / "scripts" / "classify_text.py"
QUIET = ["--max_steps", "2", "--logging_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
CLASSES = ["Trainer", "TrainingArguments", "Seq2SeqTrainer", "Seq2SeqTrainingArguments"]


def run(output_dir, *arguments):
    """`cmp-trainer run` of the script in this process; returns what the script found."""
    cli.main(["run", str(SCRIPT), "--output_dir", str(output_dir), *QUIET, *arguments])
    return json.loads(Path(output_dir, "found.json").read_text())


def test_an_unmodified_script_trains_with_comparative_loss(tmp_path):
    found = run(tmp_path, "--cmp_num_ablations", "2")
    assert {"loss", "loss_full", "loss_ablated_1", "loss_ablated_2", "violation_rate"} <= found["logs"][0].keys()


def test_every_way_to_import_the_classes_is_covered(tmp_path):
    assert all(name.startswith("Cmp") for name in run(tmp_path)["every way of import"])


def test_replacements_are_subclasses_of_each_other_as_the_originals_are():
    for kind, base in [("Seq2SeqTrainer", "Trainer"), ("Seq2SeqTrainingArguments", "TrainingArguments")]:
        kind, base = getattr(transformers, kind), getattr(transformers, base)
        assert issubclass(REPLACEMENTS[kind], REPLACEMENTS[base])
        assert issubclass(REPLACEMENTS[kind], kind)


def test_a_trainer_subclass_in_a_module_of_the_script_compares_and_keeps_what_it_adds(tmp_path):
    found = run(tmp_path, "--cmp_num_ablations", "1", "--cmp_eval_ablations")
    assert found["trainer"][:2] == ["AccuracyTrainer", "CmpTrainer"]
    assert {"eval_accuracy", "eval_loss_ablated_1"} <= found["metrics"].keys()


def test_without_arguments_of_comparative_loss_the_script_trains_as_before(tmp_path, monkeypatch):
    found = run(tmp_path / "replaced")
    assert "loss_full" not in found["logs"][0]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path), *QUIET])
    monkeypatch.syspath_prepend(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    del sys.modules["accuracy_trainer"]
    plain = json.loads(Path(tmp_path, "found.json").read_text())
    assert [log["loss"] for log in plain["logs"][:2]] == [log["loss"] for log in found["logs"][:2]]


def state_of_this_process():
    names = {(module, name): vars(module).get(name) for module in (transformers, trainer_module) for name in CLASSES}
    watched = [*REPLACEMENTS, *REPLACEMENTS.values(), BaseProcess]
    names |= {(kind, name): value for kind in watched for name, value in vars(kind).items() if callable(value)}
    return names, sys.argv, sys.path[:], sys.modules["__main__"]


@pytest.mark.parametrize("fails", [False, True], ids=["script ends", "script raises"])
def test_nothing_outside_the_run_is_changed(fails, tmp_path):
    for name in CLASSES:
        getattr(transformers, name)
    before = state_of_this_process()
    if fails:
        with pytest.raises(RuntimeError, match="the script failed"):
            run(tmp_path, "--fail")
    else:
        run(tmp_path, "--cmp_num_ablations", "1")
    assert state_of_this_process() == before


def test_modules_built_on_the_replaced_classes_are_imported_anew_after_the_run(tmp_path, monkeypatch):
    run(tmp_path)
    assert "accuracy_trainer" not in sys.modules
    monkeypatch.syspath_prepend(SCRIPT.parent)
    assert importlib.import_module("accuracy_trainer").AccuracyTrainer.__base__ is transformers.Trainer
    del sys.modules["accuracy_trainer"]


def test_the_exit_code_of_the_script_is_kept(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(SCRIPT), "--help"])
    assert stop.value.code == 0
    assert "--cmp_num_ablations" in capsys.readouterr().out


def one_line_of_error(capsys, status, *words):
    """The only line that a command writes to stderr before it ends with this status."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, words)))
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_bad_combination_is_an_error_of_one_line_before_training(tmp_path, capsys):
    words = ["run", SCRIPT, "--output_dir", tmp_path, *QUIET, "--cmp_num_ablations", 2, "--cmp_num_crops", 3]
    line = one_line_of_error(capsys, 1, *words)
    assert line.startswith("cmp-trainer run: error: --cmp_num_crops 3 is more than --cmp_num_ablations 2")


def test_what_is_rejected_on_the_first_step_is_an_error_of_one_line(tmp_path, capsys):
    words = ["--output_dir", tmp_path, *QUIET, "--cmp_num_ablations", 1, "--no_dropout"]
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, ["run", SCRIPT, *words])))
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("cmp-trainer run: error: the model makes 5 drop")


def test_a_value_error_of_the_script_keeps_its_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("int('two')\n")
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["run", str(script), "--cmp_num_ablations", "2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("curve m --data f --seeds two", "cmp-trainer curve: error: argument --seeds: invalid int value: 'two'"),
        ("curve", "cmp-trainer curve: error: the following arguments are required: MODEL, --data/--data_file"),
        ("run", "cmp-trainer run: error: the following arguments are required: script"),
        ("run --", "cmp-trainer run: error: the following arguments are required: script"),
        ("train script.py", "cmp-trainer: error: argument COMMAND: invalid choice: 'train'"),
        ("run --cmp_num_ablation 2 script.py", "did you mean --cmp_num_ablations?"),
        (
            "run --cmp_num_ablations two script.py",
            "argument --cmp_num_ablations/--cmp-num-ablations: invalid int value",
        ),
    ],
)
def test_a_wrong_command_line_is_an_error_of_one_line(words, message, capsys):
    assert message in one_line_of_error(capsys, 2, *words.split())


def test_help_of_run_lists_the_arguments_of_comparative_loss(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    names = [field.name for field in fields(CmpTrainingArguments) if field.name.startswith("cmp_")]
    assert all(f"  --{name}" in page for name in names)
    assert "--cmp-" not in page


def test_help_of_a_script_is_no_run_that_compared_nothing():
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(SCRIPT), "--cmp_num_ablations", "2", "--help"])
    assert stop.value.code == 0


def test_arguments_of_comparative_loss_may_come_before_the_script(tmp_path):
    command = f"run --cmp_num_ablations 3 {SCRIPT} --cmp_num_ablations 1 --output_dir {tmp_path}"
    cli.main([*command.split(), *QUIET])
    assert "loss_ablated_2" not in json.loads((tmp_path / "found.json").read_text())["logs"][0]


NOT_STARTED = {
    "nowhere.py": "nowhere.py is not a file; give the path of a Python script",
    "train.sh": "train.sh is not a Python script; give the .py file that trains",
    "config.yaml": "config.yaml is not a Python script; give the .py file that trains",
    "shell": "shell is not a Python script",
    "script.py --cmp_num_ablation 2": "--cmp_num_ablation is not an argument of comparative loss; "
    "did you mean --cmp_num_ablations?",
    "script.py --cmp-num-ablation=2": "did you mean --cmp_num_ablations?",
    "script.py --cmp_num_abl 2": "did you mean --cmp_num_ablations?",
    "script.py --cmp_speed 2": "cmp-trainer run --help lists them",
    "script.py --cmp_num_ablations two": "invalid int value: 'two'",
    "script.py --cmp_ranking pairwize": "invalid choice: 'pairwize'",
}


@pytest.mark.parametrize("words", NOT_STARTED)
def test_what_cannot_run_is_an_error_of_one_line_before_anything_runs(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("train.sh", "config.yaml"):
        Path(name).write_text("learning_rate: 1\n")
    Path("shell").write_text("#!/bin/sh\nexit 0\n")
    Path("script.py").write_text("raise RuntimeError('it ran')\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *words.split()])
    (message,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert message.startswith("cmp-trainer run: error: ")
    assert NOT_STARTED[words] in message


def test_a_script_without_a_suffix_runs_if_its_first_line_names_python(tmp_path):
    script = tmp_path / "train"
    script.write_text("#!/usr/bin/env python3\nanswer = 42\n")
    assert run_script(str(script))["answer"] == 42


def test_values_of_other_arguments_are_left_alone():
    given, rest = split_arguments(["config.json", "--cmp_low_memory", "--prompt", "--cmp_x is", "-1", "--", "--lr"])
    assert given == {"cmp_low_memory": True}
    assert rest == ["config.json", "--prompt", "--cmp_x is", "-1", "--", "--lr"]


@pytest.mark.parametrize("words", ["-- a", "a --", "a -- b -- c", "--x 1 -- --cmp_num_ablations 7 --cmp_odd", "--"])
def test_dashes_reach_the_script_with_all_that_follows(words, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nwords = sys.argv[1:]\n")
    assert run_script(str(script), words.split())["words"] == words.split()
    script.write_text(f"import sys\nassert sys.argv[1:] == {words.split()}, sys.argv\n")
    cli.main(["run", "--cmp_num_ablations", "0", str(script), *words.split()])


def subprocess_of(command, output_dir):
    """Runs the command with the script's own arguments; returns what the script found."""
    command = [*command, "--output_dir", str(output_dir), *QUIET]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(output_dir, "found.json").read_text())


# accelerate starts several processes on the CPU through MPI only; --multi_gpu starts them as torchrun does, and
# the script's --use_cpu makes them talk through gloo.
LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_of_a_launcher_run_the_script(launcher, tmp_path):
    port = [f"--main_process_port={free_port()}"] if launcher == "accelerate" else []
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, "-m", "cmp_trainer.cli", "run", str(SCRIPT)]
    found = subprocess_of([*command, "--cmp_num_ablations", "1"], tmp_path)
    assert found["processes"] == 2
    assert {"loss_full", "loss_ablated_1"} <= found["logs"][0].keys()

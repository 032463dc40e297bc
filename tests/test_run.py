"""Nobody who asked for a comparison trains without one: plain Trainers, and scripts under `cmp-trainer run`."""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, Seq2SeqTrainer, Trainer

from cmp_trainer import CmpSeq2SeqTrainingArguments, CmpTrainer, CmpTrainingArguments, cli
from cmp_trainer.run import NothingComparedError, run_script
from tests.helpers import SMALL, cmp_trainer, letter_tokenizer, tiny_bert, token_data, training_arguments

SCRIPT = Path(__file__).parent / "scripts" / "train_somehow.py"
QUICKSTART = Path(__file__).parent.parent / "docs" / "quickstart.md"


class PlainSubclass(Trainer):
    """Computes the loss by itself, as many scripts do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def plain_trainer(output_dir, kind=Trainer, args=None, **changes):
    """A Trainer that does not compare, of a tiny model, whose arguments ask for two ablations."""
    kind_of_args = CmpSeq2SeqTrainingArguments if kind is Seq2SeqTrainer else CmpTrainingArguments
    args = args or training_arguments(output_dir, kind_of_args, **{"cmp_num_ablations": 2, **changes})
    return kind(model=tiny_bert(), args=args, train_dataset=token_data(), eval_dataset=token_data())


@pytest.mark.parametrize(
    ("kind", "instead"),
    [(Trainer, "CmpTrainer"), (Seq2SeqTrainer, "CmpSeq2SeqTrainer"), (PlainSubclass, "CmpTrainer")],
)
def test_a_plain_trainer_given_ablations_is_an_error_before_its_first_step(kind, instead, tmp_path):
    trainer = plain_trainer(tmp_path, kind)
    message = f"--cmp_num_ablations 2 .* {kind.__name__} trains without it; use {instead} in place of {instead[3:]}"
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_it_is_an_error_also_with_an_optimizer_and_a_scheduler_passed_in(tmp_path):
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = training_arguments(tmp_path, cmp_num_ablations=1)
    trainer = Trainer(model=model, args=args, train_dataset=token_data(), optimizers=(optimizer, scheduler))
    with pytest.raises(ValueError, match="trains without it"):
        trainer.train()


@pytest.mark.parametrize("copied", [copy.deepcopy, dataclasses.replace, lambda args: args])
def test_arguments_that_a_cmp_trainer_used_are_an_error_in_a_plain_one(copied, tmp_path):
    args = cmp_trainer(tmp_path, cmp_num_ablations=1).args
    with pytest.raises(ValueError, match="trains without it"):
        plain_trainer(tmp_path, args=copied(args)).train()


def test_a_plain_trainer_given_ablations_evaluates(tmp_path):
    trainer = plain_trainer(tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    assert len(trainer.predict(token_data()).predictions) == 32


def test_a_plain_trainer_trains_without_ablations(tmp_path):
    assert plain_trainer(tmp_path, cmp_num_ablations=0).train().global_step == 6


def test_a_cmp_trainer_whose_arguments_were_copied_compares(tmp_path):
    class CopiesItsArguments(CmpTrainer):
        def __init__(self, *, args, **kwargs):
            super().__init__(args=dataclasses.replace(copy.deepcopy(args)), **kwargs)

    trainer = cmp_trainer(tmp_path, kind=CopiesItsArguments, cmp_num_ablations=1)
    trainer.train()
    assert "loss_ablated_1" in trainer.state.log_history[0]


def test_arguments_can_be_read_and_written_by_anyone(tmp_path):
    args = training_arguments(tmp_path, cmp_num_ablations=2)
    assert args.train_batch_size == 4
    assert args.n_gpu == 0
    assert args.to_sanitized_dict()["cmp_num_ablations"] == 2


def run(output_dir, way, *arguments):
    """`cmp-trainer run` of the script in this process; returns what the script found."""
    cli.main(["run", str(SCRIPT), str(output_dir), way, *arguments])
    return json.loads(Path(output_dir, "found.json").read_text())


@pytest.mark.parametrize(
    "way", ["hard_coded", "default_arguments", "own_parser", "known_arguments", "hf_parser", "hf_config"]
)
def test_a_script_compares_however_it_makes_its_arguments(way, tmp_path):
    own = {
        "own_parser": ["--learning_rate", "0.01"],
        "known_arguments": ["--learning_rate", "0.01"],
        "hf_parser": f"--output_dir {tmp_path} --max_steps 2 --logging_steps 1 --use_cpu --report_to none".split(),
        "hf_config": ['{"cmp_num_ablations": 1, "cmp_baseline": "best"}'],
    }.get(way, [])
    found = run(tmp_path, way, "--cmp_num_ablations", "2", *own, "--cmp_baseline=first")
    assert {"loss_full", "loss_ablated_1", "loss_ablated_2"} <= found["log"].keys()
    assert found["given"]["cmp_baseline"] == "first"
    assert found["argv"] == [str(tmp_path), way, *own]


def test_values_that_are_not_on_the_command_line_stay_what_the_script_says(tmp_path):
    found = run(tmp_path, "hf_config", '{"cmp_num_ablations": 2, "cmp_dropout": 0.3}', "--cmp_dropout", "0.2")
    assert (found["given"]["cmp_num_ablations"], found["given"]["cmp_dropout"]) == (2, 0.2)
    assert "loss_ablated_2" in found["log"]


def test_the_command_line_can_turn_off_the_ablations_of_a_script(tmp_path):
    found = run(tmp_path, "hf_config", '{"cmp_num_ablations": 2}', "--cmp_num_ablations", "0")
    assert "loss_full" not in found["log"]


def test_arguments_saved_in_a_run_load_without_it(tmp_path):
    settings = f"--output_dir {tmp_path} --max_steps 2 --save_steps 2 --logging_steps 1 --use_cpu --report_to none"
    run(tmp_path, "hf_parser", *settings.split(), "--cmp_num_ablations", "2")
    args = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(args) is CmpTrainingArguments
    assert args.cmp_num_ablations == 2


@pytest.mark.parametrize("trainer", ["CmpTrainer", "Trainer"])
def test_the_script_of_the_quick_start_compares(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BertModel(BertConfig(**SMALL)).save_pretrained("bert")
    letter_tokenizer().save_pretrained("bert")
    code = QUICKSTART.read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("google-bert/bert-base-cased", "./bert")
    if trainer == "Trainer":  # as it was before the two marked lines were changed
        code = "".join(line for line in code.splitlines(keepends=True) if "cmp_num_ablations" not in line)
        code = code.replace("from cmp_trainer", "from transformers").replace("Cmp", "")
    Path("your_script.py").write_text(code)
    log = run_script("your_script.py", ["--cmp_num_ablations", "1"])["trainer"].state.log_history[0]
    assert "loss_ablated_1" in log and "loss_ablated_2" not in log


NOTHING_COMPARED = {
    "no_trainer": "the script made no Trainer",
    "not_trained": "did not call its train()",
    "plain_loop": "If it trains in a loop of its own, use ComparativeStep there",
    "no_steps": "train() took no step",
    "spawned": "started child processes anew (spawn), in which Trainer is the plain one",
    "arguments_from_file": "trained with cmp_num_ablations 0 in its arguments",
}


@pytest.mark.parametrize("way", NOTHING_COMPARED)
def test_a_run_that_compared_nothing_ends_with_an_error(way, tmp_path, capsys):
    torch.save(training_arguments(tmp_path, max_steps=2), tmp_path / "training_args.bin")
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(SCRIPT), str(tmp_path), way, "--cmp_num_ablations", "2"])
    assert stop.value.code == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("cmp-trainer run: error: --cmp_num_ablations 2 was given, but nothing was compared: ")
    assert NOTHING_COMPARED[way] in message


@pytest.mark.parametrize("way", ["no_trainer", "not_trained"])
def test_without_ablations_it_does_not(way, tmp_path):
    cli.main(["run", str(SCRIPT), str(tmp_path), way])
    cli.main(["run", str(SCRIPT), str(tmp_path), way, "--cmp_num_ablations", "0"])


def test_a_script_that_asks_in_its_own_arguments_is_held_to_it(tmp_path):
    with pytest.raises(NothingComparedError, match=r"--cmp_num_ablations 3 was given, .* did not call its train\(\)"):
        run_script(str(SCRIPT), [str(tmp_path), "asks_and_does_not_train"])


def test_a_trainer_that_was_imported_before_the_run_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    importlib.import_module("imported_before")
    try:
        with pytest.raises(NothingComparedError, match="TrainerOfALibrary was imported before the run began"):
            run_script(str(SCRIPT), [str(tmp_path), "imported_before", "--cmp_num_ablations", "2"])
    finally:
        del sys.modules["imported_before"]


def test_a_library_that_is_first_imported_in_the_run_compares(tmp_path):
    run_script(str(SCRIPT), [str(tmp_path), "imported_before", "--cmp_num_ablations", "2"])
    assert "imported_before" not in sys.modules


def test_a_loop_of_its_own_with_a_comparative_step_is_a_comparison(tmp_path):
    run_script(str(SCRIPT), [str(tmp_path), "own_loop", "--cmp_num_ablations", "2"])


def test_a_script_that_only_evaluates_ends_well_and_says_so(tmp_path, caplog):
    cli.main(["run", str(SCRIPT), str(tmp_path), "evaluated", "--cmp_num_ablations", "2"])
    assert "nothing was compared: the script evaluated and did not train" in caplog.text


def test_a_run_that_resumes_from_its_last_step_ends_well_and_says_so(tmp_path, caplog):
    command = ["run", str(SCRIPT), str(tmp_path), "resumed", "--cmp_num_ablations", "2"]
    cli.main(command)
    assert "nothing was compared" not in caplog.text
    cli.main(command)
    assert "nothing was compared: the training resumed from a checkpoint that was complete" in caplog.text


@pytest.mark.parametrize("way", ["no_trainer", "hard_coded"])
def test_a_script_that_exits_with_status_0_is_held_to_a_comparison_too(way, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(SCRIPT), str(tmp_path), "exits", way, "0", "--cmp_num_ablations", "2"])
    assert stop.value.code == (1 if way == "no_trainer" else 0)


def subprocess_of(program, *words):
    """Runs `python` or `cmp-trainer run`; returns how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("ending", ["raise RuntimeError('the script failed')", "sys.exit(3)", "sys.exit('in words')"])
def test_a_script_that_fails_ends_as_under_python(ending, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\n\n\ndef main():\n    {ending}\n\n\nmain()\n")
    plain = subprocess_of([], script)
    replaced = subprocess_of(["-m", "cmp_trainer.cli", "run"], script, "--cmp_num_ablations", "2")
    assert replaced.returncode == plain.returncode != 0
    frames = [line for line in plain.stderr.splitlines() if not line.startswith("Traceback")]
    assert replaced.stderr.splitlines()[-len(frames) :] == frames


WHO_AM_I = """
import json, os, sys, warnings
os.chdir("/")
main = sys.modules["__main__"]
found = {
    "file": __file__, "name": __name__, "spec": __spec__, "package": __package__, "doc": __doc__, "argv": sys.argv,
    "path": sys.path, "loader": type(__loader__).__name__, "is main": vars(main) is globals(),
    "builtins": type(__builtins__).__name__,
}
warnings.warn("shown only in __main__", DeprecationWarning)
print(json.dumps(found))
"""


@pytest.mark.parametrize("settings", [{}, {"PYTHONSAFEPATH": "1"}, {"PYTHONPATH": "/somewhere:/else"}], ids=str)
@pytest.mark.parametrize("script", ["script.py", "folder/linked.py", "no_suffix"])
def test_a_script_finds_itself_as_under_python(settings, script, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").mkdir()
    for file in ("script.py", "real/script.py", "no_suffix"):
        (tmp_path / file).write_text(f"#!/usr/bin/env python3\n{WHO_AM_I}")
    (tmp_path / "folder" / "linked.py").symlink_to(tmp_path / "real" / "script.py")
    environment = {**os.environ, **settings}
    ways = [[], ["-m", "cmp_trainer.cli", "run"]]
    plain, ours = (
        subprocess.run(
            [sys.executable, *way, script, "a", "--b"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        for way in ways
    )
    assert plain.returncode == 0, plain.stderr
    found, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    found["path"] = found["path"][: len(expected["path"])]  # some versions of torch add a folder at its end
    assert found == expected
    assert "DeprecationWarning: shown only in __main__" in plain.stderr and plain.stderr in ours.stderr


def test_child_processes_find_what_the_script_defines(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n\n\ndef square(number):\n    return number**2\n\n\n"
        "if __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(square, [2, 3]))\n"
    )
    done = subprocess_of(["-m", "cmp_trainer.cli", "run"], script)
    assert (done.returncode, done.stdout) == (0, "[4, 9]\n"), done.stderr


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_ends_a_run_as_it_ends_python(signal, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os, signal, time\nos.kill(os.getpid(), signal.{signal})\ntime.sleep(60)\n")
    command = "import sys; from cmp_trainer.cli import main; main(['run', *sys.argv[1:]])"  # as the console script
    plain, replaced = (subprocess_of(way, script) for way in ([], ["-c", command]))
    assert replaced.returncode == plain.returncode < 0


def test_processes_that_do_not_know_of_each_other_are_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it; on a CPU nothing connects them
    with pytest.raises((SystemExit, ValueError)) as error:
        run(tmp_path, "default_arguments", "--cmp_num_ablations", "2")
    said = f"{capsys.readouterr().err} {error.value}"
    # accelerate 1.6 tries to connect them, and finds no address here.
    assert "2 processes were launched, but this one knows of 1" in said or "MASTER_ADDR" in said


def test_children_that_are_forked_compare(tmp_path):
    words = [SCRIPT, tmp_path, "forked", "--cmp_num_ablations", "2"]
    done = subprocess_of(["-m", "cmp_trainer.cli", "run"], *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loss_ablated_2" in json.loads((tmp_path / "found.json").read_text())["log"]

"""`cmp-trainer compare`: methods x seeds of a script, each run once, and what their differences say."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmp_trainer import cli
from cmp_trainer.compare import Options
from cmp_trainer.studies import report
from cmp_trainer.studies.methods import BUILT_IN, DEFAULT, make_methods
from cmp_trainer.studies.records import mixed_conditions, read_metrics, read_records, script_digest
from cmp_trainer.studies.running import Runner, telling_line
from cmp_trainer.studies.statistics import interval, summarize
from cmp_trainer.studies.study import Metric, Study, make_tasks

SCRIPTS = Path(__file__).parent / "scripts"
STUB = f"{sys.executable} {SCRIPTS / 'report_metrics.py'}"
PLAIN_AND_BETTER = ["--method", "plain", "--method", "ours=--better 0.05"]


def compare(folder, *words, metric="test_accuracy", launcher=STUB, methods=PLAIN_AND_BETTER):
    """Run the command in this process, its runs started by the stub that reports made-up metrics."""
    script = str(SCRIPTS / "train_somehow.py")
    options = [*methods, "--metric", *metric.split(), "--output", str(folder), "--launcher", launcher]
    cli.main(["compare", script, *words, *options])


def options_of(*words):
    return Options.read(cli._parsed_compare(["compare", *words]))


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def study(**changes):
    settings = {
        "script": "train.py",
        "arguments": ["--train_file", "{task}_{seed}.csv"],
        "methods": make_methods(["plain", "ours=--cmp_num_ablations 2"]),
        "tasks": make_tasks(["a=--one 1", "b="]),
        "num_seeds": 3,
        "metrics": [Metric.parse("test_accuracy")],
    }
    return Study(**{**settings, **changes})


def rated_study(**changes):
    """A study that chooses among three learning rates on the validation split."""
    settings = {"learning_rates": ["1e-5", "1e-4", "1e-3"], "select": Metric.parse("eval_loss")}
    return study(**{**settings, **changes})


def record(task="a", method="plain", seed=0, rate=None, seconds=1.0, **metrics):
    return {
        "task": task,
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "metrics": metrics,
        "seconds": seconds,
    }


# --- methods ---


def test_methods_are_built_in_or_have_arguments():
    assert [one.name for one in make_methods(None)] == list(DEFAULT)
    assert make_methods(["all"]) == list(BUILT_IN.values())
    ours = make_methods(["plain", "ours=--cmp_num_ablations 2 --cmp_baseline first"])[1]
    assert ours.words == ["--cmp_num_ablations", "2", "--cmp_baseline", "first"]
    assert make_methods({"plain": None, "other": "--x 1"})[1].arguments == "--x 1"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["rdrop"], r"--method rdrop: not built in \(did you mean r-drop or layer-drop\?\); give its arguments"),
        (["plain", "plain="], "--method plain: given twice"),
        (["=--x 1"], r"--method \(empty\): a name is needed"),
    ],
)
def test_a_method_that_is_unknown_or_given_twice_is_rejected(asked, message):
    with pytest.raises(ValueError, match=message):
        make_methods(asked)


# --- what is run ---


def test_runs_are_tasks_by_methods_by_seeds_with_all_methods_of_a_seed_first():
    runs = study().reported_runs(study().choose_rates([]))
    assert len(runs) == 2 * 2 * 3
    assert [run.key for run in runs[:4]] == [(t, m, None, 0) for t in "ab" for m in ("plain", "ours")]
    expected = ["--train_file", "a_2.csv", "--one", "1", "--cmp_num_ablations", "2", "--seed", "2"]
    assert next(list(run.words) for run in runs if run.key == ("a", "ours", None, 2)) == expected


def test_a_metric_of_the_split_that_a_learning_rate_is_chosen_on_is_rejected():
    with pytest.raises(ValueError, match="--metric eval_accuracy and --select eval_loss are measured on the same"):
        rated_study(metrics=[Metric.parse("test_accuracy"), Metric.parse("eval_accuracy")])


def test_the_same_file_for_validation_and_test_is_rejected():
    files = ["--validation_file", "dev.csv", "--test_file", "dev.csv"]
    with pytest.raises(ValueError, match=r"--test_file and --validation_file are both dev\.csv"):
        rated_study(arguments=files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ["1e-5"]}, "--learning_rates needs --select"),
        ({"select": Metric.parse("eval_loss")}, "--select needs --learning_rates"),
        ({"num_seeds": 0}, "--seeds 0: expected 1 or more"),
        ({"metrics": []}, "--metric is missing"),
        ({"select_tasks": ["a"]}, "--select_tasks needs --select"),
        ({"against": ["other"]}, "--against other is not one of the methods: plain, ours"),
        ({"tasks": make_tasks(["ner"]), "arguments": []}, "--task ner has no arguments; pass NAME=ARGS, or -- --task"),
        ({"arguments": ["--cmp_num_ablations=2"]}, "given to every run, so plain would be comparative too"),
        ({"learning_rates": ["1e-4", "0.0001"], "select": Metric.parse("eval_loss")}, "are the same number"),
        ({"learning_rates": ["1e-4", "low"], "select": Metric.parse("eval_loss")}, "low: expected numbers"),
    ],
)
def test_settings_that_cannot_be_run_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)


def finished_selection(one):
    """Records of the selection, in which plain does best at 1e-5 and ours at 1e-3 on a, at 1e-4 on b."""
    best = {("a", "plain"): "1e-5", ("a", "ours"): "1e-3", ("b", "plain"): "1e-5", ("b", "ours"): "1e-4"}
    return [
        record(run.task, run.method, run.seed, run.learning_rate, eval_loss=rate_loss(run, best))
        for run in one.selection_runs()
    ]


def rate_loss(run, best):
    return 0.1 if run.learning_rate == best[run.task, run.method] else 0.5 + (run.task == "b")


def test_each_task_and_method_takes_the_learning_rate_with_the_best_validation_metric():
    one = rated_study()
    rates = one.choose_rates(finished_selection(one))
    expected = {("a", "plain"): "1e-5", ("a", "ours"): "1e-3", ("b", "plain"): "1e-5", ("b", "ours"): "1e-4"}
    assert rates == expected
    assert {run.learning_rate for run in one.reported_runs(rates) if run.method == "plain"} == {"1e-5"}


def test_one_learning_rate_for_all_tasks_is_chosen_on_those_named():
    one = rated_study(select_tasks=["a"])
    assert {run.task for run in one.selection_runs()} == {"a"}
    assert one.choose_rates(finished_selection(one))["b", "ours"] == "1e-3"


def test_no_learning_rate_is_chosen_while_a_run_of_any_of_them_is_missing():
    one = rated_study(select_seeds=2)
    records = finished_selection(one)
    missing = next(each for each in records if (each["task"], each["method"], each["seed"]) == ("a", "plain", 1))
    rates = one.choose_rates([each for each in records if each is not missing])
    assert ("a", "plain") not in rates
    assert len(rates) == 3
    assert not [run for run in one.reported_runs(rates) if (run.task, run.method) == ("a", "plain")]


def test_a_learning_rate_at_which_a_run_diverged_is_not_chosen():
    one = rated_study()
    records = finished_selection(one)
    for each in records:
        if each["metrics"]["eval_loss"] == 0.1:
            each["metrics"]["eval_loss"] = None
    assert one.choose_rates(records)["a", "plain"] == "1e-4"  # of two that are equal, the lower one
    for each in records:
        each["metrics"]["train_loss"] = None
    assert one.choose_rates(records) == {}


def test_rates_at_the_edge_of_three_or_more_are_counted():
    one = rated_study()
    assert one.at_edge(one.choose_rates(finished_selection(one))) == [("a", "plain"), ("a", "ours"), ("b", "plain")]
    two = rated_study(learning_rates=["1e-5", "1e-4"])
    assert two.at_edge({("a", "plain"): "1e-5"}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arguments": ["--seed", "3"]},
            "--seed cannot be an argument of a study: every run has its own",
        ),
        ({"arguments": ["--output-dir=x"]}, "--output-dir cannot be an argument of a study: every run has its own"),
        ({"tasks": make_tasks(["a=--one -- 1"])}, "-- cannot be among the arguments"),
        (
            {
                "methods": make_methods(["plain", "ours=--learning_rate 1"]),
                "learning_rates": ["1", "2"],
                "select": Metric.parse("eval_loss"),
            },
            "--learning_rate cannot be an argument of a study: it is chosen from --learning_rates",
        ),
    ],
)
def test_arguments_that_are_set_for_each_run_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        study(**changes)


def test_runs_of_the_selection_at_the_chosen_rate_are_not_run_again():
    one = rated_study()
    chosen = one.reported_runs(one.choose_rates(finished_selection(one)))
    assert len(set(chosen) & set(one.selection_runs())) == 4


# --- statistics ---


def test_the_interval_of_paired_differences_is_students():
    low, high = interval([1.0, 2.0, 4.0])
    half = 4.302652729911275 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom, tables
    assert low == pytest.approx(7 / 3 - half)
    assert high == pytest.approx(7 / 3 + half)


def test_one_pair_has_no_interval():
    assert all(map(math.isnan, interval([0.1])))
    assert all(map(math.isnan, interval([0.1], [0.1, 0.2])))


def test_equal_differences_have_no_interval_of_width_zero():
    assert all(map(math.isnan, interval([0.0025, 0.0025])))
    assert interval([0.0, 0.0]) == (0.0, 0.0)


def test_levels_of_tasks_add_nothing_to_the_interval():
    """Tasks that differ in level but hardly within: an interval over all runs would reach from -0.1 to 0.1."""
    low, high = interval([0.10, 0.10, 0.101], [-0.10, -0.10, -0.101])
    assert -0.002 < low <= 0 <= high < 0.002


def test_tasks_weigh_the_same_in_the_interval():
    low, high = interval([0.1, 0.1, 0.1, 0.101], [0.3, 0.3, 0.301])
    assert 0.199 <= low <= 0.2003 <= high < 0.202


def test_with_equal_variances_it_has_the_degrees_of_freedom_of_all_tasks():
    """Two tasks of three seeds: t of 4 degrees of freedom, 2.7764 in tables."""
    low, high = interval([-1.0, 0.0, 1.0], [9.0, 10.0, 11.0])
    assert (high - low) / 2 == pytest.approx(2.7764 * math.sqrt(1 / 3 + 1 / 3) / 2, abs=1e-4)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(0)
    spreads = np.array([0.3, 0.6, 1.2, 2.0])
    held = 0
    for _ in range(600):
        low, high = interval(*(draw.normal(0, 1, (4, 3)) * spreads[:, None]))
        held += low <= 0 <= high
    assert 0.93 < held / 600 < 0.99  # a bootstrap stratified by task: 0.82


@given(st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=4), min_size=1, max_size=3), st.floats(-2, 2))
def test_the_interval_lies_around_the_mean_and_moves_with_it(samples, shift):
    low, high = interval(*samples)
    mean = np.mean([np.mean(one) for one in samples])
    assert math.isnan(low) or low - 1e-9 <= mean <= high + 1e-9
    moved = interval(*(np.array(one) + shift for one in samples))
    assert math.isnan(low) or math.isnan(moved[0]) or moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_diverged_runs_are_counted_and_leave_the_other_pairs():
    plain = [record(seed=seed, loss=value) for seed, value in enumerate([1.0, 2.0, None])]
    ours = [record(method="ours", seed=seed, loss=value) for seed, value in enumerate([None, 1.5, 2.0])]
    never = [record(method="never", seed=seed, loss=None) for seed in range(3)]
    rows = summarize(plain + ours + never, Metric.parse("loss"), ["plain", "ours", "never"], "plain")
    assert [(row.runs, row.diverged, row.pairs) for row in rows] == [(3, 1, 2), (3, 1, 1), (3, 3, 0)]
    assert rows[1].difference == -0.5
    shown = report.readable(rows, {})
    assert list(shown["diverged"]) == [1, 1, 3]
    assert shown["loss"][2] == "all diverged"


def test_a_star_marks_an_interval_that_excludes_zero():
    plain = [record(seed=seed, acc=0.5, loss=1.0) for seed in range(3)]
    ours = [record(method="ours", seed=seed, acc=0.6 + seed / 100, loss=1 + (seed - 1) / 10) for seed in range(3)]
    metrics = [Metric.parse("acc"), Metric.parse("loss")]
    rows = [row for metric in metrics for row in summarize(plain + ours, metric, ["plain", "ours"], "plain")]
    shown = report.overview(rows)
    assert list(shown["acc"]) == ["0.5000", "0.6100*"]
    assert list(shown["loss"]) == ["1.0000", "1.0000"]


def test_a_method_that_lacks_tasks_is_shown_with_their_number():
    records = [record(task, method, seed, acc=0.1) for task in "ab" for method in ("plain", "ours") for seed in (0, 1)]
    rows = summarize(records[:-2], Metric.parse("acc"), ["plain", "ours"], "plain")
    overall = [row for row in rows if row.task == "all tasks"]
    assert list(report.readable(overall, {})["tasks"]) == [2, 1]


def test_differences_are_of_the_same_seed_and_only_of_seeds_that_both_have():
    plain = [record(seed=seed, loss=value) for seed, value in enumerate([1.0, 2.0, 3.0])]
    ours = [
        record(method="ours", seed=seed, loss=value, seconds=3.0) for seed, value in {2: 2.5, 0: 0.9, 7: 9}.items()
    ]
    _, row = summarize(plain + ours, Metric.parse("loss"), ["plain", "ours"], "plain")
    assert (row.runs, row.pairs, row.wins) == (3, 2, 2)
    assert row.difference == pytest.approx((-0.5 - 0.1) / 2)
    assert row.times == 3.0


@pytest.mark.parametrize(
    ("name", "wins"),
    [("accuracy", 0), ("loss", 1), ("ece", 1), ("test_WER", 1), ("closs", 0), ("f1:lower", 1), ("loss:higher", 0)],
)
def test_wins_count_in_the_direction_of_the_metric(name, wins):
    metric = Metric.parse(name)
    records = [record(**{metric.name: 1.0}), record(method="ours", **{metric.name: 0.5})]
    assert summarize(records, metric, ["plain", "ours"], "plain")[1].wins == wins


def test_all_tasks_weigh_the_same_however_many_runs_they_have():
    records = [record(task, "plain", seed, acc=0.0) for task in "ab" for seed in range(4)]
    records += [record("a", "ours", seed, acc=0.1) for seed in range(4)]
    records += [record("b", "ours", seed, acc=0.3) for seed in range(2)]
    rows = summarize(records, Metric.parse("acc"), ["plain", "ours"], "plain")
    overall = next(row for row in rows if row.task == "all tasks" and row.method == "ours")
    assert overall.difference == pytest.approx(0.2)
    assert (overall.pairs, overall.wins) == (6, 6)


# --- running and recording ---


def test_a_study_ends_in_tables_numbers_and_a_plot(tmp_path, capsys):
    compare(tmp_path, "--seeds", "3", metric="test_accuracy test_loss")
    shown = capsys.readouterr().out
    assert "+0.0500" in shown
    assert "3 of 3" in shown
    assert "2.00" in shown  # times plain's time
    written = {file.name for file in tmp_path.iterdir()} - {".lock"}
    assert written == {
        *("runs.jsonl", "runs", "results.csv", "results.json", "results.md", "test_accuracy.png", "test_loss.png")
    }
    overview = (tmp_path / "results.md").read_text().partition("## Overview")[2].partition("##")[0]
    assert "| ours | 0.7600 | 0.4500 | 2.00 |" in overview  # no star: all differences are the same number
    ours = next(row for row in results(tmp_path) if row["method"] == "ours")
    assert (ours["mean"], ours["difference"]) == (pytest.approx(0.76), pytest.approx(0.05))


def test_what_has_finished_is_not_run_again(tmp_path):
    compare(tmp_path, "--seeds", "2")
    before = read_records(tmp_path)
    assert len(before) == 4
    compare(tmp_path, "--seeds", "3")
    assert read_records(tmp_path)[:4] == before
    assert len(read_records(tmp_path)) == 6


def test_what_has_finished_so_far_is_reported_without_running_anything(tmp_path):
    compare(tmp_path, "--seeds", "2")
    records = read_records(tmp_path)
    (tmp_path / "results.csv").unlink()
    compare(tmp_path, "--seeds", "5", "--report")
    assert read_records(tmp_path) == records
    assert [row["runs"] for row in results(tmp_path)] == [2, 2]


def test_a_line_that_was_cut_short_is_run_again(tmp_path):
    compare(tmp_path, "--seeds", "1")
    file = tmp_path / "runs.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(first + "\n" + second[:30])
    compare(tmp_path, "--seeds", "1")
    assert [one["method"] for one in read_records(tmp_path)] == ["plain", "ours"]


def test_a_failed_run_is_shown_with_its_last_line_and_does_not_end_the_others(tmp_path, capsys):
    methods = ["--method", "plain", "--method", "ours=--fails 0"]
    with pytest.raises(SystemExit) as stopped:
        compare(tmp_path, "--seeds", "2", methods=methods)
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "failed: ours, seed 0: out of luck: seed 0 (status 3)" in shown
    assert "1 run failed" in shown
    assert sorted((one["method"], one["seed"]) for one in read_records(tmp_path)) == [
        *[("ours", 1), ("plain", 0), ("plain", 1)]
    ]


def test_a_run_that_reports_no_such_metric_ends_the_study_and_is_kept(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare(tmp_path, "--seeds", "9", metric="test_acuracy")
    assert "test_acuracy was not reported by plain, seed 0 (did you mean test_accuracy" in capsys.readouterr().err
    assert 1 <= len(read_records(tmp_path)) <= 2
    compare(tmp_path, "--seeds", "1")
    with pytest.raises(SystemExit):
        compare(tmp_path / "other", "--reports", "nothing", "--seeds", "1")
    assert "found neither *_results.json nor trainer_state.json" in capsys.readouterr().err


def test_a_metric_that_earlier_runs_lack_is_told_before_anything_runs(tmp_path, capsys):
    compare(tmp_path, "--seeds", "1")
    with pytest.raises(SystemExit):
        compare(tmp_path, "--seeds", "3", metric="test_f1")
    assert "test_f1 was not reported by plain, seed 0" in capsys.readouterr().err
    assert len(read_records(tmp_path)) == 2
    rates = ["--learning_rates", "1e-3", "1e-4", "--select", "eval_accuracy"]
    compare(tmp_path / "rated", "--seeds", "1", *rates)
    with pytest.raises(SystemExit):
        compare(tmp_path / "rated", "--seeds", "1", *rates[:-1], "eval_acuracy", "--report")
    assert "eval_acuracy was not reported by plain, 1e-3, seed 0" in capsys.readouterr().err


def test_records_of_other_arguments_are_not_taken_for_these(tmp_path, capsys):
    compare(tmp_path, "--epochs", "3", "--seeds", "1")
    with pytest.raises(SystemExit):
        compare(tmp_path, "--epochs", "4", "--seeds", "1")
    assert "has a run of plain, seed 0 with other arguments (then 3, now 4)" in capsys.readouterr().err


def test_a_report_of_other_arguments_is_rejected_too(tmp_path, capsys):
    compare(tmp_path, "--epochs", "3", "--seeds", "1")
    for changes in (["--epochs", "4"], ["--epochs", "3", "--metric", "test_f1"]):
        with pytest.raises(SystemExit):
            compare(tmp_path, *changes, "--seeds", "1", "--report")
    shown = capsys.readouterr().err
    assert "with other arguments (then 3, now 4)" in shown
    assert "test_f1 was not reported by plain, seed 0" in shown


def test_tasks_with_the_same_arguments_are_rejected():
    with pytest.raises(ValueError, match="--task mrpc has the same arguments as cola"):
        study(arguments=[], tasks=make_tasks(["cola=--x 1", "mrpc=--x 1"]))


def test_jobs_run_side_by_side_with_the_threads_divided(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert Runner("train.py", tmp_path, [], jobs=4).environment()["OMP_NUM_THREADS"] == "2"
    assert Runner("train.py", tmp_path, [], jobs=9).environment()["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in Runner("train.py", tmp_path, [], launcher="srun").environment()


def test_threads_that_are_set_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    compare(tmp_path, "--seeds", "1", "--jobs", "2")
    assert {one["threads"] for one in read_records(tmp_path)} == {"4,2"}


def test_discard_deletes_the_folders_of_finished_runs_and_keeps_their_logs(tmp_path):
    compare(tmp_path, "--seeds", "1", "--discard")
    assert sorted(path.name for path in (tmp_path / "runs" / "ours").iterdir()) == ["seed_0.log"]


@pytest.mark.parametrize(
    ("launcher", "start"),
    [
        ("", [sys.executable, "-m", "cmp_trainer.controls", "train.py"]),
        ("srun -n 1", ["srun", "-n", "1", sys.executable, "-m", "cmp_trainer.controls", "train.py"]),
        ("accelerate launch --num_processes 2", ["accelerate", "launch", "--num_processes", "2", "-m"]),
        ("/opt/bin/torchrun --nproc_per_node 2", ["/opt/bin/torchrun", "--nproc_per_node", "2", "-m"]),
        ("deepspeed --num_gpus 2", ["deepspeed", "--num_gpus", "2", "--module", "cmp_trainer.controls"]),
    ],
)
def test_a_launcher_comes_before_each_run(launcher, start, tmp_path):
    run = study().selection_runs() or study().reported_runs(study().choose_rates([]))
    command = Runner("train.py", tmp_path, [], launcher=launcher).command(run[0])
    assert command[: len(start)] == start
    assert command[-2:] == ["--output_dir", str(tmp_path / "runs" / "a" / "plain" / "seed_0")]


def test_a_launcher_may_take_the_whole_command_as_one_word(tmp_path):
    run = study().reported_runs(study().choose_rates([]))[0]
    command = Runner("train.py", tmp_path, [], launcher="sbatch --wait --wrap '{command}'").command(run)
    assert command[:3] == ["sbatch", "--wait", "--wrap"]
    assert shlex.split(command[3])[:3] == [sys.executable, "-m", "cmp_trainer.controls"]


def test_learning_rates_are_chosen_on_the_validation_split_and_reported_on_the_test_split(tmp_path):
    rates = ["--learning_rates", "1e-3", "1e-4", "1e-1", "--select", "eval_accuracy"]
    compare(tmp_path, "--seeds", "2", *rates)
    assert {one["learning_rate"] for one in read_records(tmp_path) if one["seed"] == 1} == {"1e-4"}
    assert "1e-4" in (tmp_path / "results.md").read_text()
    assert [row["runs"] for row in results(tmp_path)] == [2, 2]


def test_a_study_is_described_in_a_file_and_the_command_line_overrides_it(tmp_path):
    file = tmp_path / "study.yaml"
    settings = {
        "script": str(SCRIPTS / "train_somehow.py"),
        "arguments": "--learning_rate 1e-4",
        "task": {"a": "--one 1", "b": "--one 2"},
        "method": {"plain": None, "ours": "--better 0.1"},
        "seeds": 5,
        "metric": ["test_accuracy", "test_loss"],
        "launcher": STUB,
    }
    file.write_text(json.dumps(settings))  # which is YAML too
    cli.main(["compare", "--study", str(file), "--seeds", "1", "--output", str(tmp_path / "out"), "--", "--more", "x"])
    records = read_records(tmp_path / "out")
    assert [(one["task"], one["method"]) for one in records] == [(t, m) for t in "ab" for m in ("plain", "ours")]
    assert records[0]["arguments"] == "--learning_rate 1e-4 --more x --one 1 --seed 0"
    assert {row["task"] for row in results(tmp_path / "out")} == {"all tasks", "a", "b"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "--metric", "x", "--output", "y"], "train.py is not a file"),
        (["--metric", "x", "--output", "y"], "expected a script"),
        (["--fp16", "train.py", "--metric", "x", "--output", "y"], "--fp16 came before the script's path"),
        (
            [str(SCRIPTS / "report_metrics.py"), "--metric", "x", "--output", "y", "--jobs", "0"],
            "--jobs 0: expected 1",
        ),
        ([str(SCRIPTS / "report_metrics.py"), "--metric", "x"], "--output is missing"),
        ([str(SCRIPTS / "report_metrics.py"), "--output", "y"], "--metric is missing"),
        (["--study", "none.yaml"], "--study none.yaml does not exist"),
    ],
)
def test_what_is_missing_is_said_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *words])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_an_unknown_key_of_a_study_is_named(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("scipt: train.py\n")
    with pytest.raises(SystemExit):
        cli.main(["compare", "--study", str(tmp_path / "study.yaml")])
    assert "unknown key 'scipt' (did you mean script" in capsys.readouterr().err


def test_results_are_taken_over_what_the_trainer_logged_and_other_files_are_left_alone(tmp_path):
    state = {"log_history": [{"eval_loss": 1.0}, {"train_runtime": 3.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "eval_results.json").write_text('{"eval_loss": 0.5}')
    (tmp_path / "bench_results.json").write_text("[1, 2]")
    assert read_metrics(tmp_path) == {"eval_loss": 0.5, "train_runtime": 3.0}
    (tmp_path / "eval_results.json").write_text('{"eval_loss":')
    with pytest.raises(ValueError, match=r"eval_results\.json cannot be read"):
        read_metrics(tmp_path)


def test_differences_to_several_methods_stand_side_by_side(tmp_path):
    methods = ["--method", "plain", "--method", "ours=--better 0.05", "--method", "more=--better 0.07"]
    compare(tmp_path, "--seeds", "2", "--against", "plain", "ours", methods=methods)
    rows = {(row["method"], row["against"]): row["difference"] for row in results(tmp_path)}
    assert rows["more", "plain"] == pytest.approx(0.07)
    assert rows["more", "ours"] == pytest.approx(0.02)
    table = (tmp_path / "results.md").read_text()
    assert "| difference to plain; wins | difference to ours; wins |" in table
    assert "+0.0200" in table


def test_the_line_that_names_an_error_is_shown_and_not_what_a_launcher_adds(tmp_path):
    log = tmp_path / "seed_0.log"
    log.write_text("10%\r20%\nValueError: no such column\nChildFailedError: \n=====\n")
    assert telling_line(log) == "ValueError: no such column"
    log.write_text("one\n\ntwo\n")
    assert telling_line(log) == "two"


def test_runs_side_by_side_have_slots_of_their_own(tmp_path):
    compare(tmp_path, "--seeds", "3", "--jobs", "2", launcher=f"env SLOT={{slot}} {STUB}")
    slots = [file.read_text().splitlines()[-1] for file in tmp_path.glob("runs/*/seed_*/command.txt")]
    assert set(slots) == {"0", "1"}


def test_metrics_are_read_from_the_trainers_log_where_a_script_saves_none(tmp_path):
    state = {"log_history": [{"eval_loss": 1.0, "epoch": 1}, {"eval_loss": 0.5, "note": "x"}, {"train_runtime": 3.0}]}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    assert read_metrics(tmp_path) == {"eval_loss": 0.5, "epoch": 1, "train_runtime": 3.0}


def test_numbers_that_are_not_finite_are_recorded_as_none(tmp_path):
    (tmp_path / "all_results.json").write_text('{"eval_loss": NaN, "eval_accuracy": 0.5}')
    assert read_metrics(tmp_path) == {"eval_loss": None, "eval_accuracy": 0.5}


def test_names_and_empty_values_of_a_study_are_taken_as_they_stand(tmp_path):
    file = tmp_path / "study.yaml"
    script = SCRIPTS / "report_metrics.py"
    file.write_text(
        f"script: {script}\nmethod: {{plain: , off: --better 1e-1, no: --x}}\nseeds:\nlearning_rates: 1e-5 3e-5\n"
        f"select: eval_loss\nmetric: [test_f1]\noutput: out\ndiscard: true\n"
    )
    options = options_of("--study", str(file))
    assert [(one.name, one.arguments) for one in options.study().methods] == [
        *[("plain", ""), ("off", "--better 1e-1"), ("no", "--x")]
    ]
    assert (options.seeds, options.learning_rates, options.discard) == (5, ["1e-5", "3e-5"], True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds: many", "seeds: expected a whole number, not 'many'"),
        ("discard: perhaps", "discard: expected true or false, not 'perhaps'"),
        ("jobs: [1]", "jobs: expected a whole number"),
        ("arguments: {do_train: true}", "arguments: expected words"),
        ("script: [a, b]", "script: expected text"),
        ("method: {plain: [--x, 1]}", "method: expected arguments as text"),
        ("task: [{a: --x}]", "task: expected"),
        ("- seeds", "must hold names and values"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(line, message, tmp_path):
    (tmp_path / "study.yaml").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        options_of("--study", str(tmp_path / "study.yaml"))


def test_a_script_on_the_command_line_takes_the_place_of_the_studys(tmp_path):
    (tmp_path / "study.yaml").write_text("script: other.py\narguments: --one 1\noutput: out\n")
    script = str(SCRIPTS / "report_metrics.py")
    options = options_of("--study", str(tmp_path / "study.yaml"), script, "--two", "2")
    assert (options.script, options.arguments) == (script, ["--one", "1", "--two", "2"])


def test_a_dry_run_shows_the_command_lines_and_starts_none(tmp_path, capsys):
    compare(tmp_path, "--seeds", "2", "--dry_run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("cmp_trainer.controls" in line for line in lines)
    assert not read_records(tmp_path)
    compare(tmp_path, "--seeds", "2", "--dry_run", "--learning_rates", "1", "2", "--select", "eval_accuracy")
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 * 2
    assert "then 2 runs at the rates chosen" in shown.err


def test_a_study_is_run_by_one_process_at_a_time(tmp_path, capsys):
    with Runner("train.py", tmp_path, []).exclusive(), pytest.raises(SystemExit):
        compare(tmp_path, "--seeds", "1")
    assert "another cmp-trainer compare is running in" in capsys.readouterr().err
    compare(tmp_path, "--seeds", "1")
    with Runner("train.py", tmp_path, []).exclusive():
        compare(tmp_path, "--seeds", "1", "--report")  # which only reads


def test_an_output_folder_that_cannot_be_made_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        compare(tmp_path / "file" / "study", "--seeds", "1")
    assert f"--output {tmp_path / 'file' / 'study'} cannot be written: Not a directory" in capsys.readouterr().err


def test_runs_of_an_earlier_script_and_times_that_do_not_compare_are_told(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("1\n")
    same = record() | {"script_sha256": script_digest(str(script)), "jobs": 2, "threads": "1"}
    assert mixed_conditions([same, same], str(script)) == []
    found = mixed_conditions([same, same | {"script_sha256": "other"}, same | {"jobs": 1}], str(script))
    assert found[0].startswith("1 of 3 runs were made by another version")
    assert "jobs x threads: 1 x 1, 2 x 1" in found[1]
    found = mixed_conditions([same | {"versions": "torch=1"}, same | {"versions": "torch=2"}], str(script))
    assert found == ["Runs had different versions: torch=1; torch=2."]


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_study_that_is_stopped_takes_its_runs_with_it(number, tmp_path):
    """Also what a run has started itself, as a launcher does."""
    script = tmp_path / "sleeps.py"
    script.write_text("")
    launcher = f"bash -c 'sleep 600 & echo $! > {tmp_path}/pid; wait' --"
    words = ["compare", str(script), "--method", "plain", "--metric", "x", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "cmp_trainer.cli", *words, "--launcher", launcher]
    study = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=interruptible)
    until = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    study.send_signal(number)
    assert study.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not read_records(tmp_path / "out")


def interruptible():
    """As in a terminal; what a shell runs in the background ignores Ctrl-C, and under nohup a hang-up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.xdist_group("processes")
def test_a_script_that_knows_nothing_of_it_is_compared_from_start_to_end(tmp_path):
    """In processes of their own: plain, without dropout, and two ablations."""
    script = SCRIPTS / "report_loss.py"
    methods = [word for name in ("plain", "no-dropout", "comparative-2") for word in ("--method", name)]
    words = ["compare", str(script), "--max_steps", "2", *methods, "--seeds", "1", "--jobs", "2"]
    words += ["--metric", "eval_loss", "--output", str(tmp_path)]
    ended = subprocess.run([sys.executable, "-m", "cmp_trainer.cli", *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    losses = {row["method"]: row["mean"] for row in results(tmp_path)}
    assert len(set(losses.values())) == 3  # three different trainings
    assert "comparative-2" in ended.stdout

"""`cmp-trainer compare`: run a script by several methods and seeds, and say which is better and at what cost.

    cmp-trainer compare run_glue.py mrpc.yaml --method plain --method comparative-2 --seeds 5 --metric eval_accuracy \\
        --output study

studies/ has its parts: methods, the study, how its runs are started and recorded, statistics, and the report.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from cmp_trainer.errors import first_line, nearest
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import plain_errors
from cmp_trainer.studies import report
from cmp_trainer.studies.methods import make_methods
from cmp_trainer.studies.records import (
    mixed_conditions,
    read_records,
    require_metrics,
    require_same_arguments,
    study_record,
)
from cmp_trainer.studies.running import Runner, slug
from cmp_trainer.studies.statistics import summarize
from cmp_trainer.studies.study import Metric, Run, Study, make_tasks, record_key


@dataclass
class Options:
    """The command's options, which are the keys of a study's file too."""

    script: str = ""
    arguments: list[str] = field(default_factory=list)
    method: list[str] | Mapping[str, str | None] | None = None
    task: list[str] | Mapping[str, str | None] | None = None
    against: list[str] = field(default_factory=list)
    seeds: int = 5
    metric: list[str] = field(default_factory=list)
    learning_rates: list[str] = field(default_factory=list)
    select: str = ""
    select_seeds: int = 1
    select_tasks: list[str] = field(default_factory=list)
    output: str = ""
    jobs: int = 1
    launcher: str = ""
    discard: bool = False

    @classmethod
    def read(cls, parsed: argparse.Namespace) -> "Options":
        """Those of the command line, over those of the study's file.

        Raises:
            ValueError: the file cannot be read, or no script is named.
        """
        given = _read_study(parsed.study) if parsed.study else {}
        names = {one.name for one in fields(cls)}
        given |= {name: value for name, value in vars(parsed).items() if name in names and value is not None}
        words = list(parsed.words)
        if words and ("script" not in given or words[0].endswith(".py")):
            given["script"] = words.pop(0)
        options = cls(**given)
        if not options.script:
            raise ValueError("expected a script: cmp-trainer compare script.py …, or --study FILE that names one")
        if options.script.startswith("-"):
            raise ValueError(f"{options.script} came before the script's path: cmp-trainer compare script.py …")
        if not Path(options.script).is_file():
            raise ValueError(f"{options.script} is not a file; give the path of a Python script, then its arguments")
        if not options.output:
            raise ValueError("--output is missing; name a folder for the study")
        if options.jobs < 1:
            raise ValueError(f"--jobs {options.jobs}: expected 1 or more")
        options.arguments += words
        return options

    def study(self) -> Study:
        """What is to be run."""
        study = Study(
            script=self.script,
            arguments=self.arguments,
            methods=make_methods(self.method),
            tasks=make_tasks(self.task),
            num_seeds=self.seeds,
            metrics=[Metric.parse(one) for one in self.metric],
            against=self.against,
            learning_rates=self.learning_rates,
            select=Metric.parse(self.select) if self.select else None,
            select_seeds=self.select_seeds,
            select_tasks=self.select_tasks,
        )
        for option, names in (("--method", [one.name for one in study.methods]), ("--task", list(study.tasks))):
            if len({slug(name) for name in names}) < len(names):
                raise ValueError(
                    f"{option}: two of these names map to the same folder, rename one: {', '.join(names)}"
                )
        return study

    def runner(self, study: Study) -> Runner:
        """How it is run."""
        return Runner(self.script, Path(self.output), study.reported_metrics, self.jobs, self.launcher, self.discard)


@plain_errors()
def run_compare(parsed: argparse.Namespace) -> None:
    """Run what the study lacks, print its table, write its files.

    Raises:
        SystemExit: with one line that says what is wrong with the options; or with 1 where a run failed.
    """
    _require_packages()
    options = Options.read(parsed)
    study = options.study()
    runner = options.runner(study)
    if parsed.dry_run:
        _print_commands(study, runner)
        return
    failed = 0
    if not parsed.report:
        with runner.exclusive():
            failed = run_study(study, runner)
    _report(study, runner.folder)
    if failed:
        failures = "1 run" if failed == 1 else f"{failed} runs"
        print(f"{failures} failed; remove the cause and run the same command again to retry", file=sys.stderr)
        raise SystemExit(1)


def run_study(study: Study, runner: Runner) -> int:
    """Run what is not recorded yet, first what learning rates are chosen from; the number of failures."""
    selection = study.selection_runs()
    _checked_records(study, runner.folder, selection)
    failed = runner.run_all(selection, "learning rates") if selection else {}
    runs = study.reported_runs(study.choose_rates(read_records(runner.folder)))
    _checked_records(study, runner.folder, runs)
    failed |= runner.run_all([run for run in runs if run not in failed], "runs")
    return len(failed)


def _checked_records(study: Study, folder: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The records of these runs.

    Raises:
        ValueError: one was made with other arguments, or lacks a metric of the study.
    """
    records = read_records(folder)
    require_same_arguments(records, runs, study.script, folder)
    keys = {run.key for run in runs}
    records = [one for one in records if record_key(one) in keys]
    require_metrics(records, study.reported_metrics)
    return records


def _print_commands(study: Study, runner: Runner) -> None:
    selection = study.selection_runs()
    selected = _checked_records(study, runner.folder, selection)
    runs = runner.unfinished(selection)
    if not runs:
        reported = study.reported_runs(study.choose_rates(selected))
        _checked_records(study, runner.folder, reported)
        runs = runner.unfinished(reported)
    for run in runs:
        print(shlex.join(runner.command(run)))
    if selection and len(selected) < len(selection):
        of_selection = len(selection) // len(study.learning_rates)  # at the rate chosen, they are reported too
        number = len(study.pairs()) * study.num_seeds - of_selection
        print(f"then {number} runs at the rates chosen", file=sys.stderr)


def _report(study: Study, folder: Path) -> None:
    selected = _checked_records(study, folder, study.selection_runs())
    rates = study.choose_rates(selected)
    finished = _checked_records(study, folder, study.reported_runs(rates))
    if not finished:
        why = "no learning rate could be chosen yet" if selected and not rates else "no run has finished"
        print(f"{why}, so there is nothing to compare", file=sys.stderr)
        raise SystemExit(1)
    notes = mixed_conditions(finished, study.script)
    without_rate = [pair for pair in study.pairs() if pair not in rates]
    if without_rate:
        shown = "; ".join(", ".join(part for part in pair if part) for pair in without_rate)
        notes.append(
            f"No learning rate was chosen for {shown}: selection runs are missing, or one diverged at every rate."
        )
    edges = study.at_edge(rates)
    if edges:
        notes.append(
            f"Chosen learning rates at the edge of --learning_rates: {len(edges)} of {len(rates)}. A wider grid may "
            "contain better ones."
        )
    methods, metrics = [method.name for method in study.methods], list(study.metrics)
    results = [
        row
        for metric in metrics
        for other in study.against or methods[:1]
        for row in summarize(finished, metric, methods, other)
    ]
    files = [*report.write(folder, results, study_record(study), rates), folder / "results.md"]
    with written_whole(files[-1]) as file:
        file.write_text(report.as_markdown(results, metrics, rates, notes), encoding="utf-8")
    for metric in metrics:
        files.append(folder / f"{slug(metric.name)}.png")
        with written_whole(files[-1]) as file:
            report.plot(results, metric).savefig(file)
    print(report.as_text(results, metrics[0], rates))
    for note in notes:
        print(note)
    print(f"written: {', '.join(str(file) for file in files)}")


class _TextLoader(yaml.SafeLoader):
    """Scalars as the text that stands there, `1e-5` and `off` too; an empty one is None."""


_TextLoader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_study(path: str) -> dict[str, Any]:
    """Options by name, of a YAML file."""
    if not Path(path).is_file():
        raise ValueError(f"--study {path} does not exist")
    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), _TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"--study {path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--study {path} must hold names and values, `seeds: 5`, one a line")
    kinds = {one.name: list if one.default is MISSING else type(one.default) for one in fields(Options)}
    for name in found:
        if name not in kinds:
            raise ValueError(f"{path}: unknown key {name!r}{nearest(str(name), kinds)}")
    return {name: _converted(path, name, value, kinds[name]) for name, value in found.items() if value is not None}


def _converted(path: str, name: str, value: Any, kind: type) -> Any:
    expected = {int: "a whole number", bool: "true or false", list: "words"}.get(kind, "text")
    error = ValueError(f"{path}: {name}: expected {expected}, not {value!r}")
    if name in ("method", "task") and isinstance(value, dict):
        unreadable = [text for text in value.values() if not isinstance(text, str | None)]
        if unreadable:
            raise ValueError(f"{path}: {name}: expected arguments as text, not {unreadable[0]!r}")
        return value
    if name in ("method", "task"):
        kind, value = list, [value] if isinstance(value, str) else value
    if isinstance(value, list):
        if kind is not list:
            raise error
        if not all(isinstance(one, str) for one in value):
            raise error
        return value
    if not isinstance(value, str):
        raise error
    if kind is list:
        return shlex.split(value)
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise error from None


def _require_packages() -> None:
    missing = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"a comparison needs {', '.join(missing)}: pip install 'cmp-trainer[plot]'")

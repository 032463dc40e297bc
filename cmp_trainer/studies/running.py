"""Run what a study still lacks, as separate processes side by side, and record what each of them reports.

A study's folder:

    runs.jsonl                              a line for each finished run: its arguments, metrics and seconds
    runs/TASK/METHOD/lr_RATE/seed_0.log     what it printed
    runs/TASK/METHOD/lr_RATE/seed_0/        its --output_dir

What is in runs.jsonl is not run again, so a study goes on where it was interrupted, and the folder `runs` may be
deleted.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cmp_trainer.errors import nearest
from cmp_trainer.studies.study import Run, Study

STARTS_PYTHON = ("accelerate", "torchrun", "deepspeed")  # launchers that are given a module, not a command
RECORDED = ("torch", "transformers", "accelerate", "cmp-trainer")


class RunFailed(RuntimeError):
    """A run ended with an error, or without the metrics of its study; the last line it printed."""


@dataclass(frozen=True)
class Runner:
    """How runs are started.

    Args:
        script: path of the script.
        folder: the study's.
        required: metrics that every run has to report.
        jobs: how many run side by side; the threads of this machine are divided among them.
        launcher: a command that is put before each run; `{command}` in it is replaced by the whole run, quoted.
        discard: whether a run's output folder is deleted once its metrics are recorded.
    """

    script: str
    folder: Path
    required: Sequence[str]
    jobs: int = 1
    launcher: str = ""
    discard: bool = False

    def run_all(self, runs: Sequence[Run], show: str) -> dict[Run, str]:
        """Run what is not recorded yet, with a progress bar; the failed ones, each with its last line."""
        done = {record_key(one) for one in read_records(self.folder)}
        left = [run for run in runs if run.key not in done]
        failed: dict[Run, str] = {}
        bar = tqdm(total=len(runs), initial=len(runs) - len(left), desc=show, unit="run", dynamic_ncols=True)
        with bar, ThreadPoolExecutor(self.jobs) as pool, _cancelled_at_errors(pool):
            futures = {pool.submit(self.run, run): run for run in left}
            for future in as_completed(futures):
                run = futures[future]
                try:
                    record = future.result()
                except RunFailed as error:
                    failed[run] = str(error)
                    tqdm.write(f"failed: {run}: {error} (log: {self.place(run)}.log)", file=sys.stderr)
                else:
                    append_record(self.folder, record)
                    bar.set_postfix_str(f"last: {run}")  # no numbers, which would show test results one by one
                bar.update()
        return failed

    def run(self, run: Run) -> dict[str, Any]:
        """Run it, and return its record.

        Raises:
            RunFailed: it ended with an error, or reported too little.
        """
        output, log = self.place(run), self.place(run).with_suffix(".log")
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            try:
                ended = subprocess.run(
                    self.command(run),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.environment(),
                )
            except OSError as error:
                raise RunFailed(f"could not be started: {error}") from error
        seconds = time.perf_counter() - started
        if ended.returncode:
            raise RunFailed(f"{last_line(log) or 'it printed nothing'} (status {ended.returncode})")
        metrics = read_metrics(output)
        missing = [name for name in self.required if name not in metrics]
        if missing:
            raise RunFailed(f"reported no {missing[0]}{known_metrics(missing[0], metrics)}")
        if self.discard:
            shutil.rmtree(output, ignore_errors=True)
        return {
            "task": run.task,
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "script": self.script,
            "arguments": shlex.join(run.words),
            "metrics": metrics,
            "seconds": round(seconds, 2),
            "threads": int(self.environment()["OMP_NUM_THREADS"]),
            "jobs": self.jobs,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": " ".join(f"{name}={version(name)}" for name in RECORDED),
        }

    def command(self, run: Run) -> list[str]:
        """The command line that starts a run."""
        module = ["-m", "cmp_trainer.controls", self.script, *run.words, "--output_dir", str(self.place(run))]
        words = shlex.split(self.launcher)
        whole = [sys.executable, *module]
        if any("{command}" in word for word in words):
            return [word.replace("{command}", shlex.join(whole)) for word in words]
        starts_python = any(Path(word).name in STARTS_PYTHON for word in words)
        return [*words, *(module if starts_python else whole)]

    def environment(self) -> dict[str, str]:
        """Environment variables that are set for every run: its share of the threads."""
        threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // self.jobs)
        return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}

    def place(self, run: Run) -> Path:
        """The run's output folder; its log stands beside it."""
        parts = [run.task, run.method, f"lr_{run.learning_rate}" if run.learning_rate else ""]
        return self.folder.joinpath("runs", *(slug(part) for part in parts if part), f"seed_{run.seed}")


def slug(name: str) -> str:
    """A name as a part of a path."""
    return re.sub(r"[^\w.+-]+", "_", name)


def record_key(record: Mapping[str, Any]) -> tuple[str, str, str | None, int]:
    """As a run's key."""
    return record["task"], record["method"], record["learning_rate"], record["seed"]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The finished runs of a study; a last line that was cut short is not one."""
    path = folder / "runs.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line.endswith("\n"):
                raise ValueError(f"{path}: line {number} is not a record; remove it ({error.msg})") from error
    return records


def append_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a finished run; what an interruption left of a line is removed first."""
    path = folder / "runs.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_text("".join(json.dumps(one) + "\n" for one in read_records(folder)), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def require_same_arguments(
    records: Sequence[Mapping[str, Any]], runs: Sequence[Run], script: str, folder: Path
) -> None:
    """Raises a ValueError where a recorded run was made with another script or arguments than the study has now."""
    recorded = {record_key(one): one for one in records}
    for run in runs:
        if run.key not in recorded:
            continue
        before, of_script = recorded[run.key]["arguments"], recorded[run.key].get("script", script)
        if of_script != script:
            raise ValueError(
                f"{folder / 'runs.jsonl'} has a run of {run} with the script {of_script}, not {script}; pass another "
                "--output"
            )
        if before != shlex.join(run.words):
            raise ValueError(
                f"{folder / 'runs.jsonl'} has a run of {run} with other arguments ({_difference(before, run)}); pass "
                "another --output, or remove its line to run it again"
            )


def _difference(before: str, run: Run) -> str:
    old, new = shlex.split(before), list(run.words)
    gone, added = [word for word in old if word not in new], [word for word in new if word not in old]
    return f"then {' '.join(gone) or '(nothing)'}, now {' '.join(added) or '(nothing, or in another order)'}"


def read_metrics(folder: Path) -> dict[str, float]:
    """What a run of a Hugging Face script reports: its *_results.json, or else what its Trainer logged.

    Numbers only; of a value that is logged several times, the last one.
    """
    files = [folder / "all_results.json"] if (folder / "all_results.json").exists() else []
    files = files or sorted(folder.glob("*_results.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not found:
        states = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"] if states else []
    numbers = {name: value for one in found for name, value in one.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def last_line(log: Path) -> str:
    """The last line that a run printed, shortened."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return line if len(line) <= 300 else f"{line[:300]} …"


def known_metrics(name: str, metrics: Mapping[str, float]) -> str:
    """The end of a message that a metric is missing: what was meant, or all that there are."""
    if not metrics:
        return "; found neither *_results.json nor trainer_state.json in its output folder"
    return nearest(name, metrics) or f"; it has {', '.join(sorted(metrics))}"


@contextmanager
def _cancelled_at_errors(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Ctrl-C reaches the runs too; those that wait are not started."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def study_record(study: Study) -> dict[str, Any]:
    """A study's settings, as they are written beside its results."""
    return {
        "script": study.script,
        "arguments": shlex.join(study.arguments),
        "tasks": {name: shlex.join(words) for name, words in study.tasks.items()},
        "methods": {method.name: method.arguments for method in study.methods},
        "seeds": study.num_seeds,
        "metrics": [metric.name for metric in study.metrics],
        "learning_rates": list(study.learning_rates),
        "select": None if study.select is None else study.select.name,
        "select_tasks": list(study.select_tasks),
        "select_seeds": study.select_seeds,
    }

"""Run what a study still lacks, as separate processes side by side.

A study's folder:

    runs.jsonl                              a line for each finished run: its arguments, metrics and seconds
    runs/TASK/METHOD/lr_RATE/seed_0.log     what it printed
    runs/TASK/METHOD/lr_RATE/seed_0/        its --output_dir

What is in runs.jsonl is not run again, so a study goes on where it was interrupted, and the folder `runs` may be
deleted.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cmp_trainer.studies.records import (
    append_record,
    known_metrics,
    read_metrics,
    read_records,
    record_key,
    script_digest,
)
from cmp_trainer.studies.study import Run

STARTS_PYTHON = {"accelerate": "-m", "torchrun": "-m", "deepspeed": "--module"}  # are given a module, not a command
RECORDED = ("torch", "transformers", "accelerate", "cmp-trainer")
SECONDS_TO_END = 10


class RunFailed(RuntimeError):
    """A run ended with an error, or without the metrics of its study; the last line it printed."""


class Processes:
    """Runs that are under way. Each has a process group of its own, so that what it started ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._ended = False

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Run a command to its end; its exit status.

        Raises:
            RunFailed: it could not be started, or the study is being stopped.
        """
        with self._lock:
            if self._ended:
                raise RunFailed("not started, because the study is being stopped")
            try:
                process = subprocess.Popen(command, start_new_session=True, **options)
            except OSError as error:
                raise RunFailed(f"could not be started: {error}") from error
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def end(self) -> None:
        """End those under way, first politely, and start no more."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            _signal_group(process, signal.SIGKILL)  # what is left of its group


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


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
    processes: Processes = field(default_factory=Processes, init=False, compare=False)
    recording: Any = field(default_factory=threading.Lock, init=False, compare=False)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """In the body, no other process runs this study.

        Raises:
            ValueError: another one does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"another cmp-trainer compare is running in {self.folder}; wait for it, or pass another --output"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """Those that are not recorded yet."""
        done = {record_key(one) for one in read_records(self.folder)}
        return [run for run in runs if run.key not in done]

    def run_all(self, runs: Sequence[Run], show: str) -> dict[Run, str]:
        """Run what is not recorded yet, with a progress bar; the failed ones, each with its last line."""
        left = self.left(runs)
        failed: dict[Run, str] = {}
        bar = tqdm(total=len(runs), initial=len(runs) - len(left), desc=show, unit="run", dynamic_ncols=True)
        with bar, ThreadPoolExecutor(self.jobs) as pool, self._ended_together(pool):
            futures = {pool.submit(self.run, run): run for run in left}
            for future in as_completed(futures):
                run = futures[future]
                try:
                    future.result()
                except RunFailed as error:
                    failed[run] = str(error)
                    tqdm.write(f"failed: {run}: {error} (log: {self.place(run)}.log)", file=sys.stderr)
                else:
                    bar.set_postfix_str(f"last: {run}")  # no numbers, which would show test results one by one
                bar.update()
        return failed

    def run(self, run: Run) -> None:
        """Run it, and record it.

        Raises:
            RunFailed: it ended with an error, or reported too little.
        """
        output, log = self.place(run), self.place(run).with_suffix(".log")
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        digest, environment = script_digest(self.script), self.environment()
        started = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            status = self.processes.run(
                self.command(run),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
        seconds = time.perf_counter() - started
        if status:
            raise RunFailed(f"{last_line(log) or 'it printed nothing'} (status {status})")
        metrics = read_metrics(output)
        missing = [name for name in self.required if name not in metrics]
        if missing:
            raise RunFailed(f"reported no {missing[0]}{known_metrics(missing[0], metrics)}")
        record = {
            "task": run.task,
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "script": self.script,
            "script_sha256": digest,
            "arguments": shlex.join(run.words),
            "metrics": metrics,
            "seconds": round(seconds, 2),
            "threads": environment.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")),
            "jobs": self.jobs,
            "launcher": self.launcher,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": " ".join(f"{name}={version(name)}" for name in RECORDED),
        }
        with self.recording:
            append_record(self.folder, record)
        if self.discard:
            shutil.rmtree(output, ignore_errors=True)

    def command(self, run: Run) -> list[str]:
        """The command line that starts a run."""
        of_run = ["cmp_trainer.controls", self.script, *run.words, "--output_dir", str(self.place(run))]
        words = shlex.split(self.launcher)
        whole = [sys.executable, "-m", *of_run]
        if any("{command}" in word for word in words):
            return [word.replace("{command}", shlex.join(whole)) for word in words]
        as_module = [STARTS_PYTHON[Path(word).name] for word in words if Path(word).name in STARTS_PYTHON]
        return [*words, as_module[0], *of_run] if as_module else [*words, *whole]

    def environment(self) -> dict[str, str]:
        """Environment variables that are set for every run: its share of the threads, unless a launcher decides."""
        given = {"TOKENIZERS_PARALLELISM": "false"}
        if not self.launcher and "OMP_NUM_THREADS" not in os.environ:
            given["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // self.jobs))
        return given

    def place(self, run: Run) -> Path:
        """The run's output folder; its log stands beside it."""
        parts = [run.task, run.method, f"lr_{run.learning_rate}" if run.learning_rate else ""]
        return self.folder.joinpath("runs", *(slug(part) for part in parts if part), f"seed_{run.seed}")

    @contextmanager
    def _ended_together(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """Where the body ends early (an error, Ctrl-C, SIGTERM), the runs under way end, and no others start."""
        with _raised_at_sigterm():
            try:
                yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.processes.end()
                raise


@contextmanager
def _raised_at_sigterm() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, raises SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def slug(name: str) -> str:
    """A name as a part of a path."""
    return re.sub(r"[^\w.+-]+", "_", name)


def last_line(log: Path) -> str:
    """The last line that a run printed, shortened."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    line = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return line if len(line) <= 300 else f"{line[:300]} …"

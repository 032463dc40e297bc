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
from queue import SimpleQueue
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from cmp_trainer.studies.records import append_record, read_metrics, read_records, require_metrics, script_digest
from cmp_trainer.studies.study import Metric, Run, record_key

STARTS_PYTHON = {"accelerate": "-m", "torchrun": "-m", "deepspeed": "--module"}  # are given a module, not a command
RECORDED = ("torch", "transformers", "accelerate", "cmp-trainer")
SECONDS_TO_END = 10


class RunFailed(RuntimeError):
    """A run ended with an error; the line that says which."""


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
        _signal_group(process, signal.SIGKILL)  # what it may have left behind
        with self._lock:
            self._running.discard(process)
            if self._ended:
                raise RunFailed("ended with the study")
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
        launcher: a command that is put before each run. `{command}` in it is replaced by the whole run, quoted, and
            `{slot}` by a number below `jobs` that no other run has meanwhile, as for a GPU.
        discard: whether a run's output folder is deleted once its metrics are recorded.
    """

    script: str
    folder: Path
    required: Sequence[Metric]
    jobs: int = 1
    launcher: str = ""
    discard: bool = False
    processes: Processes = field(default_factory=Processes, init=False, compare=False)
    recording: Any = field(default_factory=threading.Lock, init=False, compare=False)
    slots: SimpleQueue[int] = field(default_factory=SimpleQueue, init=False, compare=False)

    def __post_init__(self) -> None:
        for slot in range(self.jobs):
            self.slots.put(slot)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """In the body, no other process runs this study.

        Raises:
            ValueError: another one does, or nothing can be written there.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"another cmp-trainer compare is running in {self.folder}; wait for it, or pass another --output"
            ) from None
        except OSError as error:
            raise ValueError(f"--output {self.folder} cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def unfinished(self, runs: Sequence[Run]) -> list[Run]:
        """Those that are not recorded yet."""
        done = {record_key(one) for one in read_records(self.folder)}
        return [run for run in runs if run.key not in done]

    def run_all(self, runs: Sequence[Run], show: str) -> dict[Run, str]:
        """Run what is not recorded yet, with a progress bar; the failed ones, each with the line that says why.

        Raises:
            ValueError: a run reported too little, and so would the next ones.
        """
        left = self.unfinished(runs)
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
                    tqdm.write(f"failed: {run}: {error} (log: {self.output_folder(run)}.log)", file=sys.stderr)
                else:
                    bar.set_postfix_str(f"last: {run}")  # no numbers, which would show test results one by one
                bar.update()
        return failed

    def run(self, run: Run) -> None:
        """Run it, and record it.

        Raises:
            RunFailed: it ended with an error.
            ValueError: it reported too little; it is recorded all the same.
        """
        output, log = self.output_folder(run), self.output_folder(run).with_suffix(".log")
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        digest, environment = script_digest(self.script), self.environment()
        started, slot = time.perf_counter(), self.slots.get()
        try:
            with log.open("w", encoding="utf-8") as file:
                status = self.processes.run(
                    self.command(run, slot),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                )
        finally:
            self.slots.put(slot)
        seconds = time.perf_counter() - started
        if status:
            raise RunFailed(f"{telling_line(log) or 'it printed nothing'} (status {status})")
        try:
            metrics = read_metrics(output)
        except ValueError as error:
            raise RunFailed(str(error)) from error
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
        require_metrics([record], self.required)
        if self.discard:
            shutil.rmtree(output, ignore_errors=True)

    def command(self, run: Run, slot: int = 0) -> list[str]:
        """The command line that starts a run."""
        of_run = ["cmp_trainer.controls", self.script, *run.words, "--output_dir", str(self.output_folder(run))]
        words = [word.replace("{slot}", str(slot)) for word in shlex.split(self.launcher)]
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

    def output_folder(self, run: Run) -> Path:
        """The run's output folder; its log stands beside it."""
        parts = [run.task, run.method, f"lr_{run.learning_rate}" if run.learning_rate else ""]
        return self.folder.joinpath("runs", *(slug(part) for part in parts if part), f"seed_{run.seed}")

    @contextmanager
    def _ended_together(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """If the body raises (an error, Ctrl-C, a signal), end the runs under way and start no more."""
        with _raised_at_signals():
            try:
                yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.processes.end()
                raise


@contextmanager
def _raised_at_signals() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, and SIGHUP, when a terminal closes, raise SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slug(name: str) -> str:
    """A name as a part of a path."""
    return re.sub(r"[^\w.+-]+", "_", name)


def telling_line(log: Path) -> str:
    """The last line of a run's log that names an error, as launchers print more after it; or else the last one."""
    lines = [line.strip() for line in re.split(r"[\r\n]", log.read_text(encoding="utf-8", errors="replace"))]
    lines = [line for line in lines if line]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)|error)\b: ?", line)]
    errors = [line for line in errors if "CalledProcessError" not in line and "ChildFailedError" not in line]
    line = (errors or lines or [""])[-1]
    return line if len(line) <= 300 else f"{line[:300]} …"

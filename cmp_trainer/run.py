"""Run an existing Hugging Face script with comparative loss behind its Trainer.

The script runs as `python script.py …` runs it: as the module `__main__`, with its own folder first in `sys.path`, its
own command line, and its own errors and exit status. While it runs,

1. `Trainer`, `TrainingArguments` and their Seq2Seq forms, wherever transformers keeps them, are CmpTrainer and
   CmpTrainingArguments;
2. the `--cmp_…` arguments of its command line, which the script does not see, are set on every CmpTrainingArguments
   that is created, so that they also apply in a script that hard-codes its arguments or has a parser of its own;
3. its Trainers are watched: a run that asks for ablations and compares nothing ends with an error.

Afterwards the names are restored. Modules that the script imported and that were built on the replaced classes are
removed from `sys.modules`, so that a later import builds them on the original ones.
"""

import argparse
import builtins
import ctypes
import dataclasses
import difflib
import functools
import logging
import multiprocessing
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import SourceFileLoader
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, NoReturn, cast, get_type_hints

from torch import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from cmp_trainer import (
    CmpSeq2SeqTrainer,
    CmpSeq2SeqTrainingArguments,
    CmpTrainer,
    CmpTrainingArguments,
    ComparativeStep,
)

logger = logging.getLogger(__name__)

REPLACEMENTS: dict[type, type] = {
    Trainer: CmpTrainer,
    TrainingArguments: CmpTrainingArguments,
    Seq2SeqTrainer: CmpSeq2SeqTrainer,
    Seq2SeqTrainingArguments: CmpSeq2SeqTrainingArguments,
}


class UsageError(ValueError):
    """The run cannot start: there is no such Python script, or a `--cmp_…` argument is invalid."""


class NothingComparedError(RuntimeError):
    """The run asked for ablations, and no training step compared anything."""


def run_script(
    script: str, arguments: Sequence[str] = (), cmp_arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Do what `python script arguments…` does, with the Trainer replaced.

    Args:
        script: path of a Python file.
        arguments: its command line; the script does not see those that begin with `--cmp_`.
        cmp_arguments: more values by field name, such as `{"cmp_num_ablations": 2}`; `arguments` override them.

    Returns:
        The script's global variables when it ended.

    Raises:
        UsageError: there is no such Python script, or a `--cmp_…` argument is invalid; nothing has run.
        NothingComparedError: ablations were asked for, and the script ended without comparing anything.
        BaseException: whatever the script raises; names, `sys.argv` and `sys.path` are restored first.
    """
    _require_python_script(script)
    given, own_arguments = split_arguments(arguments)
    given = {**(cmp_arguments or {}), **given}
    exit_of_script = None
    with replaced_trainers(), _watched(given) as watch, _command_line(script, own_arguments), _main(script) as module:
        try:
            code = compile(Path(script).read_bytes(), str(module.__file__), "exec", dont_inherit=True)
            exec(code, vars(module))
        except SystemExit as stop:
            if stop.code not in (None, 0):
                raise
            exit_of_script = stop
    showed_help = exit_of_script is not None and {"-h", "--help"} & set(own_arguments)
    if not (showed_help and watch.idle):
        watch.require_comparison()
    if exit_of_script is not None:
        raise exit_of_script
    return vars(module)


def _require_python_script(script: str) -> None:
    path = Path(script)
    if not path.is_file():
        raise UsageError(
            f"{script} is not a file; give the path of a Python script, then its arguments. A launcher comes first: "
            "accelerate launch -m cmp_trainer.cli run script.py"
        )
    if path.suffix in (".py", ".pyw"):
        return
    with path.open("rb") as file:
        first_line = file.readline()
    if path.suffix or not re.match(rb"#!.*python", first_line):
        raise UsageError(
            f"{script} is not a Python script; give the .py file that trains, then its arguments, a config file among "
            "them. In a shell script, write cmp-trainer run in place of python"
        )


class _CmpArgumentParser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def cmp_parser() -> argparse.ArgumentParser:
    """A parser of the comparative arguments alone; its namespace contains those that were given, and no defaults."""
    types = get_type_hints(CmpTrainingArguments)
    fields = [
        (
            field.name,
            types[field.name],
            dataclasses.field(default=field.default, default_factory=field.default_factory, metadata=field.metadata),
        )
        for field in dataclasses.fields(CmpTrainingArguments)
        if field.name.startswith("cmp_")
    ]
    title = {"_argument_group_name": "comparative loss"}
    arguments = dataclasses.make_dataclass("CmpArguments", fields, namespace=title)
    parser = _CmpArgumentParser(cast(Any, arguments), add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.metavar = None if action.choices else {int: "N", float: "X"}.get(cast(type, action.type), "VALUE")
    return parser


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take the comparative arguments out of a command line.

    Returns:
        The values of those that were given, by field name, and the remaining arguments in their order: all that come
        after `--` are among them.

    Raises:
        UsageError: a value is invalid, or there is no such `--cmp_…` argument; names the one with the nearest name.
    """
    before, after = until_dashes(arguments)
    require_known(before)
    values, rest = cmp_parser().parse_known_args(before)
    return vars(values), [*rest, *after]


def until_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and the words from it on."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end:])


def require_known(words: Sequence[str]) -> None:
    """Raises a UsageError where a word looks like an argument of comparative loss and is none."""
    known = {option for action in cmp_parser()._actions for option in action.option_strings}
    for word in words:
        mistyped = re.fullmatch(r"(--?cmp[_-]([\w-]*))(=.*)?", word)
        if mistyped and mistyped[1] not in known:
            names = [option.removeprefix("--cmp_") for option in known if option.startswith("--cmp_")]
            nearest = difflib.get_close_matches(mistyped[2].replace("-", "_"), names, n=1)
            hint = f"did you mean --cmp_{nearest[0]}?" if nearest else "cmp-trainer run --help lists them"
            raise UsageError(f"{mistyped[1]} is not an argument of comparative loss; {hint}")


@contextmanager
def replaced_trainers() -> Iterator[None]:
    """The names of Trainer and TrainingArguments in transformers mean the comparative ones; restored at the end."""
    imported_before = set(sys.modules)
    _rebind(REPLACEMENTS)
    try:
        yield
    finally:
        # Also in modules of transformers that were imported meanwhile.
        _rebind({ours: theirs for theirs, ours in REPLACEMENTS.items()})
        for name in set(sys.modules) - imported_before:
            if _holds_replacement(sys.modules[name]):
                del sys.modules[name]


def _rebind(classes: Mapping[type, type]) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "transformers":
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in classes:
                    setattr(module, name, classes[value])


def _holds_replacement(module: Any) -> bool:
    ours = tuple(REPLACEMENTS.values())
    values = list(getattr(module, "__dict__", {}).values())
    return any(isinstance(value, type) and issubclass(value, ours) for value in values)


@contextmanager
def _command_line(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and the first entry of `sys.path` as `python script arguments…` sets them.

    Under PYTHONSAFEPATH (`python -P`) Python puts no folder of the script's there.
    """
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


@contextmanager
def _main(script: str) -> Iterator[types.ModuleType]:
    """A new module `__main__`, by which child processes and pickles find what the script defines."""
    before, module = sys.modules["__main__"], types.ModuleType("__main__")
    file = os.path.abspath(script)
    vars(module).update(__file__=file, __loader__=SourceFileLoader("__main__", file), __builtins__=builtins)
    sys.modules["__main__"] = module
    try:
        yield module
    finally:
        sys.modules["__main__"] = before


@contextmanager
def _watched(given: Mapping[str, Any]) -> Iterator["_Watch"]:
    """Set the given values on all arguments that are created, and watch all Trainers; restores the methods."""
    watch = _Watch(given)
    with ExitStack() as wrapped:
        for owner, name, wrapper in [
            (CmpTrainingArguments, "__post_init__", watch.set_values),
            (ComparativeStep, "__call__", watch.note_step),
            (Trainer, "__init__", watch.note_making),
            (Trainer, "train", watch.note_training),
            (Trainer, "evaluate", watch.note_evaluation),
            (Trainer, "predict", watch.note_evaluation),
            (BaseProcess, "start", watch.note_process),
        ]:
            wrapped.enter_context(wrapped_method(owner, name, wrapper))
        wrapped.callback(register_optimizer_step_pre_hook(watch.note_optimizer).remove)
        yield watch


def leave_process_group() -> None:
    """Otherwise its threads may abort a process that ends before them."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def wrapped_method(owner: type, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """`wrapper` is called with the method and then the method's arguments, in place of the method."""
    inherited, method = name not in vars(owner), getattr(owner, name)

    @functools.wraps(method)
    def wrapping(*args: Any, **kwargs: Any) -> Any:
        return wrapper(method, *args, **kwargs)

    setattr(owner, name, wrapping)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, method)


_FLAGS = ("made", "made_cmp", "called", "resumed", "with_ablations", "evaluated", "stepped", "compared")


class _Seen(ctypes.Structure):
    """What happened in a run, in memory that is shared with forked child processes, so that what they do counts."""

    _fields_ = [("asked", ctypes.c_int), *[(flag, ctypes.c_bool) for flag in _FLAGS]]


class _Watch:
    """Wrappers around methods of Trainers, arguments and processes, which record what those do.

    Args:
        given: values from the command line, by field name.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.seen: Any = RawValue(_Seen)
        self.seen.asked = given.get("cmp_num_ablations", 0)
        self.plain_trainers: set[str] = set()
        self.fresh_processes = False

    def set_values(self, post_init: Callable[..., None], args: CmpTrainingArguments) -> None:
        for name, value in self.given.items():
            setattr(args, name, value)
        post_init(args)
        self.seen.asked = max(self.seen.asked, args.cmp_num_ablations)

    def note_making(self, init: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        self.seen.made = True
        if isinstance(trainer, CmpTrainer):
            self.seen.made_cmp = True
        else:
            self.plain_trainers.add(type(trainer).__name__)

    def note_training(
        self, train: Callable[..., Any], trainer: Any, resume: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        resume = kwargs.pop("resume_from_checkpoint", resume)
        self.seen.called = True
        self.seen.with_ablations |= getattr(trainer, "num_ablations", 0) > 0
        output = train(trainer, resume, *args, **kwargs)
        self.seen.resumed |= bool(resume)
        return output

    def note_step(self, call: Callable[..., Any], step: ComparativeStep, *args: Any, **kwargs: Any) -> Any:
        loss = call(step, *args, **kwargs)
        self.seen.compared |= step.num_comparisons > 0
        return loss

    def note_evaluation(self, evaluate: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.evaluated = True
        return evaluate(trainer, *args, **kwargs)

    def note_optimizer(self, *_: Any) -> None:
        self.seen.stepped = True

    def note_process(self, start: Callable[..., None], process: BaseProcess) -> None:
        """Daemonic processes load data; others may train."""
        method = getattr(process, "_start_method", None) or multiprocessing.get_start_method()
        self.fresh_processes |= method != "fork" and not process.daemon
        start(process)

    @property
    def idle(self) -> bool:
        """Whether no Trainer was made, nothing was trained, and no process was started to do it."""
        return not (self.seen.made or self.seen.stepped or self.fresh_processes)

    def require_comparison(self) -> None:
        """Raise if ablations were asked for and nothing was compared; only warn if nothing was left to train."""
        seen = self.seen
        if not seen.asked or seen.compared:
            return
        asked = f"--cmp_num_ablations {seen.asked} was given, but nothing was compared: "
        if seen.resumed and not seen.stepped:
            logger.warning("%sthe training resumed from a checkpoint that was complete.", asked)
        elif seen.evaluated and not (seen.called or seen.stepped or self.fresh_processes):
            logger.warning("%sthe script evaluated and did not train.", asked)
        else:
            found, advice = self._what_happened()
            raise NothingComparedError(f"{asked}{found}. {advice}.")

    def _what_happened(self) -> tuple[str, str]:
        """What was found, and what to do about it."""
        seen = self.seen
        if self.fresh_processes and not seen.called:
            return (
                "the script started child processes anew (spawn), in which Trainer is the plain one",
                "Use CmpTrainer in the script, or let a launcher start the processes: "
                "accelerate launch -m cmp_trainer.cli run script.py",
            )
        if not seen.made:
            return (
                "the script made no Trainer",
                "In the script, use CmpTrainer in place of its own trainer, or ComparativeStep in its training loop",
            )
        if not seen.made_cmp:
            names = ", ".join(sorted(self.plain_trainers)) or "the script's Trainer"
            return (
                f"{names} was imported before the run began, and is still based on the plain Trainer",
                "Base it on CmpTrainer in place of Trainer, or import it in the script only",
            )
        if not seen.called:
            return (
                "the script made a Trainer and did not call its train()",
                "If it trains in a loop of its own, use ComparativeStep there",
            )
        if not seen.stepped:
            return "train() took no step", "Check the number of steps and the training data"
        if seen.with_ablations:
            return "no training step compared anything", "Check that the training data have labels"
        return (
            "the script trained with cmp_num_ablations 0 in its arguments",
            "Let it make its arguments by calling TrainingArguments, and leave their cmp_num_ablations as it is",
        )

"""Run an existing Hugging Face script as it is, with comparative loss behind its Trainer.

A script says `from transformers import Trainer, TrainingArguments`, or subclasses them in a module of its own. For the
time of the run these names, wherever transformers keeps them, mean CmpTrainer and CmpTrainingArguments (and their
Seq2Seq forms), so that its command line understands `--cmp_num_ablations 2`. Afterwards every name means what it meant
before, and modules that the script imported and that were built on the replaced classes are forgotten, so that a later
import makes them anew.
"""

import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from cmp_trainer import CmpSeq2SeqTrainer, CmpSeq2SeqTrainingArguments, CmpTrainer, CmpTrainingArguments

REPLACEMENTS: dict[type, type] = {
    transformers.Trainer: CmpTrainer,
    transformers.TrainingArguments: CmpTrainingArguments,
    transformers.Seq2SeqTrainer: CmpSeq2SeqTrainer,
    transformers.Seq2SeqTrainingArguments: CmpSeq2SeqTrainingArguments,
}


def run_script(script: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What `python script arguments…` does, with the Trainer replaced.

    Args:
        script: path of a Python file.
        arguments: its command line.

    Returns:
        The script's globals at its end.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: whatever the script raises; names, `sys.argv` and `sys.path` are restored first.
    """
    if not Path(script).is_file():
        raise FileNotFoundError(
            f"{script} is no file; expected the path of a Python script: cmp-trainer run script.py …"
        )
    with replaced_trainers(), _command_line(script, arguments):
        return runpy.run_path(script, run_name="__main__")


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
    """`sys.argv` and the first entry of `sys.path` as `python script arguments…` sets them."""
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path

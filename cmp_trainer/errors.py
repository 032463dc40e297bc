"""Errors that are reported in one line: those that the user can do something about."""

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
# safetensors and torch raise errors of their own, with these words.
_DISK_FAULTS_IN_WORDS = re.compile(
    rf"os error ({'|'.join(map(str, _DISK_FAULTS))})\b|PytorchStreamWriter failed|inline_container.*unexpected pos"
)


def origin(error: BaseException) -> tuple[str, Path]:
    """The name of the module that raised the error, and the folder of its file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals if trace is not None else {}
    return where.get("__name__", ""), Path(where.get("__file__") or "").resolve().parent


def is_from_cmp_trainer(error: BaseException) -> bool:
    """Whether cmp_trainer raised the error, whose message then says what to do."""
    return origin(error)[0].partition(".")[0] == "cmp_trainer"


def is_disk_fault(error: BaseException) -> bool:
    """Whether the error comes from a disk that is full or not writable."""
    return any(
        getattr(one, "errno", None) in _DISK_FAULTS or _DISK_FAULTS_IN_WORDS.search(str(one)) for one in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, …"""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of its message; its type where it has none."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` (did you mean …?)` with the known names that are most like this one; nothing where none is."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(prefix + match for match in near)}?)" if near else ""

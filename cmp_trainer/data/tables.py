"""Tables of labelled examples: one csv, tsv, json, jsonl or parquet file, or a split of a loaded dataset.

A path is a path: brackets, stars and colons in it are part of its name. Errors count the rows of data from 1 and
name the first one at fault.
"""

import codecs
import glob
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

from cmp_trainer.errors import causes, first_line, nearest

logger = logging.getLogger(__name__)

# The quotes of a tsv are text, as in GLUE's own files; "None" or "NA" is text too, not a missing value.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t", "quoting": 3}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def load_file(file: Path, split: str) -> Dataset:
    """The rows of one csv, tsv, json (list of objects), jsonl or parquet file.

    Raises:
        ValueError: The file is missing, without rows, or not of the form that its ending says.
    """
    if not file.is_file():
        beside = sorted(other.name for other in file.parent.glob("*") if other.suffix in READERS)
        found = f"found there: {', '.join(beside)}" if beside else "no data files there"
        raise ValueError(f"--{split}_file {file} does not exist; {found}")
    if file.suffix not in READERS:
        raise ValueError(f"--{split}_file {file} ends in {file.suffix!r}; expected one of {', '.join(READERS)}")
    if "::" in str(file):
        raise ValueError(f"--{split}_file {file} contains '::', which datasets reads as a URL; rename the file")
    if not file.stat().st_size:
        raise ValueError(f"--{split}_file {file} is empty")
    reader, options = READERS[file.suffix]
    if reader == "json" and starts_with_byte_order_mark(file):
        options = {**options, "encoding": "utf-8-sig"}
    try:
        dataset = datasets.load_dataset(reader, data_files={split: glob.escape(str(file))}, split=split, **options)
        assert isinstance(dataset, Dataset)
        if reader == "json":
            dataset.data.validate(full=True)  # its reader lets bytes through that are not UTF-8
    except (DatasetsError, ValueError) as error:
        if "corresponds to no data" in str(error):  # a header, and nothing below it
            raise ValueError(f"--{split}_file {file} holds no rows") from error
        reason = first_line(list(causes(error))[-1])
        if reader != "parquet" and (line := _first_line_not_utf8(file)):
            reason = f"line {line} is not UTF-8; convert the file (iconv -t utf-8)"
        raise ValueError(f"--{split}_file {file} cannot be read as {file.suffix[1:]}: {reason}") from error
    if not len(dataset):
        raise ValueError(f"--{split}_file {file} holds no rows")
    return dataset


def take_split(
    splits: Mapping[str, Dataset], split: str, columns: Iterable[str], max_samples: int | None = None
) -> Dataset:
    """The first `max_samples` rows (all by default) of a split that must have these columns.

    Raises:
        ValueError: No such split or column, with the names that were found.
    """
    if split not in splits:
        raise ValueError(f"there is no split {split!r} (found: {', '.join(splits)}); pass --{split}_file")
    dataset = splits[split]
    require_columns(dataset, split, columns)
    if max_samples is None or max_samples >= len(dataset):
        return dataset
    if max_samples < 1:
        raise ValueError(f"{max_samples} samples of {split} were asked for; expected 1 or more")
    logger.info("%s: the first %d of %d rows", split, max_samples, len(dataset))
    return dataset.select(range(max_samples))


def require_columns(dataset: Dataset, split: str, columns: Iterable[str]) -> None:
    """Raise ValueError where a column is missing; names the columns that are there."""
    for column in columns:
        if column not in dataset.column_names:
            near = nearest(column, dataset.column_names)
            raise ValueError(f"{split} has no column {column!r}; found: {', '.join(dataset.column_names)}{near}")


def check_texts(dataset: Dataset, split: str, columns: Iterable[str]) -> None:
    """Refuse columns that hold anything but text, a missing value for instance, before a tokenizer stumbles on it.

    Texts of white space alone are counted in a warning: they are read, and say nothing.

    Raises:
        ValueError: Another type, or missing values, with their number and the first row.
    """
    for column in columns:
        kind = dataset.features[column]
        dtype = getattr(kind, "dtype", type(kind).__name__)
        if not is_text(kind):
            raise ValueError(f"column {column!r} of {split} holds {dtype}; expected text")
        texts = dataset[column][:]
        missing = [row for row, text in enumerate(texts, start=1) if text is None]
        if missing:
            raise ValueError(
                f"column {column!r} of {split} has no value in {len(missing)} of {len(dataset)} rows "
                f"(first: row {missing[0]}); remove or complete them"
            )
        blank = [row for row, text in enumerate(texts, start=1) if not text.strip()]
        if blank:
            logger.warning(
                "column %r of %s is an empty text in %d of %d rows (first: row %d)",
                column, split, len(blank), len(dataset), blank[0],
            )  # fmt: skip


def is_text(feature: Any) -> bool:
    """Whether a feature of a dataset is a column of strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def starts_with_byte_order_mark(file: Path) -> bool:
    """Whether the first bytes of a file only say that it is UTF-8, as Windows programs write them."""
    with file.open("rb") as opened:
        return opened.read(3) == codecs.BOM_UTF8


def _first_line_not_utf8(file: Path) -> int | None:
    with file.open("rb") as lines:
        return next(_numbers_not_utf8(lines), None)


def _numbers_not_utf8(lines: Iterable[bytes]) -> Iterator[int]:
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            yield number

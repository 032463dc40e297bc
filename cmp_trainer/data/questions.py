"""Questions with answers to extract, read from the Hub or from files into one form.

`cmp-trainer curve` and the example scripts read questions here, so both see the same answers. The result is a
`datasets.Dataset` with SQuAD's columns: `id`, `question`, `context` and `answers`, which holds `text` and
`answer_start`, both empty for an unanswerable question.

| source | form |
| --- | --- |
| .json | SQuAD's nested form ({"data": [{"paragraphs": [{"context", "qas"}]}]}), a list of rows, or {"data": rows} |
| .jsonl | one row a line |
| .csv, .tsv | a column for each; a cell of `answers` is JSON text or a Python literal |
| .parquet, a dataset on the Hub | a column for each |

`answers` is {"text": [...], "answer_start": [...]} or [{"text": ..., "answer_start": ...}, ...]. A question is
unanswerable if it has no answer with text, or if `is_impossible` is true, whatever else the row says.
"""

import ast
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf  # List from datasets 4 on

from cmp_trainer.data.tables import load_file, require_columns

logger = logging.getLogger(__name__)

TEXTS = ("id", "question", "context")
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": {"text": ListOf(Value("string")), "answer_start": ListOf(Value("int64"))},
    }
)


def read_questions(path: str | Path, need_answers: bool = True, split: str = "data") -> Dataset:
    """The questions of one file.

    Args:
        path: a .json, .jsonl, .csv, .tsv or .parquet file.
        need_answers: False accepts questions without `answers`, to predict for; their answers are then empty.
        split: what messages call the file's argument, `--<split>_file`.

    Raises:
        ValueError: the file is missing or of another form, or a question lacks a text, has answers of another form or
            the id of another question. The message names the file, the row and what was expected.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return to_questions(load_file(path, split), str(path), need_answers)
    rows = list(_rows_of(path))
    if not rows:
        raise ValueError(f"{path} holds no questions")
    if not any("id" in row for _, row in rows):
        rows = [(where, {**row, "id": number}) for number, (where, row) in enumerate(rows, start=1)]
        _say_numbered(str(path))
    questions = [_question(row, f"{path}, {where}", need_answers) for where, row in rows]
    dataset = Dataset.from_list(questions, features=FEATURES)
    _check_ids(dataset, str(path))
    return dataset


def to_questions(rows: Dataset, name: str, need_answers: bool = True) -> Dataset:
    """The questions of a dataset that has a column for each, such as one from the Hub.

    Args:
        rows: the dataset; other columns are dropped, and questions without a column of ids are numbered from 1.
        name: what messages call it.
        need_answers: as in `read_questions`.

    Raises:
        ValueError: a column is missing; otherwise as `read_questions`.
    """
    has_ids = "id" in rows.column_names
    answers = ["answers"] if need_answers and "is_impossible" not in rows.column_names else []
    require_columns(rows, name, ["question", "context", *answers])
    if not has_ids:
        _say_numbered(name)
    questions = rows.map(
        _question_of_row,
        with_indices=True,
        fn_kwargs={"name": name, "need_answers": need_answers, "has_ids": has_ids},
        remove_columns=rows.column_names,
        features=FEATURES,
        desc="Questions",
    )
    _check_ids(questions, name)
    return questions


def _question_of_row(
    row: Mapping[str, Any], index: int, name: str, need_answers: bool, has_ids: bool
) -> dict[str, Any]:
    number = index + 1
    return _question(row if has_ids else {**row, "id": number}, f"{name}, row {number}", need_answers)


def _question(row: Mapping[str, Any], where: str, need_answers: bool) -> dict[str, Any]:
    """A row in the one form."""
    texts = {key: row.get(key) for key in TEXTS}
    if isinstance(texts["id"], int):
        texts["id"] = str(texts["id"])
    wrong = [key for key, text in texts.items() if not isinstance(text, str)]
    if wrong:
        raise ValueError(
            f"{where} has no text as {' and '.join(wrong)}; it has {', '.join(sorted(row))}. Every question needs "
            f"{', '.join(TEXTS)} and answers"
        )
    where = f"{where} (id {texts['id']})"
    if str(row.get("is_impossible")).lower() in ("true", "1"):
        return {**texts, "answers": {"text": [], "answer_start": []}}
    return {**texts, "answers": _answers(_value(row.get("answers")), where, need_answers)}


def _value(cell: Any) -> Any:
    """A cell of a csv as the JSON or the Python literal that it holds; anything else as it is."""
    if not isinstance(cell, str):
        return cell
    if not cell.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell)
        except (ValueError, SyntaxError):
            pass
    return cell


def _answers(found: Any, where: str, need_answers: bool) -> dict[str, list]:
    if found is None and not need_answers:
        found = []
    if isinstance(found, list) and all(isinstance(a, Mapping) and {"text", "answer_start"} <= set(a) for a in found):
        found = {key: [answer[key] for answer in found] for key in ("text", "answer_start")}
    if isinstance(found, Mapping) and {"text", "answer_start"} <= set(found):
        texts, starts = found["text"], found["answer_start"]
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts) and isinstance(starts, list):
            if not any(text.strip() for text in texts):
                return {"text": [], "answer_start": []}
            if len(texts) == len(starts) and all(isinstance(start, int) for start in starts):
                kept = [(text, start) for text, start in zip(texts, starts, strict=True) if text.strip()]
                return {"text": [text for text, _ in kept], "answer_start": [start for _, start in kept]}
    raise ValueError(
        f'{where}: its answers are {found!r}; expected {{"text": [...], "answer_start": [...]}} with texts and whole '
        'numbers in lists of equal length, or [{"text": ..., "answer_start": ...}, ...]. If there is no answer, give '
        "empty lists or is_impossible true"
    )


def _rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON file, each with where in the file it is."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Convert it (iconv -t utf-8)") from error
    if path.suffix == ".jsonl":
        # not splitlines(): it would also break rows at U+2028 and its like, which JSON leaves unescaped
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        data = [(where, _parsed(line, f"{path}, {where}")) for where, line in lines]
    else:
        found = _parsed(text, str(path))
        found = found["data"] if isinstance(found, dict) and "data" in found else found
        data = [(f"row {number}", row) for number, row in enumerate(found, start=1)] if isinstance(found, list) else []
        if not isinstance(found, list):
            raise ValueError(_other_form(path))
    if not all(isinstance(row, dict) for _, row in data):
        raise ValueError(_other_form(path))
    for where, row in data:
        if "paragraphs" in row:
            yield from _nested_questions(row, f"{where} ({row.get('title', 'untitled')})", path)
        else:
            yield where, row


def _nested_questions(article: dict[str, Any], where: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, paragraph in enumerate(article["paragraphs"] or [], start=1):
        place = f"{where}, paragraph {number}"
        questions = paragraph.get("qas") if isinstance(paragraph, dict) and "context" in paragraph else None
        if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
            found = ", ".join(sorted(paragraph)) if isinstance(paragraph, dict) else repr(paragraph)
            raise ValueError(f"{path}, {place} has {found}; expected context and qas, a list of questions")
        for count, question in enumerate(questions, start=1):
            yield f"{place}, question {count}", {**question, "context": paragraph["context"]}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}. A file with one row a line must be named .jsonl") from error


def _other_form(path: Path) -> str:
    return (
        f"{path} is in none of the forms that are read: SQuAD's nested form, a list of rows, "
        '{"data": rows}, or one row a line in a file named .jsonl'
    )


def _say_numbered(name: str) -> None:
    logger.warning("%s has no ids; its questions are numbered from 1", name)


def _check_ids(questions: Dataset, name: str) -> None:
    """Predictions are kept by id, so that of a repeated one would be overwritten."""
    repeated = [key for key, count in Counter(questions["id"][:]).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{name}: {len(repeated)} ids stand for more than one question, e.g. {', '.join(repeated[:3])}. "
            "Answers are kept by id; give every question its own"
        )

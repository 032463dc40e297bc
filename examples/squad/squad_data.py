"""SQuAD questions from the Hub or from files, in one form.

Whatever the source, what comes out is a `datasets.Dataset` with the Hub's columns: `id`, `question`, `context` and
`answers` ({"text": [...], "answer_start": [...]}, both empty for an unanswerable question). Three forms of file are
read: SQuAD's own nested form ({"data": [{"paragraphs": [{"context", "qas"}]}]}), flat JSON (a list of rows, or
{"data": rows}) and JSON lines (one row a line).
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

REQUIRED = ("id", "question", "context")
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)


def read_squad_file(path: str | Path, need_answers: bool = True) -> Dataset:
    """Reads the questions of one file (.json or .jsonl; nested or flat).

    Args:
        path: the file.
        need_answers: False lets a file to predict for go without answers; they are then empty.

    Raises:
        ValueError: there is no such file, a row lacks a column, answers have neither of the two known forms, or an id
            repeats. The message names the file, the row and what was expected.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist.")
    rows = [
        _to_row(row, f"{path}, row {number}", need_answers) for number, row in enumerate(_rows_of(Path(path)), start=1)
    ]
    if not rows:
        raise ValueError(f"{path} holds no question.")
    dataset = Dataset.from_list(rows, features=FEATURES)
    check_ids(dataset, str(path))
    return dataset


def check_columns(dataset: Dataset, name: str) -> None:
    """Raises ValueError where a dataset (of the Hub) lacks a column of SQuAD."""
    missing = [column for column in FEATURES if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing}: it has {dataset.column_names}, expected are {list(FEATURES)}. "
            "Rename its columns, or give files with --train_file and --validation_file."
        )


def check_ids(dataset: Dataset, name: str) -> None:
    """Raises ValueError where an id repeats: predictions are kept by id, one would overwrite the other."""
    repeated = [key for key, count in Counter(dataset["id"][:]).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{name}: {len(repeated)} ids stand for more than one question, e.g. {repeated[:3]}. "
            "Predictions are kept by id; give every question an id of its own."
        )


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The flat rows of a file, whatever its form."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    if path.suffix == ".jsonl":
        # not splitlines(): it would also break rows at U+2028 and its like, which JSON leaves unescaped
        data = [_parse(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    else:
        data = _parse(text, str(path))
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError(
            f"{path} is in none of the known forms. Expected: SQuAD's nested form, a list of rows, "
            '{"data": rows}, or (in a .jsonl file) one row a line.'
        )
    for row in data:
        if "paragraphs" in row:
            yield from _nested_rows(row, path)
        else:
            yield row


def _nested_rows(article: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    for paragraph in article["paragraphs"]:
        if not isinstance(paragraph.get("qas"), list) or "context" not in paragraph:
            raise ValueError(
                f"{path}: a paragraph of article {article.get('title', '(untitled)')!r} has the keys "
                f'{sorted(paragraph)}; expected are "context" and "qas", a list of questions.'
            )
        for question in paragraph["qas"]:
            yield {**question, "context": paragraph["context"]}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}. A file with one row a line must be named .jsonl.") from error


def _to_row(row: dict[str, Any], where: str, need_answers: bool) -> dict[str, Any]:
    missing = [key for key in REQUIRED if not isinstance(row.get(key), str)]
    if need_answers and "answers" not in row:
        missing.append("answers")
    if missing:
        raise ValueError(f"{where} lacks {missing} (or they are no text): it has {sorted(row)}.")
    return {**{key: row[key] for key in REQUIRED}, "answers": _to_answers(row.get("answers", []), where)}


def _to_answers(answers: Any, where: str) -> dict[str, list]:
    """Both known forms, {"text": [...], "answer_start": [...]} and [{"text", "answer_start"}, ...], as the first."""
    found = answers
    if isinstance(found, list) and all(isinstance(a, dict) and {"text", "answer_start"} <= a.keys() for a in found):
        found = {key: [answer[key] for answer in found] for key in ("text", "answer_start")}
    if isinstance(found, dict) and {"text", "answer_start"} <= found.keys():
        texts, starts = found["text"], found["answer_start"]
        if (
            isinstance(texts, list)
            and isinstance(starts, list)
            and len(texts) == len(starts)
            and all(isinstance(text, str) for text in texts)
            and all(isinstance(start, int) for start in starts)
        ):
            return {"text": texts, "answer_start": starts}
    raise ValueError(
        f"{where}: answers are {answers!r}. Expected {{'text': [...], 'answer_start': [...]}} with texts and whole "
        "numbers in lists of one length, or [{'text': ..., 'answer_start': ...}, ...]."
    )

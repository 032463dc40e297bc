"""Texts with labels: what a label means, which output of the model stands for it, and what is measured.

| labels | column | outputs | metrics |
| --- | --- | --- | --- |
| single: one class of several | class names or numbers | one a class | accuracy, Matthews, F1 |
| multi: any number of classes | lists of them, or rows of 0 and 1 | one a class | F1 (micro, macro), exact match |
| scores: a number | numbers | one | Pearson and Spearman correlation |

Classes are matched by name. A data set may list them in another order than the model does, or than another data set;
the order of the outputs is that of the model's `id2label`, and every label is translated to it. Only where one
side has no names is a class known by its number.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction

from cmp_trainer.data.tables import check_texts, is_text, require_columns

logger = logging.getLogger(__name__)

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "scores": "regression",
}


@dataclass
class TextArguments:
    """How texts become inputs, and what becomes of a head that the model already has."""

    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens"})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to max_seq_length, not to the batch's longest"}
    )
    new_head: bool = field(default=False, metadata={"help": "Start with a new head where the model has one"})


@dataclass(frozen=True)
class Labels:
    """What labels are, and which output of the model is which class.

    Attributes:
        kind: single, multi or scores.
        names: the classes, in the order of the model's outputs; none for scores.
        bounds: the lowest and the highest score; None: any.
        separator: what stands between the classes of one cell of a csv.
        indicators: whether a list of multi is a row of 0 and 1, one a class, and not a list of classes.
    """

    kind: str
    names: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None
    separator: str | None = None
    indicators: bool = False

    @property
    def num_outputs(self) -> int:
        """How many numbers the model gives for a text."""
        return len(self.names) or 1

    def encode(self, dataset: Dataset, split: str, column: str = "label") -> list[Any]:
        """A class number, a row of 0.0 and 1.0 (one a class) or a score for each row.

        Raises:
            ValueError: Labels that are none; with their number, the first ones and the first row.
        """
        read: dict[str, Callable[[Any], Any]] = {"single": self._number, "multi": self._indicators, "scores": _score}
        values = _cells(dataset, column, self.separator)
        encoded = [read[self.kind](value) for value in values]
        if self.bounds is not None:
            low, high = self.bounds
            encoded = [None if one is None or not low <= one <= high else one for one in encoded]
        wrong = [row for row, one in enumerate(encoded) if one is None]
        if wrong:
            shown = ", ".join(dict.fromkeys(repr(values[row]) for row in wrong[:20]))
            raise ValueError(
                f"{len(wrong)} of {len(values)} labels of {split} are not {self._expected()}: {_shortened(shown)} "
                f"(first: row {wrong[0] + 1})"
            )
        return encoded

    def decide(self, logits: Any) -> np.ndarray:
        """(rows, outputs) logits to (rows,) class numbers, (rows, classes) bools or (rows,) scores."""
        scores = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        if self.kind == "single":
            return scores.argmax(axis=-1)
        return scores > 0 if self.kind == "multi" else scores[:, 0]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`compute_metrics` of a Trainer. F1 of two classes is of the second one, of more the mean over classes."""
        decided, right = self.decide(prediction.predictions), np.asarray(prediction.label_ids)
        return {name: METRICS[name](decided, right) for name in self.metric_names}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What `metrics` returns."""
        if self.kind == "single":
            return "accuracy", "matthews_correlation", "f1" if len(self.names) == 2 else "f1_macro"
        return ("f1_micro", "f1_macro", "exact_match") if self.kind == "multi" else ("pearson", "spearman")

    def _number(self, value: Any) -> int | None:
        """By name; by number where the names are no numbers themselves."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, list) or value is None:
            return None
        number = _place(str(value), self.names)
        if number is None and not any(name.isdigit() for name in self.names) and str(value).isdigit():
            number = int(value) if int(value) < len(self.names) else None
        return number

    def _indicators(self, value: Any) -> list[float] | None:
        if not isinstance(value, list):
            return None
        if self.indicators:
            return [float(one) for one in value] if _are_indicators([value], len(self.names)) else None
        numbers = [self._number(one) for one in value]
        return None if None in numbers else [float(number in numbers) for number in range(len(self.names))]

    def _expected(self) -> str:
        if self.kind == "scores":
            return f"scores from {self.bounds[0]:g} to {self.bounds[1]:g}" if self.bounds else "scores (numbers)"
        classes = _shortened(" or ".join(f"{number} ({name})" for number, name in enumerate(self.names)))
        if self.indicators:
            return f"rows of {len(self.names)} times 0 or 1"
        return classes if self.kind == "single" else f"lists of {classes}"


def find_labels(
    dataset: Dataset | None,
    config: Any,
    *,
    split: str = "train",
    column: str = "label",
    kind: str | None = None,
    separator: str | None = None,
    new_head: bool = False,
    trained: bool = True,
) -> Labels:
    """What the labels of a data set are, and which output of the model, or of its new head, is which class.

    Args:
        dataset: labelled rows; None where there are none, and the model's own classes are taken.
        config: the model's.
        kind: single, multi or scores, where it is known; otherwise the model's head decides, then the column's type.
        new_head: ignore the head that the model has.
        trained: whether it is the training data, which then has every class.

    Raises:
        ValueError: The labels are not of that kind, or not the classes that the model's head has.
    """
    has_head = is_classifier(config) and not new_head
    if dataset is not None:
        require_columns(dataset, split, [column])
    elif not has_head:
        raise ValueError("the model has no head for classification, and without labels there is none to train")
    head_kind = _kind_of_head(config) if has_head else None
    found_kind = None if dataset is None else _kind_of_column(dataset, column, separator)
    kind = kind or _agreed(head_kind, found_kind, dataset, column, split)
    if has_head and (head_kind == "scores") != (kind == "scores"):
        raise ValueError(_other_head(config, "scores" if kind == "scores" else "classes"))
    if kind == "scores":
        return Labels(kind)
    found = _classes(dataset, column, split, separator) if dataset is not None else None
    if dataset is not None and not has_head and len(found or ()) < 2 and kind == "single":
        raise ValueError(f"all labels of {split} are {', '.join(found or ())}; expected two classes or more")
    indicators = kind == "multi" and dataset is not None and _are_indicators(_cells(dataset, column, separator))
    if not has_head:
        return Labels(kind, tuple(found or ()), separator=separator, indicators=indicators)
    complete = trained or (dataset is not None and isinstance(_inner(dataset.features[column]), ClassLabel))
    names = outputs_of(found, config, complete) if found is not None else None
    if names is None and found is not None and trained:
        raise ValueError(_other_head(config, f"the classes {_shortened(', '.join(found))}"))
    return Labels(kind, names or _names_of_head(config), separator=separator, indicators=indicators)


def labels_of_classes(classes: Sequence[str], config: Any, new_head: bool = False) -> Labels:
    """The same for known classes, one a row; scores where there are no classes.

    Raises:
        ValueError: The model has a head for something else.
    """
    has_head = is_classifier(config) and not new_head
    if has_head and (config.num_labels == 1) != (not classes):
        raise ValueError(_other_head(config, "scores" if not classes else f"the classes {', '.join(classes)}"))
    names = outputs_of(classes, config) if classes and has_head else tuple(classes)
    if names is None:
        raise ValueError(_other_head(config, f"the classes {', '.join(classes)}"))
    return Labels("single" if classes else "scores", names)


def outputs_of(found: Sequence[str], config: Any, complete: bool = True) -> tuple[str, ...] | None:
    """The names of a head's outputs, in their order and the data's spelling; None where they are not the data's.

    Args:
        found: the data's classes in the data's order.
        complete: whether these are all, so that a head without names can be taken to have them in this order.
    """
    head = _names_of_head(config)
    places = [_place(name, head) for name in found]
    if None not in places:
        spelling = dict(zip(places, found, strict=True))
        return tuple(spelling.get(number, name) for number, name in enumerate(head))
    if (
        all(name.isdigit() for name in found)
        and not any(name.isdigit() for name in head)
        and max(map(int, found)) < len(head)
    ):
        return head
    if all(re.fullmatch(r"LABEL_\d+", name) for name in head) and complete and len(found) == len(head):
        logger.warning(
            "the model does not name its classes; taken to be, in this order: %s", _shortened(", ".join(found))
        )
        return tuple(found)
    return None


def load_classifier(load: Callable[..., Any], config: Any, labels: Labels, new_head: bool = False) -> Any:
    """A model whose head has the labels' outputs; none of an old head's settings stays.

    Args:
        load: scripting.load_pretrained with the model's name; called as `load(AutoModelForSequenceClassification, …)`.
        config: of the model that it loads.
        new_head: start with a new head also where the old one has as many outputs.
    """
    names = dict(enumerate(labels.names or ("score",)))
    settings = {
        "num_labels": labels.num_outputs,
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        "problem_type": PROBLEM_TYPES[labels.kind],
    }
    if not (new_head and is_classifier(config)):
        return load(AutoModelForSequenceClassification, **settings)
    old = load(AutoModelForSequenceClassification)
    config = old.config.__class__.from_dict({**old.config.to_dict(), **settings})
    model = type(old)(config).to(old.dtype)
    model.base_model.load_state_dict(old.base_model.state_dict())
    return model


def is_classifier(config: Any) -> bool:
    """Whether a model was saved with a head for sequence classification."""
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def is_labelled(dataset: Dataset, column: str = "label") -> bool:
    """Whether any row has a label. Test sets without labels lack the column, or say -1 or nothing in every row."""
    return column in dataset.column_names and any(label not in (None, -1) for label in dataset[column][:])


def text_columns(dataset: Dataset, split: str, asked: Sequence[str] | None, label_column: str) -> list[str]:
    """The one or two columns of text to classify: those asked for, or all but the label's.

    Raises:
        ValueError: A column that is not there, or none, or more than two.
    """
    columns = list(
        asked or [name for name, kind in dataset.features.items() if is_text(kind) and name != label_column]
    )
    require_columns(dataset, split, columns)
    if not 1 <= len(columns) <= 2:
        raise ValueError(
            f"one or two text columns are classified, but {split} has {len(columns)} "
            f"({', '.join(columns) or 'none'}); name them. All columns: {', '.join(dataset.column_names)}"
        )
    return columns


def encode_texts(
    dataset: Dataset,
    split: str,
    columns: Sequence[str],
    tokenizer: Any,
    max_length: int,
    labels: Labels | None = None,
    label_column: str = "label",
    pad_to_max_length: bool = False,
) -> Dataset:
    """The model's inputs, with `labels` where the rows have some; the log counts texts that are empty or cut.

    Raises:
        ValueError: A column of another type, a missing text, or a label that is none; names the row.
    """
    check_texts(dataset, split, columns)
    numbers = labels.encode(dataset, split, label_column) if labels else None

    def encode(batch: dict[str, list[str]]) -> Any:
        return tokenizer(
            *(batch[column] for column in columns),
            truncation=True,
            max_length=max_length,
            padding="max_length" if pad_to_max_length else False,
        )

    encoded = dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="tokenizing")
    full = sum(sum(mask) == max_length for mask in encoded["attention_mask"])
    if full:
        logger.info("%d of %d inputs reach %d tokens and are cut there", full, len(dataset), max_length)
    return encoded if numbers is None else encoded.add_column("labels", numbers)  # pyright: ignore[reportCallIssue]


def collator_of(tokenizer: Any, args: Any = None) -> DataCollatorWithPadding:
    """Pads to the batch's longest; to a multiple of 8 in 16 bits, for tensor cores."""
    half = args is not None and (args.fp16 or args.bf16)
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if half else None)


def _f1(decided: np.ndarray, right: np.ndarray, average: str = "binary") -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(right, decided, average=average))


def _from_sklearn(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def compute(decided: np.ndarray, right: np.ndarray) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(right, decided))

    return compute


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def compute(decided: np.ndarray, right: np.ndarray) -> float:
        from scipy import stats

        return float(getattr(stats, name)(decided, right)[0])

    return compute


# (decided, right) -> a number. scikit-learn and scipy belong to extras: imported when a metric is computed.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _from_sklearn("accuracy_score"),
    "matthews_correlation": _from_sklearn("matthews_corrcoef"),
    "f1": _f1,
    "f1_micro": lambda decided, right: _f1(decided, right, "micro"),
    "f1_macro": lambda decided, right: _f1(decided, right, "macro"),
    "exact_match": _from_sklearn("accuracy_score"),
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def _kind_of_head(config: Any) -> str:
    if config.num_labels == 1:
        return "scores"
    return "multi" if config.problem_type == PROBLEM_TYPES["multi"] else "single"


def _kind_of_column(dataset: Dataset, column: str, separator: str | None) -> str:
    feature = dataset.features[column]
    if separator is not None or _inner(feature) is not feature:
        return "multi"
    return "scores" if "float" in str(getattr(feature, "dtype", "")) else "single"


def _agreed(head: str | None, found: str | None, dataset: Dataset | None, column: str, split: str) -> str:
    """The kind of a head and of a column together: of a number the head says whether it is a class or a score."""
    if head is None or found is None or head == found:
        return head or found or "single"
    assert dataset is not None
    if "multi" not in (head, found):
        if head == "scores" and not is_text(dataset.features[column]):
            return head
        if head == "single" and all(one is None or float(one).is_integer() for one in dataset[column][:]):
            return head
    wanted = {"single": "one class a row", "multi": "lists of classes", "scores": "a score a row"}
    raise ValueError(
        f"the labels of {split} are {wanted[found]}, but the model was made for {wanted[head]}; to train a new head "
        "pass --new_head true"
    )


def _cells(dataset: Dataset, column: str, separator: str | None) -> list[Any]:
    """The column with class names in place of the numbers of a ClassLabel, and cells split at the separator."""
    inner = _inner(dataset.features[column])
    values = dataset[column][:]
    if separator is not None:
        return [None if one is None else [name.strip() for name in str(one).split(separator)] for one in values]
    if not isinstance(inner, ClassLabel):
        return values

    def name(value: int | None) -> str | int | None:
        return inner.names[value] if value is not None and 0 <= value < len(inner.names) else value

    return [[name(one) for one in value] if isinstance(value, list) else name(value) for value in values]


def _classes(dataset: Dataset, column: str, split: str, separator: str | None) -> list[str]:
    """The names of the classes: in the order of the features, or of numbers, or of the alphabet.

    Raises:
        ValueError: A label is missing, or no class.
    """
    inner = _inner(dataset.features[column])
    if isinstance(inner, ClassLabel):
        return list(inner.names)
    cells = _cells(dataset, column, separator)
    missing = [row for row, cell in enumerate(cells, start=1) if cell is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(cells)} labels of {split} are missing (first: row {missing[0]}); remove such rows"
        )
    if _are_indicators(cells):
        return [str(number) for number in range(len(cells[0]))]
    values = {one for cell in cells for one in (cell if isinstance(cell, list) else [cell])}
    fractions = [one for one in values if isinstance(one, float) and not one.is_integer()]
    if fractions:
        raise ValueError(f"labels of {split} are no classes: {fractions[0]!r}; are they scores?")
    plain = {int(one) if isinstance(one, float) else one for one in values}
    return [str(one) for one in sorted(plain, key=lambda one: (isinstance(one, str), one))]


def _inner(feature: Any) -> Any:
    """The feature of a list's items; the feature itself where it is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def _are_indicators(cells: Sequence[Any], length: int | None = None) -> bool:
    """Whether all cells are lists of 0 and 1, of one length and at least two; otherwise they are lists of classes."""
    lists = [cell for cell in cells if isinstance(cell, list)]
    length = len(lists[0]) if lists and length is None else length or 0
    return (
        len(lists) == len(cells)
        and length > 1
        and all(
            len(cell) == length and all(one in (0, 1) and not isinstance(one, str) for one in cell) for cell in lists
        )
    )


def _score(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
        return None
    return float(value)


def _names_of_head(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def _place(name: str, names: Sequence[str]) -> int | None:
    """The number of the class of that name; of one that differs in case, hyphens and spaces alone, if there is one."""
    if name in names:
        return list(names).index(name)
    alike = [number for number, other in enumerate(names) if _normal(other) == _normal(name)]
    return alike[0] if len(alike) == 1 else None


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _other_head(config: Any, wanted: str) -> str:
    has = "scores" if config.num_labels == 1 else f"the classes {_shortened(', '.join(_names_of_head(config)))}"
    return f"the model has a head for {has}, not for {wanted}; to train a new head pass --new_head true"


def _shortened(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"

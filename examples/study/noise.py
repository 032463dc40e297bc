"""Noise in test texts: words that are missing and letters in the wrong order. The same for every model."""

import random
from collections.abc import Callable

from datasets import Dataset

DROPPED, MISTYPED = 0.15, 0.15  # share of the words


def without_words(text: str, draw: random.Random) -> str:
    """Without about 15 % of its words; unchanged if no word would remain.

    >>> without_words("one two three four five six seven eight", random.Random(1))
    'two three four five six seven eight'
    """
    words = text.split()
    return " ".join(word for word in words if draw.random() >= DROPPED) or text


def with_typos(text: str, draw: random.Random) -> str:
    """With two neighbouring letters exchanged in about 15 % of its words.

    >>> with_typos("a rather amusing little film", random.Random(7))
    'a rather amusing litlte film'
    """
    return " ".join(_mistyped(word, draw) if draw.random() < MISTYPED else word for word in text.split())


def _mistyped(word: str, draw: random.Random) -> str:
    if len(word) < 3:
        return word
    place = draw.randrange(len(word) - 1)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _disturbed(change: Callable[[str, random.Random], str]) -> Callable[[Dataset], Dataset]:
    def disturb(dataset: Dataset) -> Dataset:
        draw = random.Random(0)
        texts = [name for name in dataset.column_names if name != "label"]
        return Dataset.from_list(
            [{**row, **{name: change(row[name], draw) for name in texts}} for row in dataset.to_list()]
        )

    return disturb


NOISES = {"dropped-words": _disturbed(without_words), "typos": _disturbed(with_typos)}

"""How the elements of a reduction may belong to the rows of a batch, likeliest first.

Which layout is the right one is not guessed: planning.py tries them, and the sign test chooses. Sizes come from the
batch at hand each time, so a layout found on one batch holds for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmp_trainer.losses.reductions import Reduction

IGNORED = -100
LABEL_WORDS = ("label", "target", "start_positions", "end_positions", "future_values")


class Layout(NamedTuple):
    """One way in which elements belong to rows.

    `dim`: a dimension of the elements is the batch. `inner`: flattened, `index` elements before the rows change (1:
    rows come first; 0: rows come last). `labels`: the labels that are not ignored, in the batch's order; `index` says
    by which mask. `counts`: lists of boxes and the like, by their lengths. `declared`: the caller said so.
    """

    kind: str
    index: int = 0


class Misfit(ValueError):
    """The elements cannot be laid out in this way."""


def num_rows(batch: Any) -> int | None:
    """How many rows a batch has: the size that most of its tensors begin with; of the first among equals."""
    sizes = Counter(len(value) for _, value in entries(batch) if isinstance(value, Tensor) and value.ndim)
    if sizes:
        return max(sizes, key=sizes.__getitem__)
    return next((len(value) for _, value in entries(batch) if isinstance(value, (list, tuple))), None)


def entries(batch: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a batch, nested ones too; a sequence's are its numbers."""
    if isinstance(batch, Tensor):
        yield "", batch
    elif isinstance(batch, Mapping):
        for name, value in batch.items():
            yield from ((f"{name}.{inner}" if inner else str(name), leaf) for inner, leaf in _leaves(value))
    elif isinstance(batch, (list, tuple)):
        for number, value in enumerate(batch):
            yield from ((f"{number}.{inner}" if inner else str(number), leaf) for inner, leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)):
        yield from entries(value)
    else:
        yield "", value


def is_label(name: str) -> bool:
    """Whether a column of this name holds what is to be predicted."""
    return any(word in name for word in LABEL_WORDS)


def layouts(reduction: Reduction, rows: int, batch: Any) -> list[Layout]:
    """The layouts to try for a reduction of a batch of so many rows."""
    elements = reduction.elements
    if reduction.declared:
        return [Layout("declared")]
    if reduction.target is not None:
        masks = [
            Layout("labels", index)
            for index, (keep, labels) in enumerate(_masks(batch))
            if elements.numel() not in (keep.numel(), 0)
            and reduction.target.numel() == elements.numel() == int(keep.sum())
            and torch.equal(reduction.target.flatten().float(), labels[keep].float())
        ]
        if masks:
            return masks
    counts = _counts(batch)
    if counts and elements.shape[0] == sum(counts) != rows:
        return [Layout("counts")]
    if rows == 0 or elements.numel() % rows:
        return []
    dims = [dim for dim in reduction.dims if elements.shape[dim] == rows]
    if dims:
        return [Layout("dim", dim) for dim in dims]
    if len(reduction.dims) < elements.ndim:
        return [Layout("inner", 1)] if elements.shape[0] % rows == 0 else []
    per_row = elements.numel() // rows
    fixed = [Layout("inner", inner) for inner in range(2, per_row) if per_row % inner == 0]
    return [Layout("inner", 1), *([Layout("inner", 0)] if per_row > 1 else []), *fixed]


def sum_by_rows(values: Tensor, layout: Layout, rows: int, batch: Any) -> Tensor:
    """Sums of the values that belong to each row: `(rows,)`.

    Raises:
        Misfit: the values do not have the sizes of this layout.
    """
    if layout.kind == "declared" or (layout.kind == "dim" and layout.index == 0):
        if values.shape[0] != rows:
            raise Misfit(f"{tuple(values.shape)} for {rows} rows")
        return values.reshape(rows, -1).sum(1)
    if layout.kind == "dim":
        if values.ndim <= layout.index or values.shape[layout.index] != rows:
            raise Misfit(f"{tuple(values.shape)} for {rows} rows")
        return values.movedim(layout.index, 0).reshape(rows, -1).sum(1)
    if layout.kind == "inner":
        per_row = values.numel() // rows
        inner = layout.index or per_row
        if values.numel() % rows or per_row % inner:
            raise Misfit(f"{tuple(values.shape)} for {rows} rows")
        return values.reshape(inner if layout.index != 1 else 1, rows, -1).sum((0, 2))
    if layout.kind == "labels":
        found = list(_masks(batch))
        owners = found[layout.index][0].nonzero()[:, 0] if layout.index < len(found) else values.new_zeros(0)
    else:
        counts = torch.tensor(_counts(batch) or [], device=values.device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=values.device), counts)
        values = values.reshape(values.shape[0], -1).sum(1)
    if len(owners) != values.numel():
        raise Misfit(f"{values.numel()} values for {len(owners)} labels")
    return values.new_zeros(rows).index_add(0, owners, values.flatten())


def _masks(batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks of the tokens that may have been picked, with the labels in the same places."""
    named = dict(entries(batch))
    labels = named.get("labels")
    if not isinstance(labels, Tensor) or not labels.ndim or labels.is_floating_point():
        return
    yield labels != IGNORED, labels
    if labels.ndim > 1:
        moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        yield moved != IGNORED, moved
    for name, value in named.items():
        fits = isinstance(value, Tensor) and value.shape == labels.shape and not value.is_floating_point()
        if fits and not is_label(name):
            yield value == 1, labels


def _counts(batch: Any) -> Sequence[int] | None:
    """How many boxes (or the like) each row's labels hold, where labels are a list of dictionaries."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(labels, (list, tuple)) and labels and all(isinstance(one, Mapping) for one in labels):
        return [len(next(iter(one.values()))) for one in labels]
    return None

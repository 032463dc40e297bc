"""Runs of a loss that leave no trace on the object whose method computes it.

A trainer's loss may collect metrics, count tokens or log. It is run once for each variant, and only the full variant's
run is to be seen. So the others run inside of `no_traces`, which puts numbers, tensors and plain containers among the
object's attributes back to what they were, in place. Other objects (the model, data sets, the optimizer) are left
alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_PLAIN = (int, float, complex, str, bytes, bool, type(None), tuple)


@contextmanager
def no_traces(traced: Any, silent: tuple[str, ...] = ("log",)) -> Iterator[None]:
    """The plain attributes of an object are after the body what they were before.

    Args:
        traced: an object with a `__dict__`.
        silent: names of methods that do nothing in the body.
    """
    attributes = vars(traced)
    before = {name: (value, _copied(value)) for name, value in attributes.items() if _is_traced(value)}
    silenced = {name: attributes.get(name) for name in silent}
    attributes.update(dict.fromkeys(silent, _nothing))
    try:
        yield
    finally:
        for name, method in silenced.items():
            if method is None:
                attributes.pop(name, None)
            else:
                attributes[name] = method
        for name in [name for name, value in attributes.items() if name not in before and _is_traced(value)]:
            del attributes[name]
        for name, (value, copied) in before.items():
            attributes[name] = _put_back(value, copied)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _is_traced(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, dict, list, set, deque, Tensor))


def _copied(value: Any) -> Any:
    """A copy of what can change in place; whatever is not plain is kept as it is."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}, dict(value)
    if isinstance(value, (list, deque)):
        return [_copied(one) for one in value], list(value)
    if isinstance(value, set):
        return set(value)
    if isinstance(value, Tensor) and not value.requires_grad:
        return value._version if not value.is_inference() else None, value.detach().clone()
    return value


def _put_back(value: Any, copied: Any) -> Any:
    """The very object, with its content as it was copied."""
    if isinstance(value, dict):
        inner, objects = copied
        value.clear()
        value.update({key: _put_back(objects[key], one) for key, one in inner.items()})
    elif isinstance(value, (list, deque)):
        inner, objects = copied
        value.clear()
        value.extend(_put_back(one, what) for one, what in zip(objects, inner, strict=True))
    elif isinstance(value, set):
        value.clear()
        value.update(copied)
    elif isinstance(value, Tensor) and not value.requires_grad:
        version, content = copied
        if version is None or value._version != version:
            value.copy_(content)
    return value

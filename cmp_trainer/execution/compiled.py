"""Compiled models: the layers stay compiled, the loss becomes visible.

A compiled graph that contains the loss hides the losses of the examples, and two outputs of one graph have no
derivative by each other. So where torch.compile wraps a model of transformers, a step runs the head and the loss as
they are and compiles what is below them, `model.base_model`, with the same settings: one graph, without a break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def head_uncompiled(model: nn.Module, parts: Sequence[nn.Module] = ()) -> Iterator[nn.Module]:
    """The model inside of torch.compile, with its base model compiled in the body; other models as they are.

    Args:
        parts: parts of the base model that are compiled one by one in its place, where their calls have to be seen.

    A compiled backward keeps its buffers meanwhile, since the shares of a loss are read before the loss's backward.
    """
    if not hasattr(model, "_orig_mod") and model._compiled_call_impl is None:
        yield model
        return
    inner, settings = getattr(model, "_orig_mod", None), getattr(model, "dynamo_ctx", None)
    base = _base_of(inner) if inner is not None and settings is not None else None
    with torch._functorch.config.patch(donated_buffer=False):  # pyright: ignore
        if base is None or inner is None or settings is None:
            yield model
            return
        inside = set(base.modules())
        compiled = {part: part._compiled_call_impl for part in parts if part in inside} or {
            base: base._compiled_call_impl
        }
        limit = torch._dynamo.config.recompile_limit * len(compiled)  # it counts the graphs of all parts together
        try:
            for part in compiled:
                part._compiled_call_impl = settings(part._call_impl)
            with torch._dynamo.config.patch(recompile_limit=limit):  # pyright: ignore
                yield inner
        finally:
            for part, before in compiled.items():
                part._compiled_call_impl = before


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def backends(model: nn.Module) -> set[str]:
    """The names of the backends that torch.compile runs the model or parts of it with, as far as they have one."""
    contexts = [getattr(module, "dynamo_ctx", None) for module in model.modules()]
    for module in model.modules():
        compiled = getattr(module, "_compiled_call_impl", None)
        cells = getattr(compiled, "__closure__", None) or ()
        contexts += [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "callback")]
    wrapped = [_innermost(context.callback) for context in contexts if context is not None]
    return {str(name) for name in (getattr(one, "compiler_name", None) for one in wrapped) if name is not None}


def _innermost(backend: Any) -> Any:
    """The backend inside of what dynamo wraps around it."""
    for _ in range(8):
        inner = getattr(backend, "_torchdynamo_orig_backend", getattr(backend, "_torchdynamo_orig_callable", None))
        if inner is None:
            return backend
        backend = inner
    return backend


def _base_of(model: Any) -> Any:
    """The part of a model below its head; None where there is no such part."""
    model = getattr(model, "module", model)  # of DistributedDataParallel
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not model else None

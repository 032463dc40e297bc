"""The reductions of a loss: every call on its way that makes one number of many elements, written as their sum.

A loss ends in `cross_entropy(…, reduction="mean")`, `losses.mean()`, `(losses * mask).sum() / mask.sum()` and the
like. `Reductions` intercepts these calls. Each is computed as

    R = scale * (sum of its elements x),

with the elements kept, and a zero added to R whose derivative is asked for when the loss L is known: it is dL/dR, the
coefficient of the reduction. The graph stays the one that PyTorch would have built; nothing is detached.

Sums are taken before they are scaled, in float32: a mean of many small elements in half precision would be lost
otherwise. Without a graph (evaluation, `torch.no_grad`), the reductions and the arithmetic on them are recorded all
the same, and nothing else is.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from cmp_trainer.ablations.protocol import Handler

_SKIPPED_FRAMES = (str(Path(torch.__file__).parent), __file__, str(Path(__file__).parents[1] / "execution"))
_MEANS = (torch.mean, Tensor.mean, torch.nanmean, Tensor.nanmean)
_SUMS = (torch.sum, Tensor.sum, torch.nansum, Tensor.nansum)
HALF = (torch.float16, torch.bfloat16)
_NAN = (torch.nanmean, Tensor.nanmean, torch.nansum, Tensor.nansum)


class Place(NamedTuple):
    """Where a reduction stands in the code: the function and its caller's line; and how often it was called there."""

    function: str
    line: str
    call: int


class _Gate:
    """What a reduction lets pass while coefficients are read."""

    __slots__ = ("passes", "reading")

    def __init__(self) -> None:
        self.reading, self.passes = False, False


class _Note(torch.autograd.Function):
    """value + 0. In backward the 0 gets what arrives; while coefficients are read, the value may get nothing."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, zero: Tensor, gate: _Gate) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        gradient, gate = gradients[0], ctx.gate
        if not gate.reading:
            return gradient, None, None
        return (gradient if gate.passes else None), gradient, None


class Reduction:
    """One intercepted call: R = scale * elements.sum(dims).

    Attributes:
        place: where it was called.
        elements: what was summed, with its graph.
        scale: a number, or a tensor that broadcasts to the elements.
        dims: the summed dimensions, not negative.
        target: the target of a loss function of torch.nn.functional.
        counted: how much each element counts in a mean (0 for ignored labels, class weights); all alike where None.
        coefficient: dL/dR, of R's shape; None before it is read, and where the loss does not depend on R.
        declared: the caller said that the elements are `(batch, parts)`.
        is_half: it was called in half precision; autocast may be on inside of the model only.
    """

    def __init__(
        self,
        place: Place,
        elements: Tensor,
        scale: float | Tensor,
        dims: tuple[int, ...],
        target: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self.place, self.elements, self.scale, self.dims = place, elements, scale, dims
        self.target, self.counted = target, counted
        self.coefficient: Tensor | None = None
        self.declared = False
        self.is_half = elements.dtype in HALF or torch.is_autocast_enabled(elements.device.type)
        self.gate, self.zero = _Gate(), torch.zeros(())

    @property
    def counts(self) -> bool:
        """Whether the loss depends on it; needs a look at the number."""
        return self.coefficient is not None and bool((self.coefficient != 0).any())

    @property
    def factor(self) -> Tensor:
        """What each element is multiplied by in the loss; broadcasts to the elements."""
        assert self.coefficient is not None
        factor = self.coefficient.detach().to(_wide(self.elements.dtype))
        for dim in self.dims:
            factor = factor.unsqueeze(dim) if factor.ndim < self.elements.ndim else factor
        return factor * self.scale


class Reductions:
    """Handlers that note every reduction of a forward: `Intercept(reductions.handlers)`.

    Args:
        only: the places to note; all where None. Without a graph these have to be given.
    """

    def __init__(self, only: set[tuple[str, str]] | None = None) -> None:
        self.noted: list[Reduction] = []
        self.only = only
        self._calls: Counter[tuple[str, str]] = Counter()
        self._scalars: dict[int, Tensor] = {}

    @property
    def handlers(self) -> dict[Callable, Handler]:
        """By function. Not kept here: they refer to this object, which would hold its graph until Python looks for
        cycles."""
        return {
            **dict.fromkeys(_LOSSES, self._loss),
            **dict.fromkeys((*_MEANS, *_SUMS), self._mean_or_sum),
            example_mean: self._declared,
        }

    def follow(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Handler of all other functions in a run without a graph: arithmetic on reductions is recorded."""
        given = [*args, *kwargs.values()]
        given += [item for value in given if isinstance(value, (list, tuple)) for item in value]
        if not any(id(value) in self._scalars for value in given):
            return func(*args, **kwargs)
        with torch.inference_mode(False), torch.enable_grad():
            result = func(*args, **kwargs)
        for value in result if isinstance(result, tuple) else [result]:
            if isinstance(value, Tensor) and value.requires_grad:
                self._scalars[id(value)] = value
        return result

    def read(self, loss: Tensor, create_graph: bool = False) -> None:
        """Set the coefficient of every reduction: of the outermost, and of those inside of the ones that pass."""
        for reduction in self.noted:
            reduction.coefficient, reduction.gate.reading = None, True
        try:
            if self.noted and loss.requires_grad:
                zeros = [reduction.zero for reduction in self.noted]
                coefficients = torch.autograd.grad(
                    loss, zeros, retain_graph=True, create_graph=create_graph, allow_unused=True
                )
                for reduction, coefficient in zip(self.noted, coefficients, strict=True):
                    reduction.coefficient = coefficient
        finally:
            for reduction in self.noted:
                reduction.gate.reading = False

    # --- handlers ---

    def _loss(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        bound = _LOSSES[func].bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        how = given["reduction"]
        if how == "none" or given.get("size_average") is not None or given.get("reduce") is not None:
            return func(*args, **kwargs)
        elements = func(**{**given, "reduction": "none"})
        elements = elements[None] if elements.ndim == 0 else elements
        counted = _counted(func, given)
        return self._note(  # pyright: ignore[reportAttributeAccessIssue]
            func,
            elements,
            _scale(func, how, given, elements, counted),
            tuple(range(elements.ndim)),
            plain=lambda: func(*args, **kwargs),
            target=given.get("target"),
            counted=counted,
        )

    def _mean_or_sum(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        values = args[0] if args else kwargs.get("input")
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim == 0:
            return self.follow(func, args, kwargs) if self._scalars else func(*args, **kwargs)
        dims, keepdim = _dims(args, kwargs, values.ndim)
        if len(dims) < values.ndim and 0 not in dims:
            return self.follow(func, args, kwargs) if self._scalars else func(*args, **kwargs)
        scale: float | Tensor = 1.0
        if func in _NAN:
            known = ~values.isnan()
            values = values.nan_to_num(0.0)
            scale = 1 / known.sum(dims, keepdim=True) if func in _MEANS else 1.0
        elif func in _MEANS:
            scale = 1 / max(1, _count(values, dims))
        plain = partial(func, *args, **kwargs)
        return self._note(  # pyright: ignore[reportAttributeAccessIssue]
            func, values, scale, dims, plain, keepdim=keepdim, dtype=kwargs.get("dtype")
        )

    def _declared(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        values = args[0]
        dims = tuple(range(values.ndim))
        result = self._note(  # pyright: ignore[reportAttributeAccessIssue]
            func, values, 1 / max(1, values.numel()), dims, values.mean
        )
        if self.noted and self.noted[-1].elements is values:
            self.noted[-1].declared = True
        return result

    @torch.compiler.disable
    def _note(
        self,
        func: Callable,
        elements: Tensor,
        scale: float | Tensor,
        dims: tuple[int, ...],
        plain: Callable[[], Tensor],
        target: Any = None,
        counted: Tensor | None = None,
        keepdim: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        recorded = torch.is_grad_enabled()
        followed = id(elements) in self._scalars
        where = (func.__name__, _caller())
        if (recorded and not elements.requires_grad) or (self.only is not None and where not in self.only):
            return self.follow(lambda _: plain(), (elements,), {}) if followed else plain()
        place = Place(*where, self._calls[where])
        self._calls[where] += 1
        with torch.inference_mode(False), torch.enable_grad():
            if not recorded and not followed:
                elements = elements.clone() if elements.is_inference() else elements.detach()
            target = target if isinstance(target, Tensor) else None
            reduction = Reduction(place, elements, scale, dims, target, counted)
            total = elements.sum(dims, keepdim=isinstance(scale, Tensor), dtype=_wide(elements.dtype)) * scale
            total = total.reshape([size for dim, size in enumerate(elements.shape) if dim not in dims])
            reduction.zero = torch.zeros_like(total, requires_grad=True)
            if not torch.is_autocast_enabled(elements.device.type):
                total = total.to(dtype or elements.dtype)
            value = _Note.apply(total, reduction.zero, reduction.gate)
            for dim in dims if keepdim else ():
                value = value.unsqueeze(dim)
            value = value.clone()  # callers add to it in place
        self.noted.append(reduction)
        if not recorded:
            self._scalars[id(value)] = value
        return value


def example_mean(values: Tensor) -> Tensor:
    """Mean of losses that are known to be the examples' own, `(batch, parts)`; parts are compared separately."""
    if has_torch_function_unary(values):
        return handle_torch_function(example_mean, (values,), values)
    return values.mean()


def _counted(func: Callable, given: Mapping[str, Any]) -> Tensor | None:
    """How much each element of a loss function counts in its mean."""
    target = given.get("target")
    if func not in (F.cross_entropy, F.nll_loss) or not isinstance(target, Tensor) or target.is_floating_point():
        return None
    labelled, weight = target != given["ignore_index"], given.get("weight")
    return labelled if weight is None else weight[target.where(labelled, 0)] * labelled


def _scale(
    func: Callable, how: str, given: Mapping[str, Any], elements: Tensor, counted: Tensor | None
) -> float | Tensor:
    """What the sum of a loss function's elements is multiplied by."""
    if how == "sum":
        return 1.0
    if how == "batchmean":
        return 1 / max(1, elements.shape[0])
    if func is F.ctc_loss:
        lengths = torch.as_tensor(given["target_lengths"], device=elements.device)
        return 1 / lengths.clamp(min=1).to(elements.dtype) / elements.numel()
    if counted is None:
        return 1 / max(1, elements.numel())
    total = counted.sum().to(_wide(elements.dtype))
    return 1 / total.masked_fill(total == 0, 1)  # a batch without any label counts 0


def _dims(args: tuple, kwargs: Mapping[str, Any], ndim: int) -> tuple[tuple[int, ...], bool]:
    """The reduced dimensions of a mean or sum, and whether they are kept."""
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
    keepdim = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    if isinstance(dim, int):
        dim = (dim,) if not isinstance(dim, bool) else None
    elif not isinstance(dim, (tuple, list, torch.Size)) or not dim:
        dim = None
    every = tuple(range(ndim))
    return (every, bool(keepdim)) if dim is None else (tuple(sorted(d % ndim for d in dim)), bool(keepdim))


def _count(values: Tensor, dims: tuple[int, ...]) -> int:
    count = 1
    for dim in dims:
        count *= values.shape[dim]
    return count


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


def _caller() -> str:
    """File and line of the code that called a torch function."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED_FRAMES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _losses() -> dict[Callable, inspect.Signature]:
    """The functions of torch.nn.functional with a `reduction`, and their signatures."""
    found = {}
    for name, func in vars(F).items():
        if callable(func) and not name.startswith("_") and not isinstance(func, type):
            try:
                signature = inspect.signature(func)
            except (TypeError, ValueError):
                continue
            if "reduction" in signature.parameters:
                found[func] = signature
    return found


_LOSSES = _losses()

"""Where a model's stack of layers is, found by watching one forward.

Models keep their layers under many names (`encoder.layer`, `h`, `decoder.block`, `blocks`), and some run one layer
many times. So nothing is looked up by name: one forward is watched, and a stack is a list of modules of one kind that
are called one after the other, each on floating-point numbers. Of several stacks (encoder and decoder, image tower and
language model) the one that starts last is taken. A list inside of a layer is no stack, nor is a small list beside a
large one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from cmp_trainer.losses.shares import CannotCompare

_LISTS = (nn.ModuleList, nn.Sequential)
_SMALL = 0.1  # of the parameters of the largest stack


class NoStack(ValueError):
    """The model has no stack of layers, or one with fewer layers than asked for."""


@dataclass(frozen=True)
class Carry:
    """How a skipped layer passes its input through, in the form in which it returns its output.

    Attributes:
        structure: of what the layer returns.
        sources: for each tensor in it the argument that takes its place, by number or name; None for what the layer
            makes by itself, such as attention weights.
    """

    structure: TreeSpec
    sources: tuple[int | str | None, ...]

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What a skipped layer returns.

        Raises:
            CannotCompare: it is called with other arguments than in the forward that was watched.
        """
        given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
        missing = [source for source in self.sources if source is not None and source not in given]
        if missing:
            raise CannotCompare(
                f"a layer cannot be skipped: it is called without the argument {missing[0]!r} that it had on the "
                "first batch."
            )
        values = [None if source is None else given[source] for source in self.sources]
        return tree_unflatten(values, self.structure)


@dataclass
class _Call:
    """A module's call in a forward, and the calls inside of it."""

    module: nn.Module
    takes_floats: bool = False
    inside: list[_Call] = field(default_factory=list)
    carry: Carry | None = None


@dataclass(frozen=True)
class Stack:
    """The layers of a model, in the order of their calls.

    Attributes:
        name: of the list in the model.
        layers: one entry a call; a layer that is run many times stands there as often.
        path: the modules whose forwards the layers' calls lie in, from the model to the one that calls the layers.
        beside: all other modules that are called by those on the path.
        carries: how each layer passes its input through when it is skipped; None where it cannot, since it changes
            the shape, carries further states, or is spread over several lists.
    """

    name: str
    layers: tuple[nn.Module, ...]
    path: tuple[nn.Module, ...]
    beside: tuple[nn.Module, ...]
    carries: tuple[Carry | None, ...]


def find_stack(model: nn.Module, run: Callable[[], Any], num_layers: int | None = None) -> Stack:
    """The stack of a model.

    Args:
        run: runs one forward.
        num_layers: how many of its layers are to be ablated; None where layers are skipped.

    Raises:
        NoStack: there is none, or it has fewer layers; names the stacks that were found.
    """
    found = _stacks(model, _watched(model, run))
    if not found:
        asked, fix = "layers are to be skipped, but ", "Use ablations that drop or crop."
        if num_layers is not None:
            asked, fix = f"--cmp_ablated_layers {num_layers}: ", "Leave it out to ablate the whole model."
        raise NoStack(
            f"{asked}no stack of layers was found in {type(model).__name__}, that is, no list of modules of one kind "
            f"that are called one after the other in the forward of a module. {fix}"
        )
    stack = found[-1]
    if num_layers is not None and num_layers > len(stack.layers):
        others = "".join(f"; {len(one.layers)} in {one.name}" for one in found[:-1])
        raise NoStack(
            f"--cmp_ablated_layers {num_layers} is more than the {len(stack.layers)} layers of {stack.name}, the "
            f"stack of {type(model).__name__} that starts last{others}. Give 1 to {len(stack.layers)}, or leave it "
            "out to ablate the whole model."
        )
    return stack


def _watched(model: nn.Module, run: Callable[[], Any]) -> _Call:
    """The tree of all module calls of a forward."""
    root = _Call(model)
    stack = [root]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = _Call(module, bool(tensors) and tensors[0].is_floating_point())
        stack[-1].inside.append(call)
        stack.append(call)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while (call := stack.pop()).module is not module:
            pass
        call.carry = _carry(args, kwargs, output)

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        hooks.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return root


def _carry(args: tuple, kwargs: dict[str, Any], output: Any) -> Carry | None:
    """How a call passes its input through: as the first argument of the shape of what it returns. None where no
    argument has it, or where the layer carries further states, as XLNet's do."""
    every: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    given: dict[int | str, Tensor] = {name: one for name, one in every.items() if isinstance(one, Tensor)}
    leaves, structure = tree_flatten(output)
    hidden = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    floats = {name: one.shape for name, one in given.items() if one.is_floating_point()}
    source = next((name for name, shape in floats.items() if hidden is not None and shape == hidden.shape), None)
    if source is None:
        return None
    names = {id(one): name for name, one in given.items()}
    made = [one for one in leaves if isinstance(one, Tensor) and one is not hidden and id(one) not in names]
    further = [shape for name, shape in floats.items() if name != source]
    if any(one.shape in further for one in made):
        return None
    return Carry(structure, tuple(source if leaf is hidden else names.get(id(leaf)) for leaf in leaves))


def _stacks(model: nn.Module, root: _Call) -> list[Stack]:
    """The stacks among the calls, in the order in which they start."""
    lists = _lists_of_layers(model)
    found: dict[str, tuple[Stack, int]] = {}
    for path, by_list in _frames(root, lists):
        for name, (calls, size) in by_list.items():
            found.pop(name, None)  # a model may run several times; its last run counts
            found[name] = _stack(name, calls, path, lists[name]), size
    for name, (stack, size) in found.items():
        beside: dict[nn.Module, None] = {}
        for call, path in _walk(root, ()):
            if call.module in stack.path and all(one.module in stack.path for one in path):
                beside |= {one.module: None for one in call.inside}
        rest = tuple(one for one in beside if one not in stack.path and one not in stack.layers)
        found[name] = replace(stack, beside=rest), size
    largest = max((size for _, size in found.values()), default=0)
    return [stack for stack, size in found.values() if size >= _SMALL * largest]


def _stack(name: str, calls: list[_Call], path: tuple[_Call, ...], elements: list[nn.Module]) -> Stack:
    called = [call.module for call in calls]
    in_order = [element for element in elements if element in called] == called
    layers = elements if in_order else called  # elements that layer drop left out are layers too
    carries: list[Carry | None] = [call.carry for call in calls]
    if len(layers) != len(called):
        by_layer = dict(zip(called, carries, strict=True))
        carries = [by_layer.get(layer, carries[-1]) for layer in layers]
    return Stack(name, tuple(layers), tuple(one.module for one in path), (), tuple(carries))


def _frames(
    root: _Call, lists: dict[str, list[nn.Module]]
) -> Iterator[tuple[tuple[_Call, ...], dict[str, tuple[list[_Call], int]]]]:
    """Calls that call layers, each with the path to it, and by list of layers the calls and their parameters."""
    names = {element: name for name, elements in lists.items() for element in elements}
    inside: set[int] = set()  # calls that are layers of a stack, or lie in one
    for call, path in _walk(root, ()):
        if any(id(one) in inside for one in (*path, call)):
            continue
        places: dict[str, list[int]] = {}
        for place, one in enumerate(call.inside):
            if one.module in names and one.takes_floats:
                places.setdefault(names[one.module], []).append(place)
        by_list: dict[str, tuple[list[_Call], int]] = {}
        first, end = "", -1
        for name, where in places.items():  # in the order of their first calls
            size = sum(_parameters(module) for module in {call.inside[place].module for place in where})
            if where[0] < end:  # lists that take turns make up one stack, which begins where the first one does
                by_list[first] = by_list[first][0], by_list[first][1] + size
                for one in by_list[first][0]:
                    one.carry = None  # a part of a layer cannot be left out alone
            else:
                first, end = name, where[-1]
                by_list[name] = [call.inside[place] for place in where], size
            inside.update(id(call.inside[place]) for place in where)
        if by_list and path:  # layers that a loss function calls by itself are in no module's forward
            yield (*path, call)[1:], by_list


def _walk(call: _Call, path: tuple[_Call, ...]) -> Iterator[tuple[_Call, tuple[_Call, ...]]]:
    yield call, path
    for one in call.inside:
        yield from _walk(one, (*path, call))


def _lists_of_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists of modules of one kind, each of several parts; lists of lists are read as one."""
    found: dict[str, list[nn.Module]] = {}
    read: set[nn.Module] = set()
    for name, module in model.named_modules():
        if not isinstance(module, _LISTS) or module in read:
            continue
        elements = list(_elements(module, read))
        if elements and _of_one_kind(elements) and all(_has_parts(element) for element in elements):
            found[name] = elements
    return found


def _elements(module: nn.Module, read: set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            read.add(child)
            yield from _elements(child, read)
        else:
            yield child


def _of_one_kind(elements: list[nn.Module]) -> bool:
    """Whether they have a class in common that is more than a module."""
    common = set.intersection(*(set(type(element).__mro__) for element in elements)) - set(nn.Module.__mro__)
    return any(issubclass(kind, nn.Module) for kind in common)


def _has_parts(module: nn.Module) -> bool:
    parts = [one for one in module.modules() if one is not module and any(True for _ in one.parameters(recurse=False))]
    return len(parts) > 1


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

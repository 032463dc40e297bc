"""Gradient checkpointing under ablation: what is recomputed in backward loses what the forward lost.

A checkpointed layer runs its forward a second time in backward, when the variant's ablation has long been left.
PyTorch restores the random state there by itself. The ablation is entered again by wrapping the two entry points of
torch.utils.checkpoint for the time of a forward, so that whatever they are told to run again runs inside of it:
reentrant or not, nested, with a `context_fn` of the user's own, switched on by transformers, by a module or by FSDP.
Both names mean what they meant before as soon as the forward has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch.utils import checkpoint


class _Recomputes(Protocol):
    place: Any

    def recompute(self, function: Any, args: tuple, kwargs: dict[str, Any], place: Any, reentrant: bool) -> Any: ...


@contextmanager
def recompute_inside(ablated: _Recomputes) -> Iterator[None]:
    """What is checkpointed in the body is recomputed by `ablated.recompute`.

    Raises:
        RuntimeError: this PyTorch's checkpointing has no such entry points.
    """
    name, reentrant = "_checkpoint_without_reentrant_generator", checkpoint.CheckpointFunction
    generator = getattr(checkpoint, name, None)
    if generator is None:
        raise RuntimeError(
            f"this version of PyTorch has no torch.utils.checkpoint.{name}, so ablated forwards could be recomputed "
            "without their ablation; install a version that cmp_trainer was tested with (2.6 to 2.13)."
        )
    own_apply = vars(reentrant).get("apply")  # of the class itself; None where it is inherited
    apply = reentrant.apply

    def inside(function: Any, reentrant: bool = False) -> Any:
        place = ablated.place

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return ablated.recompute(function, args, kwargs, place, reentrant)

        return recomputed

    setattr(checkpoint, name, lambda function, *args, **kwargs: generator(inside(function), *args, **kwargs))
    reentrant.apply = staticmethod(lambda function, *args: apply(inside(function, reentrant=True), *args))
    try:
        yield
    finally:
        setattr(checkpoint, name, generator)
        if own_apply is None:
            del reentrant.apply
        else:
            reentrant.apply = own_apply

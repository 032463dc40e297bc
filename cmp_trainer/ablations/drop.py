"""CmpDrop: ablate hidden neurons by more and more dropout, without touching the model.

The full model runs with every dropout rate at 0; the variant after k drops runs with the rates that k cumulative
dropouts of rate p amount to, 1 - (1 - p)^k. If each forward starts from the same random state, the masks are nested:
what is dropped after k drops stays dropped after k + 1.

Models call dropout in many ways (`nn.Dropout`, `nn.functional.dropout`, the `dropout_p` of attention), so CmpDrop
intercepts the calls, not the modules: inside the context every call of a dropout function gets another rate and then
runs PyTorch's own kernel. Nothing of the model changes, so nothing has to be restored.

Source: https://doi.org/10.1145/3652599, section on CmpDrop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Growth = Literal["compound", "linear"]

# Where each function takes its rate: position and name of the argument. A call in eval mode (training=False) may be
# rewritten too, since it drops nothing whatever its rate.
RATE_ARGUMENT = {
    F.dropout: (1, "p"),
    F.dropout1d: (1, "p"),
    F.dropout2d: (1, "p"),
    F.dropout3d: (1, "p"),
    F.alpha_dropout: (1, "p"),
    F.feature_alpha_dropout: (1, "p"),
    torch.dropout: (1, "p"),
    torch.dropout_: (1, "p"),
    torch.feature_dropout: (1, "p"),
    torch.feature_dropout_: (1, "p"),
    torch.alpha_dropout: (1, "p"),
    torch.alpha_dropout_: (1, "p"),
    torch.feature_alpha_dropout: (1, "p"),
    torch.feature_alpha_dropout_: (1, "p"),
    torch.native_dropout: (1, "p"),
    F.scaled_dot_product_attention: (4, "dropout_p"),
    F.multi_head_attention_forward: (10, "dropout_p"),
}
RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@dataclass(frozen=True)
class DropoutSchedule:
    """How the rate of a dropout site grows with the number k of cumulative drops.

    Args:
        growth: `"compound"`, 1 - (1 - p)^k, the rate of k dropouts one after the other; or `"linear"`, k * p.
        base_rate: p at every site in place of the model's own, also where its own is 0.
        rates: the rates for k = 1, 2, … at every site, in place of p and `growth`.
    """

    growth: Growth = "compound"
    base_rate: float | None = None
    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.growth not in get_args(Growth):
            raise ValueError(f"dropout schedule {self.growth!r} is unknown; expected one of {get_args(Growth)}.")

    def rate(self, own_rate: float, drops: int) -> float:
        """The rate after `drops` drops of a site whose own rate is `own_rate`.

        Raises:
            ValueError: the linear schedule leaves [0, 1), or there are fewer explicit rates than drops.

        Examples:
            >>> [round(DropoutSchedule().rate(0.1, drops), 3) for drops in range(4)]
            [0.0, 0.1, 0.19, 0.271]
        """
        if drops == 0:
            return 0.0
        if self.rates is not None:
            if drops > len(self.rates):
                raise ValueError(
                    f"{drops} drops, but only the {len(self.rates)} dropout rates {self.rates} are given."
                )
            return self.rates[drops - 1]
        base_rate = own_rate if self.base_rate is None else self.base_rate
        if self.growth == "compound":
            return 1 - (1 - base_rate) ** drops
        if drops * base_rate >= 1:
            raise ValueError(
                f"the linear dropout schedule reaches {drops} * {base_rate} >= 1; use the compound schedule, fewer "
                "ablations, or a smaller --cmp_dropout."
            )
        return drops * base_rate


class CmpDrop(TorchFunctionMode):
    """Context in which every dropout call has the rate of `drops` cumulative drops; 0 drops is the full model.

    The context belongs to the thread it is entered in. Nested masks need equal random
    states at the start of each forward: see `RandomState`.
    Attention kernels outside PyTorch (flash-attn, flex attention) take their rate elsewhere and are not reached.

    Args:
        drops: k, the number of cumulative drops.
        schedule: how rates grow with k.

    Examples:
        >>> ones = torch.ones(6)
        >>> with CmpDrop(0):
        ...     nn.functional.dropout(ones, p=0.5, training=True)
        tensor([1., 1., 1., 1., 1., 1.])
    """

    def __init__(self, drops: int, schedule: DropoutSchedule | None = None) -> None:
        super().__init__()
        self.drops = drops
        self.schedule = schedule or DropoutSchedule()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # On the path of every torch function: one dictionary look-up for all that is not dropout.
        if func in RATE_ARGUMENT:
            return self.drop(func, *RATE_ARGUMENT[func], args, kwargs or {})
        if func in RECURRENT:
            # (input, hx, weights, has_bias, layers, dropout, …), one further right for packed sequences
            return self.drop(func, 5 if isinstance(args[3], bool) else 6, "dropout", args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def drop(self, func: Callable, position: int, name: str, args: tuple, kwargs: dict) -> Any:
        """Call a dropout function at the new rate; `position` and `name` say where it takes its rate."""
        rate = self.schedule.rate(own_rate(position, name, args, kwargs), self.drops)
        args, kwargs = with_rate(rate, position, name, args, kwargs)
        return func(*args, **kwargs)

    def again(self) -> "CmpDrop":
        """An equal context, to be entered where this one has been left: in the recomputation of a checkpoint."""
        return CmpDrop(self.drops, self.schedule)


class DropoutSites(CmpDrop):
    """CmpDrop that also lists the dropout calls it meets: `sites`, pairs of (function name, the call's own rate)."""

    def __init__(self, drops: int = 0, schedule: DropoutSchedule | None = None) -> None:
        super().__init__(drops, schedule)
        self.sites: list[tuple[str, float]] = []

    def drop(self, func: Callable, position: int, name: str, args: tuple, kwargs: dict) -> Any:
        """Note the call, then make it."""
        self.sites.append((func.__name__, own_rate(position, name, args, kwargs)))
        return super().drop(func, position, name, args, kwargs)


def own_rate(position: int, name: str, args: tuple, kwargs: dict) -> float:
    """The rate that a dropout call asks for."""
    if len(args) > position:
        return args[position]
    return kwargs.get(name, 0.0 if name == "dropout_p" else 0.5)  # PyTorch's own defaults


def with_rate(rate: float, position: int, name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a dropout call with another rate."""
    if len(args) > position:
        return (*args[:position], rate, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: rate}


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the running means of batch norm, are after the body what they were before."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before and not torch.equal(buffer, before[name]):
                    buffer.copy_(before[name])


@contextmanager
def dropout_awake(model: nn.Module) -> Iterator[None]:
    """Train mode for the modules of an eval model, so that they drop; batch norm stays asleep. Restored at the end,
    with the buffers that other modules change in train mode (spectral norm)."""
    asleep = [module for module in model.modules() if not module.training]
    asleep = [module for module in asleep if not isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in asleep:
        module.training = True
    try:
        with unchanged_buffers(model):
            yield
    finally:
        for module in asleep:
            module.training = False

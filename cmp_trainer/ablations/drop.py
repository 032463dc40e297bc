"""CmpDrop: ablate hidden neurons by more and more dropout, without touching the model.

The full model runs with every dropout rate at 0; the variant after k drops runs with the rates that k cumulative
dropouts of rate p amount to, 1 - (1 - p)^k. Each forward starts from the same random state, so the masks are nested:
what is dropped after k drops stays dropped after k + 1.

Models call dropout in many ways (`nn.Dropout`, `nn.functional.dropout`, the `dropout_p` of attention), so CmpDrop
intercepts the calls, not the modules: every call of a dropout function gets another rate and then runs PyTorch's own
kernel. Nothing of the model changes, so nothing has to be restored.

Source: https://doi.org/10.1145/3652599, section on CmpDrop.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmp_trainer.ablations.protocol import Ablation, Handler

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
_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# The functions of torch.backends.cuda that call these cannot be compiled.
_OF_ANY_RATE = (
    (SDPBackend.FLASH_ATTENTION, torch._C._get_flash_sdp_enabled),
    (SDPBackend.EFFICIENT_ATTENTION, torch._C._get_mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch._C._get_math_sdp_enabled),
)
_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class CmpDrop(Ablation):
    """One more cumulative dropout at every dropout site; level k has been through k drops, level 0 is the full model.

    Nested masks need equal random states at the start of each forward; ComparativeStep sees to it. Attention kernels
    outside PyTorch (flash-attn, flex attention) apply dropout inside the kernel, where it cannot be intercepted.

    Args:
        growth: how the rate of a site grows with the number k of drops: `"compound"`, 1 - (1 - p)^k, the rate of k
            dropouts one after the other; or `"linear"`, k * p.
        base_rate: p at every site in place of the model's own, also where its own is 0.
        rates: the rates for k = 1, 2, … at every site, in place of p and `growth`.

    Raises:
        ValueError: an unknown growth, or a rate outside [0, 1).

    Source:
        https://doi.org/10.1145/3652599, section on CmpDrop.

    Examples:
        >>> [round(CmpDrop().rate(0.1, drops), 3) for drops in range(4)]
        [0.0, 0.1, 0.19, 0.271]
    """

    growth: Growth = "compound"
    base_rate: float | None = None
    rates: tuple[float, ...] | None = None
    leaves_lower_layers: ClassVar[bool] = True  # below the boundary dropout is off

    def __post_init__(self) -> None:
        if self.growth not in get_args(Growth):
            raise ValueError(f"CmpDrop: growth {self.growth!r} is unknown; expected one of {get_args(Growth)}.")
        for rate in (*(self.rates or ()), *([] if self.base_rate is None else [self.base_rate])):
            if not 0 <= rate < 1:
                raise ValueError(f"CmpDrop: dropout rate {rate} is not in [0, 1).")

    def rate(self, own_rate: float, drops: int) -> float:
        """The rate after `drops` drops of a site whose own rate is `own_rate`.

        Raises:
            ValueError: the linear schedule leaves [0, 1), or there are fewer explicit rates than drops.
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

    def calls(self, level: int) -> Mapping[Callable, Handler]:
        """Dropout functions at the rate of `level` cumulative drops."""
        return intercepted_dropout(partial(self._drop, level))

    def _drop(self, level: int, site: "Site", func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        rate = self.rate(site.own_rate(args, kwargs), level)
        args, kwargs = site.with_rate(rate, args, kwargs)
        with any_rate(func, rate, args, kwargs):
            return func(*args, **kwargs)


def any_rate(func: Callable, rate: float, args: tuple, kwargs: Mapping[str, Any] = _NONE) -> AbstractContextManager:
    """Context in which attention runs in a kernel that takes any rate. cuDNN's takes multiples of 1/16, so one variant
    could run in it and the next one in another, whose masks are not nested in its own. Of the others, those that are
    turned off stay off; where cuDNN's alone is on, it is left alone."""
    query = args[0] if args else kwargs.get("query")
    if func not in _ATTENTION or not rate or query is None or not query.is_cuda:
        return nullcontext()
    kernels = [kernel for kernel, is_on in _OF_ANY_RATE if is_on()]
    return sdpa_kernel(kernels) if kernels else nullcontext()


@dataclass(frozen=True)
class Site:
    """Where a dropout function takes its rate."""

    position: int
    name: str

    def own_rate(self, args: tuple, kwargs: Mapping[str, Any]) -> float:
        """The rate that a call asks for."""
        if len(args) > self.position:
            return args[self.position]
        return kwargs.get(self.name, 0.0 if self.name == "dropout_p" else 0.5)  # PyTorch's own defaults

    def with_rate(self, rate: float, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call with another rate."""
        if len(args) > self.position:
            return (*args[: self.position], rate, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: rate}


def intercepted_dropout(drop: Callable[[Site, Callable, tuple, dict[str, Any]], Any]) -> Mapping[Callable, Handler]:
    """Handlers of all dropout functions that call `drop(site, function, args, kwargs)`."""
    handlers: dict[Callable, Handler] = {func: partial(drop, site) for func, site in _SITES.items()}

    def recurrent(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        # (input, hx, weights, has_bias, layers, dropout, …), one further right for packed sequences
        return drop(Site(5 if isinstance(args[3], bool) else 6, "dropout"), func, args, kwargs)

    return handlers | dict.fromkeys(RECURRENT, recurrent)


def in_train_mode(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a dropout call would drop at a positive rate; attention functions take no such argument."""
    if func in (*_ATTENTION, *RECURRENT):
        return True
    training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(training)


_SITES = {func: Site(*where) for func, where in RATE_ARGUMENT.items()}

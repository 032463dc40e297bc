"""What the logs say of the variants: the mean task loss of each and how often they are in the wrong order.

Sums stay on the device until the Trainer logs, so that a step never waits for them. A NaN or infinite task loss is
left out of the means and counted (a mean of nothing else is NaN), and its example has no part in the violation rate;
when the log is read, a warning names the variants, and those it began with: a step later, every loss of the model may
be NaN.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cmp_trainer.losses.comparative import violation_rate

logger = logging.getLogger(__name__)


class LossLog:
    """Running means over the examples seen since the last `pop`.

    Args:
        names: of the variants, the full one first.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.differed = False  # whether the variants' mean losses ever differed
        self._are_equal = False  # whether they were equal in the latest log, which is warned of once
        # (4, 1 + c + 1): weighted sums, weights, counts of the non-finite, and those of the first such batch
        self._sums: Tensor | None = None

    def __bool__(self) -> bool:
        return self._sums is not None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """Count a batch in: task losses `(batch, parts, 1 + c)` and their weights `(batch, parts)`.

        Means of losses are weighted; the violation rate counts every labelled example once.
        """
        values, weights = values.detach().float().flatten(0, 1), weights.detach().float().flatten().unsqueeze(-1)
        violations = violation_rate(values).masked_fill(~values.isfinite().all(-1), torch.nan)
        columns = torch.cat([values, violations.unsqueeze(-1)], dim=-1)  # (batch * parts, 1 + c + 1)
        finite = columns.isfinite()
        counted = torch.cat([weights.expand_as(values), (weights > 0).float()], dim=-1) * finite
        bad = ((~finite) & (weights > 0)).float().sum(0)
        sums = torch.stack([(columns.nan_to_num(0, 0, 0) * counted).sum(0), counted.sum(0), bad, bad])
        if self._sums is not None:
            first = torch.where(self._sums[3].any(), self._sums[3], bad)
            sums = torch.cat([self._sums[:3] + sums[:3], first.unsqueeze(0)])
        self._sums = sums

    def pop(
        self,
        reduce: Callable[[Tensor], Tensor] | None = None,
        prefix: str = "",
        device: torch.device | None = None,
    ) -> dict[str, float]:
        """The means since the last time, by name; empty when nothing was added.

        Args:
            reduce: sums a tensor over the processes; it is called in each of them, whether it added something or not.
            prefix: what the names begin with.
            device: of the tensor that `reduce` gets where nothing was added.
        """
        sums, self._sums = self._sums, None
        if reduce is not None:
            sums = reduce(torch.zeros(4, len(self.names) + 1, device=device) if sums is None else sums)
        if sums is None or not sums[1:3].any():
            return {}
        totals, weights, not_finite, first = sums.cpu()
        means = totals / weights.clamp(min=1e-12)
        means = means.masked_fill((weights == 0) & (not_finite > 0), torch.nan).tolist()
        names = self.names
        if not_finite.any():
            _warn(names, not_finite.tolist(), first.tolist())
        self._warn_if_equal(means[:-1], names)
        labels = [*(f"{prefix}loss_{name}" for name in names), f"{prefix}violation_rate"]
        return dict(zip(labels, means, strict=True))

    def _warn_if_equal(self, means: list[float], names: list[str]) -> None:
        are_equal = len(set(means)) == 1 and len(names) > 1
        if are_equal and not self._are_equal:
            logger.warning(
                "all variants had the same loss since the last log (%.4g), so nothing is being ablated. Is the "
                "dropout rate 0?",
                means[0],
            )
        self._are_equal, self.differed = are_equal, self.differed or not are_equal


def _warn(names: list[str], counts: list[float], first_counts: list[float]) -> None:
    logger.warning(
        "task losses were NaN or infinite since the last log: %s; first in %s. They are left out of the means. A "
        "smaller learning rate or --max_grad_norm is the usual way out.",
        ", ".join(f"{count:.0f} of {name}" for name, count in zip(names, counts, strict=False) if count),
        ", ".join(name for name, count in zip(names, first_counts, strict=False) if count),
    )

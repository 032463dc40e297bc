"""Comparative loss: rank the task losses of a model and its ablated variants.

A model that uses its neurons well gets no worse when fewer of them are ablated. For one example with task losses
l(0) (full model), l(1), …, l(c) (more and more ablated) we want l(0) <= l(1) <= … <= l(c). A constant baseline b,
appended as the last loss l(c+1), pulls all of them down. The comparative loss is the mean hinge over all pairs of
that list:

    L = 2 / ((c + 1) (c + 2)) * sum over 0 <= i < j <= c+1 of max(0, l(i) - l(j))

Source: "Cross-Model Comparative Loss for Enhancing Neuronal Utility in Language Understanding", ACM TOIS 42(5),
2024, https://doi.org/10.1145/3652599. The regularized objective is that of "LoL: A Comparative Regularization Loss
over Query Reformulation Losses for Pseudo-Relevance Feedback", SIGIR 2022, https://doi.org/10.1145/3477495.3532017.

Everything here goes from task losses (…, 1 + c), column 0 the full model, to one value per example: pure functions,
and the two objectives that a training step takes, `ComparativeLoss` and `RegularizedLoss`. An objective of your own is
any callable with the same shapes.
Losses of 16 bit are computed in float32. An example with an infinite task loss has an infinite comparative loss, one
with a NaN a NaN: neither is ever hidden in a finite number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

NamedBaseline = Literal["zero", "first", "best"]
Baseline = NamedBaseline | float
Ranking = Literal["pairwise", "listwise"]
Primary = Literal["max", "mean", "full", "last"]

# The published ListMLE adds this inside the logarithm; kept so that losses equal the published ones to 1e-12.
_LISTMLE_EPSILON = 1e-10


Objective = Callable[[Tensor], Tensor]
"""Task losses (…, 1 + c) -> one value per example (…)."""


@dataclass(frozen=True)
class ComparativeLoss:
    """The ranking of all variants and a baseline as an objective: `objective(losses)`, `(…, 1 + c)` -> `(…)`.

    Args:
        baseline, ranking, temperature, margin: as in `comparative_loss`.

    Examples:
        >>> ComparativeLoss(baseline="first")(torch.tensor([[0.2, 1.0], [1.0, 0.2]]))
        tensor([0.1333, 0.5333])
    """

    baseline: Baseline = "zero"
    ranking: Ranking = "pairwise"
    temperature: float = 1.0
    margin: float = 0.0

    def __call__(self, task_losses: Tensor) -> Tensor:
        """`(…, 1 + c)` -> `(…)`."""
        return comparative_loss(
            task_losses,
            baseline=self.baseline,
            ranking=self.ranking,
            temperature=self.temperature,
            margin=self.margin,
        )


@dataclass(frozen=True)
class RegularizedLoss:
    """A primary loss plus a weighted ranking of the variants, without a baseline: `(…, 1 + c)` -> `(…)`.

    With several parts an example (start and end of an answer) the primary loss is that of the whole example, the mean
    of its parts; the parts are ranked separately.

    Args:
        primary, weight, threshold, ranking, temperature, margin: as in `regularized_loss`.

    Examples:
        >>> RegularizedLoss(primary="mean")(torch.tensor([[0.2, 1.0], [1.0, 0.2]]))
        tensor([0.6000, 1.4000])
    """

    primary: Primary = "max"
    weight: float = 1.0
    threshold: float | None = None
    ranking: Ranking = "pairwise"
    temperature: float = 1.0
    margin: float = 0.0

    def __call__(self, task_losses: Tensor) -> Tensor:
        """`(…, 1 + c)` -> `(…)`."""
        return regularized_loss(
            task_losses,
            primary=self.primary,
            weight=self.weight,
            threshold=self.threshold,
            ranking=self.ranking,
            temperature=self.temperature,
            margin=self.margin,
        )

    def of_examples(self, losses: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over a batch: losses `(batch, parts, 1 + c)`, weights `(batch, parts)` -> scalar."""
        main = primary_loss(_widened((losses * weights.unsqueeze(-1)).sum(1)), self.primary)  # (batch,)
        if not self.weight:
            return main.sum()
        scaled = _scaled(losses, self.ranking, self.temperature, self.margin)
        ranked = (_rank(scaled, self.ranking, self.margin) * weights).sum()
        if self.threshold is not None:
            ranked = ranked * (main.detach().sum() <= self.threshold * weights.sum())
        return main.sum() + self.weight * ranked


def minimized(objective: Objective, shares: Tensor, weights: Tensor) -> Tensor:
    """What is minimized: the objective of each example's own mean losses, weighted as the shares are.

    Args:
        objective: `(…, 1 + c)` -> `(…)`, or with a method `of_examples(losses, weights)` for whole examples.
        shares: `(batch, parts, 1 + c)`, the examples' shares of the loss of each variant.
        weights: `(batch, parts)`, the weight of an example's own mean loss in its share; 0 without a label.

    Returns:
        A scalar.
    """
    labelled = weights > 0
    losses = shares / weights.masked_fill(~labelled, 1).unsqueeze(-1)
    losses = losses.masked_fill(~labelled.unsqueeze(-1), 0)
    of_examples = getattr(objective, "of_examples", None)
    if of_examples is not None:
        return of_examples(losses, weights)
    return (objective(losses) * weights).sum()


def comparative_loss(
    task_losses: Tensor,
    *,
    baseline: Baseline = "zero",
    ranking: Ranking = "pairwise",
    temperature: float = 1.0,
    margin: float = 0.0,
) -> Tensor:
    """Ranking loss over the task losses of all variants and a last, constant baseline.

    Args:
        task_losses: `(..., 1 + c)` with c >= 1; column 0 is the full model, column i the i-th ablation.
        baseline: the loss that is appended last, without gradient. `"zero"`: 0. `"best"`: the smallest of the
            example's losses. `"first"`: m = the smallest ablated loss; halfway between l(0) and m if l(0) < m, else m.
            A number: that task loss.
        ranking: `"pairwise"` hinge over all pairs, or `"listwise"` ListMLE.
        temperature: every task loss, and a numeric baseline, is divided by it first.
        margin: an earlier variant has to be better than a later one by this much (pairwise only), in units of the
            divided losses.

    Returns:
        `(...)`, one comparative loss per example; float32 or wider.

    Raises:
        ValueError: fewer than two variants, an unknown name, a temperature that is not positive, a negative margin,
            or a margin with the listwise ranking.

    Source:
        https://doi.org/10.1145/3652599, section on comparative loss; gradients at exact ties are those of
        `clamp(min=0)`, whose slope at 0 is 1.

    Examples:
        >>> losses = torch.tensor([[0.2, 1.0], [1.0, 0.2]])  # well ordered; the ablated model is better
        >>> comparative_loss(losses)
        tensor([0.4000, 0.6667])
        >>> comparative_loss(losses, baseline="first")
        tensor([0.1333, 0.5333])
    """
    losses = _scaled(task_losses, ranking, temperature, margin)
    dummy = baseline_loss(losses, baseline if isinstance(baseline, str) else baseline / temperature)
    return _rank(torch.cat([losses, dummy.unsqueeze(-1)], dim=-1), ranking, margin)


def regularized_loss(
    task_losses: Tensor,
    *,
    primary: Primary = "max",
    weight: float = 1.0,
    threshold: float | None = None,
    ranking: Ranking = "pairwise",
    temperature: float = 1.0,
    margin: float = 0.0,
    example_weights: Tensor | None = None,
) -> Tensor:
    """A primary task loss plus a weighted ranking over the variants alone (no baseline): LoL's form.

    Args:
        task_losses: `(..., 1 + c)` with c >= 1; column 0 is the full model, column i the i-th ablation.
        primary: what is minimized besides the ranking: the largest, the mean, the full model's or the last
            (most ablated) variant's loss.
        weight: factor of the ranking loss; 0 leaves the primary loss alone (the paper's weighting strategies).
        threshold: the ranking counts only while the mean of the primary loss over the batch is at most this.
        ranking, temperature, margin: as in `comparative_loss`; the temperature divides the ranked losses only.
        example_weights: `(...)`, weights of the examples in that mean; equal when None.

    Returns:
        `(...)`, one loss per example; float32 or wider.

    Raises:
        ValueError: as `comparative_loss`, or an unknown primary.

    Source:
        https://doi.org/10.1145/3477495.3532017.

    Examples:
        >>> losses = torch.tensor([[0.2, 1.0], [1.0, 0.2]])
        >>> regularized_loss(losses, primary="mean", weight=1.0)
        tensor([0.6000, 1.4000])
    """
    main = primary_loss(_widened(task_losses), primary)
    ranked = _rank(_scaled(task_losses, ranking, temperature, margin), ranking, margin)
    if threshold is not None:
        ranked = ranked * (_mean(main.detach(), example_weights) <= threshold)
    return main + weight * ranked if weight else main


def baseline_loss(losses: Tensor, baseline: Baseline) -> Tensor:
    """The baseline b for each example, a constant: `(..., 1 + c)` -> `(...)`.

    Raises:
        ValueError: a baseline that is neither a known name nor a number.

    Examples:
        >>> baseline_loss(torch.tensor([[0.2, 1.0], [1.0, 0.2]]), "best")
        tensor([0.2000, 0.2000])
    """
    losses = losses.detach()
    if baseline == "zero":
        return losses.new_zeros(losses.shape[:-1])
    if baseline == "best":
        return losses.amin(-1)
    if baseline == "first":
        full, best_ablated = losses[..., 0], losses[..., 1:].amin(-1)
        return torch.where(full < best_ablated, (full + best_ablated) / 2, best_ablated)
    if isinstance(baseline, str):
        raise ValueError(f"baseline {baseline!r} is unknown; expected one of {get_args(NamedBaseline)} or a number.")
    return losses.new_full(losses.shape[:-1], baseline)


def primary_loss(losses: Tensor, primary: Primary) -> Tensor:
    """The part of the regularized objective that is minimized as it is: `(..., 1 + c)` -> `(...)`.

    Raises:
        ValueError: an unknown primary.
    """
    if primary == "max":
        return losses.max(-1).values
    if primary == "mean":
        return losses.mean(-1)
    if primary == "full":
        return losses[..., 0]
    if primary == "last":
        return losses[..., -1]
    raise ValueError(f"primary {primary!r} is unknown; expected one of {get_args(Primary)}.")


def violation_rate(task_losses: Tensor) -> Tensor:
    """Share of the variant pairs i < j with l(i) > l(j), per example: `(..., 1 + c)` -> `(...)`.

    Examples:
        >>> violation_rate(torch.tensor([[0.2, 1.0, 0.5], [0.1, 0.1, 0.3]]))
        tensor([0.3333, 0.0000])
    """
    num_variants = task_losses.shape[-1]
    wrong = (task_losses.unsqueeze(-1) > task_losses.unsqueeze(-2)).triu(1)
    return wrong.sum((-2, -1)) / math.comb(num_variants, 2)


def _rank(losses: Tensor, ranking: Ranking, margin: float) -> Tensor:
    ranked = _pairwise_hinge(losses, margin) if ranking == "pairwise" else _listmle(losses)
    # Infinite losses may cancel (inf - inf); such an example must not come out as NaN or as nothing.
    return torch.where(losses.isinf().any(-1), torch.inf, ranked)


def _pairwise_hinge(losses: Tensor, margin: float) -> Tensor:
    """Mean over all pairs i < j of max(0, l(i) - l(j) + margin): (..., n) -> (...)."""
    differences = losses.unsqueeze(-1) - losses.unsqueeze(-2)  # (..., n, n), row i column j
    hinges = (differences + margin).clamp(min=0).triu(1)
    return hinges.sum((-2, -1)) / math.comb(losses.shape[-1], 2)


def _listmle(losses: Tensor) -> Tensor:
    """Negative log-likelihood of the given order under Plackett-Luce with scores -l: (..., n) -> (...)."""
    scores = -losses
    scores = scores - scores.max(-1, keepdim=True).values
    tails = scores.exp().flip(-1).cumsum(-1).flip(-1)  # position k: sum over the scores from k on
    return ((tails + _LISTMLE_EPSILON).log() - scores)[..., :-1].sum(-1)


def _scaled(task_losses: Tensor, ranking: Ranking, temperature: float, margin: float) -> Tensor:
    if task_losses.shape[-1] < 2:
        raise ValueError(
            f"task losses of shape {tuple(task_losses.shape)} hold {task_losses.shape[-1]} variant; a comparison "
            "needs (…, 1 + c) with at least one ablation, c >= 1."
        )
    if ranking not in get_args(Ranking):
        raise ValueError(f"ranking {ranking!r} is unknown; expected one of {get_args(Ranking)}.")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} has to be positive.")
    if margin < 0 or (margin and ranking == "listwise"):
        raise ValueError(f"margin {margin} has to be 0 or more, and 0 with the listwise ranking, which has none.")
    return _widened(task_losses) / temperature


def _widened(task_losses: Tensor) -> Tensor:
    return task_losses.float() if task_losses.dtype in (torch.float16, torch.bfloat16) else task_losses


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)

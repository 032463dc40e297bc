"""Ablation curves: what a trained model loses as more and more of it, or of its input, is taken away.

Task loss and metrics of a model are measured at 0, 1, …, K cumulative drops (CmpDrop), and at 0, 1, … removed segments
of the input (CmpCrop) until none is left, each for several mask seeds. A model that uses its neurons well starts low
and rises slowly; and it violates the comparison principle

    l(0) <= l(1) <= … <= l(K)

for few examples: at level k an example violates it when a less ablated level j < k has a higher loss.

A curve is a long pandas table, a row for each model, kind of ablation, level and seed. `summarize` takes means and
spreads, `plot_curves` draws, `curve.to_csv` and `curve.to_json` are pandas' own.

Source: the analyses of dropout power and context size in https://doi.org/10.1145/3652599.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cmp_trainer.ablations.crop import SEGMENTS, CmpCrop
from cmp_trainer.ablations.drop import CmpDrop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

KEYS = ["model", "ablation", "level"]
# A loss has to be lower by this much to count: crops that remove nothing may differ in the last bits.
_TOLERANCE = 1e-6
_TIMINGS = ("runtime", "_per_second", "model_preparation_time")


def ablation_curve(
    trainer: Any,
    dataset: Any = None,
    *,
    drops: int | None = None,
    crops: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    model_name: str | None = None,
) -> pd.DataFrame:
    """Task loss, violations and metrics of the trainer's model at every level of ablation.

    Args:
        trainer: a CmpTrainer; its model, batches, losses, `compute_metrics` and dropout schedule are used.
        dataset: what to evaluate on; the trainer's `eval_dataset` by default.
        drops: K, the most cumulative drops; by default 3, or as many as training had where that is more.
        crops: the most crops; by default all segments where the trainer crops (`--cmp_num_crops`), otherwise none.
        seeds: one measurement for each mask seed.
        model_name: what the model is called in the table; by default the name of the output folder.

    Returns:
        Columns `model`, `ablation` ("drops", "crops", or the name of an ablation of your own), `level`, `seed`,
        `examples`, `loss`, `violations` (share of examples whose loss is higher at a lower level), and one for each
        metric. Level 0 is the full model.

    Raises:
        ValueError: no data, no seeds, no labels, no ablation, or a model in which nothing can be dropped.
    """
    dataset = trainer.eval_dataset if dataset is None else dataset
    if isinstance(dataset, Mapping):
        curves = [
            ablation_curve(trainer, one, drops=drops, crops=crops, seeds=seeds, model_name=f"{_name(trainer)}, {name}")
            for name, one in dataset.items()
        ]
        return pd.concat(curves, ignore_index=True)
    if dataset is None or not seeds:
        missing = "no data: pass a dataset" if dataset is None else "no seeds: pass one or more"
        raise ValueError(f"an ablation curve needs examples and seeds; there are {missing}.")
    plans = _plans(trainer, dataset, drops, crops)
    if not plans:
        raise ValueError(f"there is no ablation to measure: {drops} drops and no crops; ask for 1 drop or more.")
    runs = [(ablation, levels, seed) for ablation, levels in plans.items() for seed in seeds]
    rows = []
    for ablation, levels, seed in tqdm(runs, "ablation curve", disable=trainer.args.disable_tqdm):
        measured = [_evaluated(trainer, dataset, level, levels[-1], seed) for level in levels]
        shares = _violations_of(measured)
        for number, ((metrics, _, _), violated) in enumerate(zip(measured, shares, strict=True)):
            labelled = int((measured[0][2] > 0).any(1).sum())
            row = {"ablation": ablation, "level": number, "seed": seed, "examples": labelled}
            rows.append({**row, "loss": metrics.pop("loss"), "violations": violated, **metrics})
    return pd.DataFrame([{"model": model_name or _name(trainer), **row} for row in rows])


def _plans(trainer: Any, dataset: Any, drops: int | None, crops: int | None) -> dict[str, list[tuple[int, ...]]]:
    """For each kind of ablation its name and the levels that are measured, all other kinds at 0."""
    step = trainer.comparative_step()
    plans = {}
    for number, kind in enumerate(step.kinds):
        trained = step.variants[-1].levels[number]
        if isinstance(kind, CmpDrop):
            name, most = "drops", len(kind.rates) if kind.rates else max(3, trained)
            most = most if drops is None else drops
        elif isinstance(kind, CmpCrop):
            name, most = "crops", _most_segments(dataset) if crops is None else crops
        else:
            name, most = kind.name, trained
        if most:
            plans[name] = [tuple(level * (k == number) for k in range(len(step.kinds))) for level in range(1 + most)]
    return plans


def _evaluated(
    trainer: Any, dataset: Any, level: tuple[int, ...], most: tuple[int, ...], seed: int
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Metrics, losses and weights `(examples, parts)` of the Trainer's own evaluation at a level of ablation."""
    evaluation = trainer.ablated_evaluation(level, most, seed)
    with_metrics = _measures_metrics(trainer)
    output = evaluation.run(dataset, prediction_loss_only=not with_metrics)
    metrics = {
        name.removeprefix("eval_"): float(value)
        for name, value in output.metrics.items()
        if isinstance(value, int | float | np.number) and not name.endswith(_TIMINGS)
    }
    losses, weights = evaluation.losses
    return metrics, losses, weights


def _violations_of(measured: Sequence[tuple[Any, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Share of the labelled examples in violation at each level; an example's loss is the mean of its parts."""
    values = np.stack([losses for _, losses, _ in measured], axis=-1)  # (examples, parts, levels)
    present = measured[0][2] > 0
    labelled = present.any(1)
    if not labelled.any():
        raise ValueError("no example has a label; an ablation curve is made of losses, so it needs them.")
    return violations((values * present[..., None]).sum(1)[labelled] / present.sum(1)[labelled, None])


def violations(losses: np.ndarray) -> np.ndarray:
    """Share of examples that violate the comparison principle at each level: `(examples, levels)` -> `(levels,)`.

    An example violates it at level k when its loss at some level j < k is higher than at k.

    Examples:
        >>> violations(np.array([[0.1, 0.2, 0.3], [0.5, 0.4, 0.6]]))
        array([0. , 0.5, 0. ])
    """
    highest_before = np.maximum.accumulate(losses, axis=1)[:, :-1]  # (examples, levels - 1)
    wrong = highest_before > losses[:, 1:] + _TOLERANCE
    return np.concatenate([np.zeros(1), wrong.mean(0)])


def summarize(curve: pd.DataFrame) -> pd.DataFrame:
    """Mean and spread (standard deviation) over the seeds, a row for each model, ablation and level.

    Columns are pairs (measure, "mean" or "std"); the spread of a single seed is missing (NaN).
    """
    return pd.DataFrame(curve.groupby(KEYS, sort=False)[measures(curve)].agg(["mean", "std"]))


def measures(curve: pd.DataFrame) -> list[str]:
    """The columns that were measured: loss, violations and the metrics."""
    return [column for column in curve.columns if column not in (*KEYS, "seed", "examples")]


def as_text(curve: pd.DataFrame) -> str:
    """The summary as a table to read, `mean ± spread`, with how it was measured on top."""
    summary = summarize(curve)
    table = pd.DataFrame(index=summary.index)
    for measure in measures(curve):
        pairs = zip(summary[measure]["mean"], summary[measure]["std"], strict=True)
        table[measure] = [f"{mean:.4f}" + ("" if np.isnan(std) else f" ± {std:.4f}") for mean, std in pairs]
    seeds = [str(seed) for seed in curve["seed"].unique()]
    repeated = f"mean ± standard deviation over the mask seeds {', '.join(seeds)}"
    heading = f"{curve['examples'].max()} examples, {repeated if len(seeds) > 1 else f'mask seed {seeds[0]}'}"
    return f"{heading}\n{table.reset_index().to_string(index=False)}"


def plot_curves(curve: pd.DataFrame, metric: str | None = None, loss_unit: str | None = "nats") -> Figure:
    """Loss, metric and violations by level, a line for each model, bars for the spread over the seeds.

    Lines differ in marker, dash and lightness, so that they can be told apart in grey.

    Args:
        curve: one curve, or several put together with `pandas.concat`.
        metric: which metric is drawn; by default the first.
        loss_unit: what the losses are counted in: nats where they are cross entropies.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the curve has no such metric.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'cmp-trainer[plot]'") from error
    metrics = [name for name in measures(curve) if name not in ("loss", "violations")]
    if metric is not None and metric not in metrics:
        raise ValueError(f"there is no metric {metric!r} in this curve; it has {', '.join(metrics) or 'none'}.")
    shown = ["loss", *([metric or metrics[0]] if metrics else []), "violations"]
    labels = {
        "loss": f"task loss ({loss_unit})" if loss_unit else "task loss",
        "violations": "examples in violation (%)",
    }
    kinds = list(curve["ablation"].unique())
    figure = Figure(figsize=(3.6 * len(shown), 3.1 * len(kinds) + 0.4), dpi=110, layout="constrained")
    grid = figure.subplots(len(kinds), len(shown), squeeze=False)
    summary = summarize(curve)
    for row, kind in zip(grid, kinds, strict=True):
        for axes, measure in zip(row, shown, strict=True):
            for style, model in enumerate(curve["model"].unique()):
                if (model, kind) in summary.index.droplevel("level"):
                    line = summary[measure].loc[model, kind]
                    axes.errorbar(line.index, line["mean"], yerr=line["std"], label=model, **_style(style))
            axes.set_xlabel(_LEVEL_LABELS.get(kind, f"level of {kind} (0: full model)"))
            axes.set_ylabel(labels.get(measure, measure.replace("_", " ")))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            if measure == "violations":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if curve["model"].nunique() > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


_LEVEL_LABELS = {"drops": "cumulative drops k (0: full model)", "crops": "removed segments (0: full input)"}


def _style(number: int) -> dict[str, Any]:
    colours, dashes, markers = ("#111111", "#b2182b", "#e08214", "#92c5de"), ("-", "--", "-.", ":"), "osD^"
    return {
        "color": colours[number % 4],
        "linestyle": dashes[number % 4],
        "marker": markers[number % 4],
        "markersize": 5,
        "capsize": 3,
    }


def _measures_metrics(trainer: Any) -> bool:
    """Whether compute_metrics takes what a single forward gives."""
    if getattr(trainer.args, "predict_with_generate", False) or trainer.args.batch_eval_metrics:
        logger.warning(
            "metrics of generated text and metrics by batch are left out of ablation curves; losses are measured."
        )
        return False
    return trainer.compute_metrics is not None


def _most_segments(dataset: Any) -> int:
    """As many crops as the example with the most segments has, so that in the end every segment is gone."""
    return max(len({int(segment) for segment in row[SEGMENTS]} - {0}) for row in dataset)


def _name(trainer: Any) -> str:
    return str(trainer.args.output_dir).rstrip("/").rpartition("/")[2]

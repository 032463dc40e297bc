"""Ablation curves: what a trained model loses as more and more of it, or of its input, is taken away.

Task loss and metrics of a model are measured at 0, 1, …, K cumulative drops (CmpDrop), at 0, 1, … skipped layers
(CmpSkip), and at 0, 1, … removed segments of the input (CmpCrop) until none is left, each for several seeds. A model
that uses its neurons well starts low and rises slowly; and it violates the comparison principle

    l(0) <= l(1) <= … <= l(K)

for few examples: at level k an example violates it when a less ablated level j < k has a higher loss. (Logs of a
training have a `violation_rate`, which is another measure: the share of pairs of variants in the wrong order.)

A curve is a long pandas table, a row for each model, kind of ablation, level and seed. `summarize` takes means and
spreads, `plot_curves` draws, `curve.to_csv` and `curve.to_json` are pandas' own.

Source: the analyses of dropout power and context size in https://doi.org/10.1145/3652599.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cmp_trainer.ablations.crop import SEGMENTS, CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.protocol import Ablation
from cmp_trainer.ablations.skip import CmpSkip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEYS = ["model", "ablation", "level"]
IN_VIOLATION = "examples_in_violation"
# A loss has to be lower by this much to count: crops that remove nothing may differ in the last bits.
_TOLERANCE = 1e-6
_TIMINGS = ("runtime", "_per_second", "model_preparation_time")


def ablation_curve(
    trainer: Any,
    dataset: Any = None,
    *,
    drops: int | None = None,
    crops: int | None = None,
    skips: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    model_name: str | None = None,
) -> pd.DataFrame:
    """Task loss, metrics and examples in violation of the trainer's model at every level of ablation.

    Loss and metrics are what the trainer's own evaluation reports, run under an ablation; at level 0 they equal those
    of `trainer.evaluate()`. The model is left as an evaluation leaves it, and the random state as it was.

    Args:
        trainer: a CmpTrainer; its model, batches, loss, metrics and ablations are used.
        dataset: what to evaluate on, or a dict of data sets; the trainer's `eval_dataset` by default.
        drops: K, the most cumulative drops; by default 3, or as many as training had where that is more, and none
            where the trainer has only ablations of your own.
        crops: the most crops; by default all segments where the trainer crops (`--cmp_num_crops`), otherwise none.
        skips: the most layers that are skipped; by default as many as in training, and none where it skipped none.
        seeds: one measurement for each mask seed.
        model_name: what the model is called in the table; by default the name of the output folder. Where there are
            several data sets, their names follow it.

    Returns:
        Columns `model`, `ablation` ("drops", "layers", "crops", or the name of an ablation of your own), `level`,
        `seed`, `examples`, `loss`, `examples_in_violation` (share of examples whose loss is higher at a lower level),
        and one for each metric. Level 0 is the full model.

    Raises:
        ValueError: no data, no seeds, no labels, no ablation, or a model in which nothing can be dropped.
    """
    name, dataset = model_name or _folder_name(trainer), trainer.eval_dataset if dataset is None else dataset
    if dataset is None or not seeds:
        missing = "no data: pass a dataset" if dataset is None else "no seeds: pass one or more"
        raise ValueError(f"an ablation curve needs examples and seeds; there are {missing}.")
    named = {f", {key}": (one, f"eval_{key}") for key, one in dataset.items()} if isinstance(dataset, Mapping) else {}
    rows = []
    for suffix, (one, prefix) in (named or {"": (dataset, "eval")}).items():
        kinds = _measured_kinds(trainer, one, drops, crops, skips)
        if not kinds:
            raise ValueError(f"there is no ablation to measure: {drops} drops and no crops; ask for 1 drop or more.")
        rows += [{"model": f"{name}{suffix}", **row} for row in _rows(trainer, one, prefix, kinds, seeds)]
    return pd.DataFrame(rows)


def _measured_kinds(
    trainer: Any, dataset: Any, drops: int | None, crops: int | None, skips: int | None
) -> dict[str, tuple[Ablation, int]]:
    """The kinds of ablation that are measured, crops last, by name; each with the most levels."""
    trained: Counter[Any] = Counter(trainer.ablations if trainer.num_ablations else [])
    kinds = sorted(trained, key=lambda kind: isinstance(kind, CmpCrop))  # otherwise in their order
    if drops is not None or all(isinstance(kind, CmpCrop) for kind in kinds):
        kinds = kinds if _has(CmpDrop, kinds) else [getattr(trainer.args, "cmp_drop", CmpDrop()), *kinds]
    if skips is not None and not _has(CmpSkip, kinds):
        kinds = [*kinds, getattr(trainer.args, "cmp_skip", CmpSkip())]
    if crops is not None and not _has(CmpCrop, kinds):
        kinds = [*kinds, getattr(trainer.args, "cmp_crop", CmpCrop())]
    measured: dict[str, tuple[Ablation, int]] = {}
    for kind in kinds:
        name, most = kind.name, trained[kind]
        if isinstance(kind, CmpDrop):
            most = len(kind.rates) if kind.rates else max(3, most)
            name, most = "drops", most if drops is None else drops
        elif isinstance(kind, CmpSkip):
            trained_with = kind.count(most, trainer.num_layers(dataset)) if skips is None else skips
            name, most = "layers", trained_with
            kind = CmpSkip(tuple(range(1, 1 + most)) or None, kind.order)  # layer by layer
        elif isinstance(kind, CmpCrop):
            name, most = "crops", _most_segments(dataset) if crops is None else crops
        if most:
            measured[name if name not in measured else f"{name} {len(measured) + 1}"] = (kind, most)
    return measured


def _has(kind: type, ablations: Sequence[Ablation]) -> bool:
    return any(isinstance(one, kind) for one in ablations)


def _rows(
    trainer: Any, dataset: Any, prefix: str, kinds: Mapping[str, tuple[Ablation, int]], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The rows of a curve; the full model is measured once."""
    step = trainer.measuring_step([kind for kind, _ in kinds.values()])
    none = (0,) * len(kinds)
    number = 1 + len(seeds) * sum(most for _, most in kinds.values())
    with tqdm(total=number, desc="ablation curve", disable=trainer.args.disable_tqdm) as progress:

        def measure(levels: tuple[int, ...], most: tuple[int, ...], seed: int) -> Measured:
            measured = _measured(trainer.ablated_evaluation(step, levels, most, seed), dataset, prefix)
            progress.update()
            return measured

        full = measure(none, none, 0)
        for place, (name, (_, most)) in enumerate(kinds.items()):
            levels = [tuple(level * (one == place) for one in range(len(kinds))) for level in range(1 + most)]
            for seed in seeds:
                measured = [full, *(measure(level, levels[-1], seed) for level in levels[1:])]
                shares = _in_violation([one.losses for one in measured], full.weights)
                for level, (one, share) in enumerate(zip(measured, shares, strict=True)):
                    row = {"ablation": name, "level": level, "seed": seed, "examples": one.examples}
                    metrics = {key: value for key, value in one.metrics.items() if key != "loss"}
                    yield {**row, "loss": one.metrics["loss"], IN_VIOLATION: share, **metrics}


class Measured(NamedTuple):
    """An evaluation: its metrics, and losses and weights of the examples, `(examples, parts)` each."""

    metrics: dict[str, float]
    losses: np.ndarray
    weights: np.ndarray

    @property
    def examples(self) -> int:
        """How many examples have a label."""
        return int((self.weights > 0).any(1).sum())


def _measured(evaluation: Any, dataset: Any, prefix: str) -> Measured:
    metrics = {
        name.removeprefix(f"{prefix}_"): float(value)
        for name, value in evaluation.run(dataset, prefix).items()
        if isinstance(value, int | float | np.number) and not name.endswith(_TIMINGS)
    }
    return Measured(metrics, *evaluation.losses)


def _in_violation(losses: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Share of the labelled examples in violation at each level; an example's loss is the mean of its parts."""
    values, present = np.stack(losses, axis=-1), weights > 0  # (examples, parts, levels)
    labelled = present.any(1)
    means = (values * present[..., None]).sum(1)[labelled] / present.sum(1)[labelled, None]
    return examples_in_violation(means)


def examples_in_violation(losses: np.ndarray) -> np.ndarray:
    """Share of examples that violate the comparison principle at each level: `(examples, levels)` -> `(levels,)`.

    An example violates it at level k when its loss at some level j < k is higher than at k.

    Examples:
        >>> examples_in_violation(np.array([[0.1, 0.2, 0.3], [0.5, 0.4, 0.6]]))
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
    """The columns that were measured: loss, examples in violation and the metrics."""
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
    """Loss, metric and examples in violation by level, a line for each model, bars for the spread over the seeds.

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
    metrics = [name for name in measures(curve) if name not in ("loss", IN_VIOLATION)]
    if metric is not None and metric not in metrics:
        raise ValueError(f"there is no metric {metric!r} in this curve; it has {', '.join(metrics) or 'none'}.")
    shown = ["loss", *([metric or metrics[0]] if metrics else []), IN_VIOLATION]
    labels = {
        "loss": f"task loss ({loss_unit})" if loss_unit else "task loss",
        IN_VIOLATION: "examples in violation (%)",
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
            if measure == IN_VIOLATION:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(curve["model"].unique()) > 1:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


_LEVEL_LABELS = {
    "drops": "cumulative drops k (0: full model)",
    "layers": "skipped layers (0: full model)",
    "crops": "removed segments (0: full input)",
}


def _style(number: int) -> dict[str, Any]:
    colours, dashes, markers = ("#111111", "#b2182b", "#e08214", "#92c5de"), ("-", "--", "-.", ":"), "osD^"
    return {
        "color": colours[number % 4],
        "linestyle": dashes[number % 4],
        "marker": markers[number % 4],
        "markersize": 5,
        "capsize": 3,
    }


def _most_segments(dataset: Any) -> int:
    """As many crops as the example with the most segments has, so that in the end every segment is gone."""
    return max(len({int(segment) for segment in row[SEGMENTS]} - {0}) for row in dataset)


def _folder_name(trainer: Any) -> str:
    return str(trainer.args.output_dir).rstrip("/").rpartition("/")[2]

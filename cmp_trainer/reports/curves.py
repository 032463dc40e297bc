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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from cmp_trainer.ablations.crop import SEGMENTS
from cmp_trainer.ablations.drop import CmpDrop, DropoutSchedule, DropoutSites, dropout_awake
from cmp_trainer.ablations.plan import Variant
from cmp_trainer.checks import check_dropout_sites
from cmp_trainer.execution.random_state import RandomState, untouched_randomness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

KEYS = ["model", "ablation", "level"]
# A loss has to be lower by this much to count: crops that remove nothing may differ in the last bits.
_TOLERANCE = 1e-6


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
        Columns `model`, `ablation` ("drops" or "crops"), `level`, `seed`, `examples`, `loss`, `violations` (share of
        examples whose loss is higher at a lower level), and one for each metric. Level 0 is the full model.

    Raises:
        ValueError: no data, no seeds, no labels, no ablation, or a model in which nothing can be dropped.
    """
    dataset = trainer.eval_dataset if dataset is None else dataset
    if dataset is None or not seeds:
        missing = "no data: pass a dataset" if dataset is None else "no seeds: pass one or more"
        raise ValueError(f"an ablation curve needs examples and seeds; there are {missing}.")
    plans = {"drops": [Variant(level, 0) for level in range(1 + _most_drops(trainer, drops))]}
    plans["crops"] = [Variant(0, level) for level in range(1 + _most_crops(trainer, dataset, crops))]
    if all(len(plan) < 2 for plan in plans.values()):
        raise ValueError(f"there is no ablation to measure: {drops} drops and no crops; ask for 1 drop or more.")
    compute_metrics = _metrics_function(trainer)
    runs = {
        (ablation, seed): [_Level(compute_metrics is not None) for _ in plan]
        for ablation, plan in plans.items()
        for seed in seeds
        if len(plan) > 1
    }
    with _dropout_awake_in_evaluation(trainer):
        batches = trainer.get_eval_dataloader(dataset)
        for index, inputs in enumerate(tqdm(batches, "ablation curve", disable=trainer.args.disable_tqdm)):
            inputs = trainer._prepare_inputs(inputs)
            if index == 0 and ("drops", seeds[0]) in runs:
                _check_sites(trainer, inputs)
            for (ablation, seed), levels in runs.items():
                torch.manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))
                for level, measured in zip(levels, _forwards(trainer, inputs, plans[ablation]), strict=True):
                    level.add(*measured)
    rows = [
        {"ablation": ablation, "level": number, "seed": seed, **row}
        for (ablation, seed), levels in runs.items()
        for number, row in enumerate(_rows(levels, compute_metrics))
    ]
    name = model_name or str(trainer.args.output_dir).rstrip("/").rpartition("/")[2]
    return pd.DataFrame([{"model": name, **row} for row in rows])


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
            axes.set_xlabel(_LEVEL_LABELS[kind])
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


class _Level:
    """What is measured at one level for one seed, collected over the batches."""

    def __init__(self, keep_predictions: bool) -> None:
        self.losses, self.weights = EvalLoopContainer(), EvalLoopContainer()  # (examples, parts) each
        self.predictions, self.labels = EvalLoopContainer(), EvalLoopContainer()
        self.keep_predictions = keep_predictions

    def add(self, losses: Tensor, weights: Tensor, predictions: Any, labels: Any) -> None:
        self.losses.add(losses.float().cpu())
        self.weights.add(weights.float().cpu())
        if self.keep_predictions:
            self.predictions.add(predictions)
            self.labels.add(labels)
            self.predictions.to_cpu_and_numpy()
            self.labels.to_cpu_and_numpy()


def _rows(levels: list[_Level], compute_metrics: Callable | None) -> Iterator[dict[str, float]]:
    """Loss, violations and metrics of each level of one run."""
    values = np.stack(
        [np.asarray(level.losses.get_arrays()) for level in levels], axis=-1
    )  # (examples, parts, levels)
    weights = np.asarray(levels[0].weights.get_arrays())  # (examples, parts)
    present = weights > 0
    labelled = present.any(1)
    if not labelled.any():
        raise ValueError("no example has a label; an ablation curve is made of losses, so it needs them.")
    means = ((values * weights[..., None]).sum(0) / weights.sum(0).clip(min=1)[:, None]).mean(0)  # (levels,)
    of_examples = (values * present[..., None]).sum(1)[labelled] / present.sum(1)[labelled, None]
    for level, loss, violated in zip(levels, means, violations(of_examples), strict=True):
        row = {"examples": int(labelled.sum()), "loss": float(loss), "violations": float(violated)}
        if compute_metrics is not None:
            predictions: Any = level.predictions.get_arrays()
            labels: Any = level.labels.get_arrays()
            prediction = EvalPrediction(predictions, labels)
            numbers = {k: v for k, v in compute_metrics(prediction).items() if isinstance(v, int | float | np.number)}
            row |= {name.removeprefix("eval_"): float(value) for name, value in numbers.items()}
        yield row


@contextmanager
def _dropout_awake_in_evaluation(trainer: Any) -> Iterator[None]:
    """An evaluation in which dropout drops; the random state afterwards is the one before."""
    model = trainer.model.eval()
    with torch.no_grad(), untouched_randomness(_devices(trainer)), dropout_awake(model):
        yield


def _forwards(trainer: Any, inputs: Mapping[str, Any], plan: Sequence[Variant]) -> Iterator[tuple[Any, ...]]:
    """(losses, weights, predictions, labels) of every variant, gathered over the processes."""
    batches = trainer._crop(inputs, num_crops=plan[-1].crops)
    start = RandomState.capture(_devices(trainer))
    for variant in plan:
        start.restore()
        batch = batches[variant.crops]
        with CmpDrop(variant.drops, _schedule(trainer)), trainer.compute_loss_context_manager():
            outputs = trainer.model(**trainer._model_inputs(batch))
        losses = trainer._task_losses(outputs, batch)
        labels = _single(tuple(batch[name] for name in trainer.label_names if name in batch))
        predictions = _predictions(trainer, outputs)
        pad = trainer.accelerator.pad_across_processes
        predictions, labels = pad(predictions, dim=1, pad_index=-100), pad(labels, dim=1, pad_index=-100)
        if trainer.preprocess_logits_for_metrics is not None:
            predictions = trainer.preprocess_logits_for_metrics(predictions, labels)
        yield trainer.accelerator.gather_for_metrics((losses.values, losses.weights, predictions, labels))


def _predictions(trainer: Any, outputs: Any) -> Any:
    """The model's outputs in the form that the Trainer hands to compute_metrics."""
    if not isinstance(outputs, Mapping):
        return _single(tuple(outputs))
    ignored = getattr(getattr(trainer.model, "config", None), "keys_to_ignore_at_inference", ["past_key_values"])
    return _single(tuple(value for name, value in outputs.items() if name not in (*ignored, "loss")))


def _single(values: tuple) -> Any:
    return values[0] if len(values) == 1 else values


def _metrics_function(trainer: Any) -> Callable | None:
    """compute_metrics, where it takes what a single forward gives."""
    if getattr(trainer.args, "predict_with_generate", False) or trainer.args.batch_eval_metrics:
        logger.warning(
            "metrics of generated text and metrics by batch are left out of ablation curves; losses are measured."
        )
        return None
    return trainer.compute_metrics


def _check_sites(trainer: Any, inputs: Mapping[str, Any]) -> None:
    with DropoutSites(0) as sites:
        trainer.model(**trainer._model_inputs(trainer._crop(inputs, num_crops=0)[0]))
    check_dropout_sites(sites.sites, _schedule(trainer), trainer._bare_model)


def _most_drops(trainer: Any, drops: int | None) -> int:
    rates = _schedule(trainer).rates
    if drops is None:
        return len(rates) if rates else max(3, trainer.variants[-1].drops)
    return drops


def _most_crops(trainer: Any, dataset: Any, crops: int | None) -> int:
    """As many crops as the example with the most segments has, so that in the end every segment is gone."""
    if crops is not None or not trainer.variants[-1].crops:
        return crops or 0
    return max(len({int(segment) for segment in row[SEGMENTS]} - {0}) for row in dataset)


def _schedule(trainer: Any) -> DropoutSchedule:
    return getattr(trainer.args, "cmp_schedule", DropoutSchedule())


def _devices(trainer: Any) -> set[torch.device]:
    return {parameter.device for parameter in trainer.model.parameters()}

"""Watching a run: the losses of the variants where one looks.

Logs carry `loss_full`, `loss_ablated_1`, … and `violation_rate` beside the Trainer's own keys, so every tracker of
`--report_to` has them; TensorBoard groups them as train/… and eval/…. Here are two callbacks for what is left:

- `TrainingPlot` draws them into a picture of the output folder while the run goes on. It draws at most every
  `min_seconds`, so it can stay on.
- `VariantsInProgressBar`, which every CmpTrainer has, shows the latest values behind the progress bar.
"""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cmp_trainer.saving.files import warned_where_unwritable, written_whole

_DASHES = ("-", "--", "-.", ":")


class TrainingPlot(TrainerCallback):
    """Draws task losses of the variants, violation rate and evaluation loss by step: `callbacks=[TrainingPlot()]`.

    Args:
        file: the picture; by default training_plot.png in the output folder.
        min_seconds: a log redraws the picture when the last drawing is at least so many seconds old; the end of
            training always does.
        loss_unit: what losses are counted in, nats where they are cross entropies; those of a regression have none.

    Raises:
        ImportError: matplotlib is missing.
    """

    def __init__(
        self, file: str | Path | None = None, min_seconds: float = 30.0, loss_unit: str | None = "nats"
    ) -> None:
        if find_spec("matplotlib") is None:
            raise ImportError("TrainingPlot needs matplotlib: pip install 'cmp-trainer[plot]'")
        self.file = file
        self.min_seconds = min_seconds
        self.loss_unit = loss_unit
        self._drawn_at = -min_seconds

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Redraw, unless that was done a moment ago."""
        if time.monotonic() - self._drawn_at >= self.min_seconds:
            self._draw(args, state, kwargs.get("model"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        self._draw(args, state, kwargs.get("model"))

    def _draw(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._drawn_at = time.monotonic()
        file = Path(self.file or Path(str(args.output_dir), "training_plot.png"))
        is_regression = getattr(getattr(model, "config", None), "problem_type", None) == "regression"
        figure = plot_training(state.log_history, None if is_regression else self.loss_unit)
        with warned_where_unwritable(f"the plot {file}"), written_whole(file) as temporary:
            figure.savefig(temporary, format="png")


class VariantsInProgressBar(ProgressCallback):
    """The Trainer's progress bar with the latest loss of each variant and the violation rate behind it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's, then the bar's postfix."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and "loss_full" in (logs or {}):
            shown = [name for name in logs if name.startswith("loss_") or name == "violation_rate"]
            self.training_bar.set_postfix({name.removeprefix("loss_"): f"{logs[name]:.3f}" for name in shown})


def show_variants_in_progress_bar(trainer: Trainer) -> None:
    """Put VariantsInProgressBar in the place of the Trainer's own bar; bars of a notebook or a user stay."""
    if any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(VariantsInProgressBar())


def plot_training(log_history: list[dict[str, Any]], loss_unit: str | None = "nats") -> Any:
    """A matplotlib Figure of a Trainer's log history: losses of the variants, and the share of pairs in violation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    losses, violations = figure.subplots(1, 2)
    variants = [name for name in _names(log_history) if name.startswith("loss_")]
    for number, name in enumerate(variants or ["loss"]):
        grey = 0.65 * number / max(1, len(variants) - 1)
        label = name.removeprefix("loss_").replace("_", " ")
        losses.plot(*_series(log_history, name), color=str(grey), linestyle=_DASHES[number % 4], label=label)
    for axes, name, label in ((losses, "eval_loss", "evaluation"), (violations, "eval_violation_rate", "evaluation")):
        if name in _names(log_history):
            axes.plot(
                *_series(log_history, name), color="#d55e00", marker="o", markersize=4, linestyle="", label=label
            )
    if "violation_rate" in _names(log_history):
        violations.plot(*_series(log_history, "violation_rate"), color="0", label="training")
    loss_label = f"task loss ({loss_unit})" if loss_unit else "task loss"
    for axes, label in ((losses, loss_label), (violations, "pairs in violation (share)")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    violations.set_ylim(0, 1)
    return figure


def _names(log_history: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for log in log_history for name in log))


def _series(log_history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(log["step"], log[name]) for log in log_history if name in log]
    return [step for step, _ in points], [value for _, value in points]

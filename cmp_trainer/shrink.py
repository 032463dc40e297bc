"""`cmp-trainer shrink`: ordinary models with fewer layers of a saved one, and what they cost and lose.

    cmp-trainer shrink runs/mine --layers 4 3 --data validation.jsonl --output runs/small

writes runs/small/4_layers and runs/small/3_layers, each with weights, configuration, tokenizer and a card, and beside
them layers.csv, layers.json and layers.png. Without data the top layers go. With data one layer after the other goes,
each time the one whose absence costs the least loss there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from cmp_trainer.cut import Without, cut
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.execution.boundary import Boundary
from cmp_trainer.execution.layers import Stack, find_stack
from cmp_trainer.saved_model import SavedModel, check_packages
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import plain_errors

_ROUNDS = 5  # of timings
_TIMED_ROWS = 256
_NO_MEASURES = ("runtime", "_per_second", "model_preparation_time", "epoch")  # endings


@plain_errors()
def run_shrink(options: argparse.Namespace) -> None:
    """Cut the model, write the smaller ones, print and write what they cost and lose.

    Raises:
        SystemExit: with one line that says what is wrong with the model, the data or the options.
    """
    _check_options(options)
    transformers_logging.set_verbosity_error()
    saved = SavedModel.load(options.model, for_texts=options.data is not None)
    saved.model.eval()
    with _rows(saved, options) as rows:
        batch = rows.batches[0] if rows.batches else made_up_batch(saved.model)
        stack = find_stack(saved.model, lambda: saved.model(**batch))
        _check_layers(options.layers, stack)
        kept = rows.least_costly(stack, min(options.layers)) if rows.batches else top_removed(len(stack.layers))
        models = {len(stack.layers): saved.model}
        for number in sorted(set(options.layers), reverse=True):
            models[number] = cut(saved.model, stack, kept[number], lambda model: model(**batch))
        table = rows.measured(models, batch)
    for number, model in list(models.items())[1:]:
        _save(model, options.output / f"{number}_layers", saved, stack, kept[number], table, options)
    _report(table, options)


def top_removed(num_layers: int) -> dict[int, list[int]]:
    """By the number of layers, which ones stay: the lowest."""
    return {number: list(range(number)) for number in range(1, num_layers + 1)}


def made_up_batch(model: Any) -> dict[str, Any]:
    """A batch to find the layers and to measure times with, where no data is given.

    Raises:
        ValueError: what the model takes cannot be made up.
    """
    if model.main_input_name == "input_ids":
        config = model.config.get_text_config()
        length = min(64, getattr(config, "max_position_embeddings", 66) - 2)  # RoBERTa counts positions from 2 on
        return {"input_ids": torch.randint(config.vocab_size // 10, config.vocab_size, (8, length))}
    size, channels = (getattr(model.config, name, None) for name in ("image_size", "num_channels"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"pixel_values": torch.randn(8, channels, size, size)}
    raise ValueError(f"the {model.main_input_name} of {type(model).__name__} cannot be made up; give --data")


# --- rows ---


@dataclass
class _Rows:
    """The labelled rows that were given, if any, and a trainer to evaluate on them."""

    trainer: Any = None
    batches: list[dict[str, Any]] = field(default_factory=list)

    def least_costly(self, stack: Stack, fewest: int) -> dict[int, list[int]]:
        """By the number of layers, which ones stay when the one that costs the least loss goes each time."""
        boundary, stay = Boundary(stack), list(range(len(stack.layers)))
        kept = {len(stay): list(stay)}
        total = sum(number - 1 for number in range(fewest + 1, len(stay) + 1))
        with tqdm(total=total, desc="choosing layers") as progress:
            while len(stay) > fewest:
                losses = {}
                for layer in stay[1:]:
                    without = set(range(len(stack.layers))) - {*stay} | {layer}
                    with Ablated([Without(without)], [1], boundary=boundary):
                        losses[layer] = self.evaluated()["loss"]
                    progress.update()
                stay.remove(min(losses, key=lambda layer: losses[layer]))
                kept[len(stay)] = list(stay)
        return kept

    def evaluated(self, model: nn.Module | None = None) -> dict[str, float]:
        """Loss and metrics, of another model where one is given."""
        if model is not None:
            self.trainer.model = model
        with torch.no_grad():
            found = self.trainer.evaluate()
        values = {name.removeprefix("eval_"): value for name, value in found.items()}
        if "loss" not in values:
            raise ValueError("the rows have no labels, so no loss can be measured on them")
        return {name: value for name, value in values.items() if not name.endswith(_NO_MEASURES)}

    def measured(self, models: Mapping[int, Any], batch: Mapping[str, Any]) -> pd.DataFrame:
        """A row for each model: its size and time, loss and metrics."""
        batches = self.batches or [batch]
        times = seconds(list(models.values()), batches)
        rows = []
        for (number, model), one in zip(models.items(), times, strict=True):
            parameters = sum(parameter.numel() for parameter in model.parameters())
            row = {"layers": number, "million_parameters": parameters / 1e6, "seconds_per_1000_rows": one}
            rows.append({**row, **(self.evaluated(model) if self.batches else {})})
        return pd.DataFrame(rows)


@contextmanager
def _rows(saved: SavedModel, options: argparse.Namespace) -> Iterator[_Rows]:
    if options.data is None:
        yield _Rows()
        return
    data = saved.read(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = saved.trainer(data, folder, options.batch_size, disable_tqdm=True)
        batches, timed = [], 0
        for batch in trainer.get_eval_dataloader():
            batches.append(trainer._prepare_inputs(batch))
            timed += len(next(iter(batch.values())))
            if timed >= _TIMED_ROWS:
                break
        trainer.remove_callback(PrinterCallback)  # would print every evaluation that is chosen from
        yield _Rows(trainer, batches)


def seconds(models: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds per 1,000 rows of each model, the median of rounds in which the models take turns."""
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    found: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for number in tqdm(range(1 + _ROUNDS), desc="measuring times"):
            for times, model in zip(found, models, strict=True):
                begin = time.perf_counter()
                for batch in batches:
                    model(**batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    times.append((time.perf_counter() - begin) * 1000 / rows)
    return [statistics.median(times) for times in found]


# --- what is written ---


def _save(
    model: Any,
    folder: Path,
    saved: SavedModel,
    stack: Stack,
    kept: Sequence[int],
    table: pd.DataFrame,
    options: argparse.Namespace,
) -> None:
    model.save_pretrained(folder)
    if saved.processor is not None:
        saved.processor.save_pretrained(folder)
    with written_whole(folder / "README.md") as file:
        card(model, saved, stack, kept, table, options.data).save(file)


def card(
    model: Any, saved: SavedModel, stack: Stack, kept: Sequence[int], table: pd.DataFrame, data: str | None
) -> ModelCard:
    """The card of a cut model: what it was cut from, which layers it has, what it costs and loses."""
    name = Path(saved.path).name
    gone = [str(number) for number in range(len(stack.layers)) if number not in kept]
    chosen = (
        f"The layers that went are those whose absence cost the least loss on {Path(data).name}, one after the other. "
        "Loss and metrics below were measured on the same rows, so they flatter the smaller models."
        if data is not None
        else "The top layers went."
    )
    metadata = ModelCardData(library_name="transformers", tags=["cmp-trainer", "fewer-layers"])
    text = f"""---
{metadata.to_yaml()}
---

# {name}, {len(kept)} of {len(stack.layers)} layers

A {type(model).__name__} that was cut from {name} by `cmp-trainer shrink`. It has the layers
{", ".join(map(str, kept))} of `{stack.name}`, counted from 0; {", ".join(gone)} went, and nothing was trained
afterwards. {chosen} It loads as any model of Transformers.

{as_markdown(table)}
"""
    return ModelCard(text)


def as_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [[_heading(name) for name in table.columns], ["---"] * len(table.columns)]
    rows += [[_number(value) for value in row] for row in table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_layers(table: pd.DataFrame, metric: str | None = None) -> Any:
    """Size, time, loss and a metric against the number of layers, a panel each."""
    from matplotlib.figure import Figure

    metrics = [name for name in table.columns[4:] if name != "loss"]
    shown = [*table.columns[1:4], *([metric or metrics[0]] if metrics else [])]
    figure = Figure(figsize=(3.1 * len(shown), 3), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(table["layers"], table[name], color="#111111", marker="o", markersize=5)
        axes.set_xlabel("layers")
        axes.set_ylabel(_heading(name))
        axes.set_xticks(table["layers"])
        if name in ("million_parameters", "seconds_per_1000_rows"):
            axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _report(table: pd.DataFrame, options: argparse.Namespace) -> None:
    shown = table.rename(columns=_heading).to_string(index=False, float_format=lambda value: f"{value:.4g}")
    print(shown)
    if options.data is not None:
        print(f"layers were chosen by their loss on {options.data}, where loss and metrics were measured too")
    files = [options.output / f"layers{suffix}" for suffix in (".csv", ".json", ".png")]
    with written_whole(files[0]) as file:
        table.to_csv(file, index=False)
    with written_whole(files[1]) as file:
        table.to_json(file, orient="records", indent=1, double_precision=15)
    with written_whole(files[2]) as file:
        plot_layers(table, options.metric).savefig(file)
    folders = [f"{number}_layers" for number in table["layers"][1:]]
    print(f"written to {options.output}: {', '.join([*folders, *(file.name for file in files)])}")


def _heading(name: str) -> str:
    return {"million_parameters": "parameters (M)", "seconds_per_1000_rows": "s / 1,000 rows"}.get(
        name, name.replace("_", " ")
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


# --- bad input ---


def _check_options(options: argparse.Namespace) -> None:
    for name in ("max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 1 or more")
    for number in options.layers:
        folder = options.output / f"{number}_layers"
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--output {options.output}: {folder.name} is there already; give another folder")
    check_packages("cmp-trainer shrink")


def _check_layers(numbers: Sequence[int], stack: Stack) -> None:
    most = len(stack.layers) - 1
    wrong = [str(number) for number in numbers if not 1 <= number <= most]
    if wrong:
        raise ValueError(
            f"--layers {' '.join(wrong)}: the model has {most + 1} layers ({stack.name}); give 1 to {most}"
        )
    if any(carry is None for carry in stack.carries[1:]):
        raise ValueError(
            f"layers of {stack.name} cannot be taken out: they change the shape of what they are given, or are spread "
            "over several lists"
        )

"""`cmp-trainer shrink`: copies of a saved model with fewer layers, with their size, speed, loss and metrics.

    cmp-trainer shrink runs/mine --layers 4 3 --data validation.jsonl --output runs/small

writes runs/small/4_layers and runs/small/3_layers, each with weights, configuration, tokenizer and a card, and beside
them layers.csv, layers.json and layers.png. With data, layers are removed greedily, at each step the one whose removal
gives the lowest loss there; without data, or with `--order top`, the top ones are removed.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from tqdm.auto import tqdm
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from yaml import YAMLError

from cmp_trainer.cut import cut
from cmp_trainer.errors import first_line
from cmp_trainer.execution.ablated import without_layers
from cmp_trainer.execution.layers import Stack, find_stack
from cmp_trainer.saved_model import SavedModel, check_packages
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import plain_errors

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any], dict[str, float]]
"""From a model to its loss and metrics."""

_ROUNDS = 5  # of timings
_TIMED_ROWS = 256
_KEPT = ("license", "license_name", "license_link", "language", "base_model", "datasets", "pipeline_tag")
_NO_MEASURES = ("runtime", "_per_second", "model_preparation_time", "epoch")  # endings


@plain_errors()
def run_shrink(options: argparse.Namespace) -> None:
    """Write the smaller models, and print and write what they cost and lose.

    Raises:
        SystemExit: with one line that says what is wrong with the model, the data or the options.
    """
    _check_options(options)
    transformers_logging.set_verbosity_error()
    saved = SavedModel.load(options.model, for_texts=options.data is not None)
    metadata = kept_from_card(saved.path)
    model = saved.model.eval()
    with _evaluation(saved, options) as (evaluate, batches):
        stack = find_stack(model, lambda: model(**batches[0]))
        _check_layers(options.layers, stack)
        if evaluate is not None and options.order != "top":
            layers_of = choose_layers(model, stack, min(options.layers), evaluate)
        else:
            layers_of = bottom_layers(len(stack.layers))
        smaller = {
            number: cut(model, stack, layers_of[number], lambda one: one(**batches[0]))
            for number in sorted(set(options.layers), reverse=True)
        }
        table = measure({len(stack.layers): model, **smaller}, batches, evaluate)
    for number, one in smaller.items():
        with _whole_folder(options.output / f"{number}_layers") as folder:
            one.save_pretrained(folder)
            if saved.processor is not None:
                saved.processor.save_pretrained(folder)
            card(one, saved, metadata, stack, layers_of[number], table, options).save(folder / "README.md")
    _report(table, options)


def bottom_layers(num_layers: int) -> dict[int, list[int]]:
    """`{n: [0, …, n - 1]}` for every n."""
    return {number: list(range(number)) for number in range(1, num_layers + 1)}


def choose_layers(model: Any, stack: Stack, fewest: int, evaluate: Evaluate) -> dict[int, list[int]]:
    """The layers that stay, by their number, when the one whose removal gives the lowest loss goes each time.

    Args:
        fewest: the number of layers to stop at. The first layer always stays.
    """
    every, stay = set(range(len(stack.layers))), list(range(len(stack.layers)))
    chosen = {len(stay): list(stay)}
    total = sum(number - 1 for number in range(fewest + 1, len(stay) + 1))
    with tqdm(total=total, desc="choosing layers") as progress:
        while len(stay) > fewest:
            losses: dict[int, float] = {}
            for candidate in stay[1:]:
                with without_layers(stack, every - {*stay} | {candidate}):
                    losses[candidate] = evaluate(model)["loss"]
                if not math.isfinite(losses[candidate]):
                    raise ValueError(
                        f"the loss without layer {candidate} is {losses[candidate]}; nothing to choose by"
                    )
                progress.update()
            stay.remove(min(losses, key=lambda layer: losses[layer]))
            chosen[len(stay)] = list(stay)
    return chosen


def measure(
    models: Mapping[int, Any], batches: Sequence[Mapping[str, Any]], evaluate: Evaluate | None
) -> pd.DataFrame:
    """A row for each model, by its number of layers: its size and time; loss and metrics where there is `evaluate`."""
    rows, times = [], seconds_per_1000_rows(list(models.values()), batches)
    for (number, model), seconds in zip(models.items(), times, strict=True):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        row = {"layers": number, "million_parameters": parameters / 1e6, "seconds_per_1000_rows": seconds}
        rows.append({**row, **(evaluate(model) if evaluate is not None else {})})
    return pd.DataFrame(rows)


def seconds_per_1000_rows(models: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """Of each model, the median of rounds in which the models take turns."""
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for number in tqdm(range(1 + _ROUNDS), desc="measuring times"):
            for of_model, model in zip(times, models, strict=True):
                begin = time.perf_counter()
                for batch in batches:
                    model(**batch)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    of_model.append((time.perf_counter() - begin) * 1000 / rows)
    return [statistics.median(of_model) for of_model in times]


# --- rows ---


@contextmanager
def _evaluation(
    saved: SavedModel, options: argparse.Namespace
) -> Iterator[tuple[Evaluate | None, list[dict[str, Any]]]]:
    """A function that evaluates a model on the rows that were given, and the first batches of them; without rows, no
    function and a made-up batch."""
    if options.data is None:
        batch = made_up_batch(saved.model)
        try:
            with torch.no_grad():
                saved.model(**batch)
        except Exception as error:  # whatever the model misses in it
            name = type(saved.model).__name__
            raise ValueError(f"{name} cannot be run on a made-up batch ({first_line(error)}); give --data") from error
        yield None, [batch]
        return
    data = saved.read(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = saved.trainer(data, folder, options.batch_size, disable_tqdm=True)
        trainer.remove_callback(PrinterCallback)  # would print every evaluation
        batches, rows = [], 0
        for batch in trainer.get_eval_dataloader():
            batches.append(trainer._prepare_inputs(batch))
            rows += len(next(iter(batch.values())))
            if rows >= _TIMED_ROWS:
                break

        def evaluate(model: Any) -> dict[str, float]:
            trainer.model = model
            values = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
            if "loss" not in values:
                raise ValueError(f"--data {options.data}: the rows have no labels, so no loss can be measured")
            return {name: value for name, value in values.items() if not name.endswith(_NO_MEASURES)}

        yield evaluate, batches


def made_up_batch(model: Any) -> dict[str, Any]:
    """A batch to find the layers and to measure times with, where no data is given.

    Raises:
        ValueError: what the model takes cannot be made up.
    """
    if model.main_input_name == "input_ids":
        config = model.config.get_text_config()
        length = min(64, getattr(config, "max_position_embeddings", 66) - 2)  # RoBERTa counts positions from 2 on
        ids = torch.randint(config.vocab_size // 10, config.vocab_size, (8, length), device=model.device)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    size, channels = (getattr(model.config, name, None) for name in ("image_size", "num_channels"))
    if model.main_input_name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"pixel_values": torch.randn(8, channels, size, size, device=model.device, dtype=model.dtype)}
    raise ValueError(f"the {model.main_input_name} of {type(model).__name__} cannot be made up; give --data")


# --- what is written ---


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` at the end, and is removed if the body raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="_") as temporary:
        inside = Path(temporary, folder.name)
        inside.mkdir()
        yield inside
        inside.replace(folder)


def card(
    model: Any,
    saved: SavedModel,
    metadata: Mapping[str, Any],
    stack: Stack,
    kept: Sequence[int],
    table: pd.DataFrame,
    options: argparse.Namespace,
) -> ModelCard:
    """The card of a smaller model: what it was cut from, which layers it has, what it costs and loses."""
    name = Path(saved.path).name
    gone = ", ".join(str(number) for number in range(len(stack.layers)) if number not in kept)
    chosen = "The top layers were removed."
    if options.data is not None:
        rows = Path(options.data).name
        if options.order != "top":
            chosen = f"Layers were removed one by one, each time the one whose removal gave the lowest loss on {rows}."
            rows = "the same rows, so they are optimistic for the smaller models"
        chosen += f" Loss and metrics below were measured on {rows}."
    return ModelCard(
        f"""---
{ModelCardData(**metadata, tags=["cmp-trainer", "fewer-layers"]).to_yaml()}
---

# {name}, {len(kept)} of {len(stack.layers)} layers

{name} with fewer layers, cut by `cmp-trainer shrink`: of the {len(stack.layers)} layers of `{stack.name}`, {gone} were
removed (counted from 0). Nothing was trained afterwards. {chosen} It loads like any {type(model).__name__}.

{as_markdown(table)}
"""
    )


def kept_from_card(path: str) -> dict[str, Any]:
    """What the card of a saved model says that holds for a smaller one: license, languages, base model, data sets.

    Args:
        path: its folder, or its name on the Hub, which is then the base model.
    """
    is_folder = Path(path).is_dir()
    try:
        file = Path(path, "README.md") if is_folder else hf_hub_download(path, "README.md")
        found = ModelCard.load(file, ignore_metadata_errors=True).data if Path(file).is_file() else None
        data = {} if found is None else found.to_dict()
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError, YAMLError) as error:
        logger.warning("the card of %s could not be read (%s): its license is not carried over", path, error)
        data = {}
    kept = {name: data[name] for name in _KEPT if name in data}
    return {"library_name": "transformers", **kept, **({} if is_folder else {"base_model": path})}


def as_markdown(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [[_heading(name) for name in table.columns], ["---"] * len(table.columns)]
    rows += [[_text(value) for value in row] for row in table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot_layers(table: pd.DataFrame, metric: str | None = None) -> Any:
    """Size, time, loss and a metric against the number of layers, a panel each."""
    from matplotlib.figure import Figure

    costs = ["million_parameters", "seconds_per_1000_rows"]
    metrics = [name for name in table.columns if name not in ("layers", "loss", *costs)]
    losses = ["loss", *([metric or metrics[0]] if metrics else [])] if "loss" in table else []
    shown = [*costs, *losses]
    figure = Figure(figsize=(3.1 * len(shown), 3), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot(table["layers"], table[name], color="#111111", marker="o", markersize=5)
        axes.set_xlabel("layers")
        axes.set_ylabel(_heading(name))
        axes.set_xticks(table["layers"])
        if name in costs:
            axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _report(table: pd.DataFrame, options: argparse.Namespace) -> None:
    print(table.rename(columns=_heading).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    if options.data is not None and options.order != "top":
        print(f"The layers were chosen by their loss on {options.data}, where loss and metrics were measured too.")
    files = [options.output / f"layers{suffix}" for suffix in (".csv", ".json", ".png")]
    with written_whole(files[0]) as file:
        table.to_csv(file, index=False)
    with written_whole(files[1]) as file:
        table.to_json(file, orient="records", indent=1, double_precision=15)
    with written_whole(files[2]) as file:
        plot_layers(table, options.metric).savefig(file)
    folders = [f"{number}_layers" for number in sorted(set(options.layers), reverse=True)]
    print(f"written to {options.output}: {', '.join([*folders, *(file.name for file in files)])}")


def _heading(name: str) -> str:
    return {"million_parameters": "parameters (M)", "seconds_per_1000_rows": "s / 1,000 rows"}.get(
        name, name.replace("_", " ")
    )


def _text(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


# --- bad input ---


def _check_options(options: argparse.Namespace) -> None:
    for name in ("max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 1 or more")
    for number in options.layers:
        folder = options.output / f"{number}_layers"
        if options.output.is_file() or folder.is_file():
            raise ValueError(f"--output {options.output}: a file is in the way; give a folder")
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--output {options.output}: {folder.name} exists and is not empty; give another folder")
    about_rows = ("task", "columns", "label_separator", "metric", "max_samples")
    given = [f"--{name}" for name in about_rows if getattr(options, name) is not None]
    if options.data is None and given:
        raise ValueError(f"{' '.join(given)}: only used with --data; give it, or leave them out")
    if options.order == "loss" and options.data is None:
        raise ValueError("--order loss needs rows to measure the loss on; give --data")
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
            f"layers of {stack.name} cannot be taken out: they change the shape of what they are given, carry further "
            "states, or are spread over several lists"
        )

"""How checkpoints bear less context and more dropout: exact match and F1, side by side.

    python analyze_hotpotqa.py --checkpoints baseline=out/baseline comparative=out/crop_drop --output_dir analysis

Two curves for each checkpoint: evaluation with 2, 3, … 10 paragraphs, the supporting ones always among them, and with
0, 1, 2, 3 cumulative drops (CmpDrop, as `trainer.evaluate_ablations` measures them). Each point is an evaluation of
run_hotpotqa's trainer. Written are analysis.json, a table (analysis.md) and a plot (analysis.png).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from hotpot_data import ANSWER_COLUMNS, COLUMNS
from hotpot_inputs import EvaluationInputs, collator_of
from tqdm.auto import tqdm
from transformers import PrinterCallback, set_seed

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.scripting import (
    ModelArguments,
    distinct_names,
    load_splits,
    parse_arguments,
    plain_errors,
    take_split,
)

with plain_errors():
    from matplotlib.figure import Figure
    from run_hotpotqa import HotpotArguments, HotpotTrainer, encode, length_of, load

Point = dict[str, Any]
MEASURED = ("loss", "exact_match", "f1", "questions")
METRICS = {"exact_match": "Exact match (%)", "f1": "F1 (%)"}
CURVES = {"paragraphs": "Paragraphs in the input", "drops": "Cumulative drops"}


@dataclass
class AnalysisArguments:
    """What is evaluated."""

    checkpoints: list[str] = field(metadata={"help": "Folders of trained models, or name=folder", "nargs": "+"})
    paragraphs: list[int] = field(
        default_factory=lambda: list(range(2, 11)), metadata={"help": "Numbers of paragraphs", "nargs": "*"}
    )
    drops: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3], metadata={"help": "Numbers of cumulative drops", "nargs": "*"}
    )
    batch_size: int = field(default=8, metadata={"help": "Questions at a time"})
    seed: int = field(default=42, metadata={"help": "Decides what is dropped"})
    output_dir: str = field(default="analysis", metadata={"help": "Folder to write to"})


@plain_errors()
def main(argv: Sequence[str] | None = None) -> None:
    data_args, args = parse_arguments(HotpotArguments, AnalysisArguments, argv=argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    examples = take_split(load_splits(data_args), "validation", COLUMNS + ANSWER_COLUMNS, data_args.max_eval_samples)
    points: list[Point] = []
    for name, folder in named(args.checkpoints):
        points += evaluate(name, folder, examples, data_args, args)
        write(points, Path(args.output_dir))  # after each, so that nothing is lost when the next one fails
    print(table(points))
    print(f"written to {args.output_dir}: analysis.json, analysis.md, analysis.png")


def named(checkpoints: Sequence[str]) -> list[tuple[str, str]]:
    """Name and folder of each checkpoint, which is given as a folder or as name=folder.

    Raises:
        ValueError: two have the same name.

    >>> named(["runs/a/best", "runs/b/best", "first=runs/c"])
    [('a/best', 'runs/a/best'), ('b/best', 'runs/b/best'), ('first', 'runs/c')]
    """
    split = [("", "", one) if Path(one).is_dir() or "=" not in one else one.partition("=") for one in checkpoints]
    unnamed = [folder for name, _, folder in split if not name]
    found = iter(distinct_names(unnamed) if unnamed else [])
    pairs = [(name or next(found), folder) for name, _, folder in split]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--checkpoints: two are called {name}; name them: name=folder")
    return pairs


def evaluate(
    name: str, folder: str, examples: Dataset, data_args: HotpotArguments, args: AnalysisArguments
) -> list[Point]:
    """Exact match and F1 of one checkpoint at each number of paragraphs and of drops."""
    set_seed(args.seed)  # of markers that the model does not have
    tokenizer, model = load(ModelArguments(folder), data_args, ["validation"])
    encoded, builder = encode(examples, "validation", data_args, tokenizer, model)
    most = max(1, *args.drops) if args.drops else 0
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = HotpotTrainer(
            model=model,
            args=CmpTrainingArguments(
                output_dir=output_dir,
                cmp_num_ablations=max(1, most),
                per_device_eval_batch_size=args.batch_size,
                dataloader_pin_memory=torch.cuda.is_available(),
                report_to=[],
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            data_collator=collator_of(tokenizer, model, length_of("validation", data_args)[1]),
            max_answer_length=data_args.max_answer_length,
        )
        trainer.remove_callback(PrinterCallback)
        points = []
        for number in tqdm(args.paragraphs, desc=f"{name}, paragraphs"):
            metrics = trainer.evaluate(EvaluationInputs(encoded, builder, number))
            scores = {metric: metrics[f"eval_{metric}"] for metric in MEASURED}
            points.append({"checkpoint": name, "curve": "paragraphs", "at": number, **scores})
        if args.drops:
            inputs = EvaluationInputs(encoded, builder, data_args.num_paragraphs)
            curve: Any = trainer.evaluate_ablations(inputs, drops=most, seeds=[args.seed])
            for row in curve[curve["level"].isin(args.drops)].to_dict(orient="records"):  # pyright: ignore[reportCallIssue]
                scores = {metric: row[metric] for metric in MEASURED}
                points.append({"checkpoint": name, "curve": "drops", "at": row["level"], **scores})
    return points


def write(points: list[Point], folder: Path) -> None:
    """analysis.json, analysis.md and analysis.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    (folder / "analysis.md").write_text(table(points), encoding="utf-8")
    plot(points).savefig(folder / "analysis.png", dpi=150)


def table(points: list[Point]) -> str:
    """For each curve a Markdown table, checkpoints side by side, cells exact match / F1."""
    names = list(dict.fromkeys(point["checkpoint"] for point in points))
    lines = []
    for curve, title in CURVES.items():
        rows = {point["at"]: {} for point in points if point["curve"] == curve}
        for point in points:
            if point["curve"] == curve:
                rows[point["at"]][point["checkpoint"]] = f"{point['exact_match']:.1f} / {point['f1']:.1f}"
        if rows:
            lines += [f"| {title} | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
            lines += [f"| {at} | {' | '.join(cells[name] for name in names)} |" for at, cells in rows.items()] + [""]
    number = int(points[0]["questions"]) if points else 0
    return "\n".join([*lines, f"Exact match / F1 in percent, {number} questions.", ""])


def plot(points: list[Point]) -> Figure:
    """One panel for each curve and metric, one line for each checkpoint."""
    curves = [curve for curve in CURVES if any(point["curve"] == curve for point in points)]
    figure = Figure(figsize=(4.5 * len(curves), 6))
    axes = figure.subplots(len(METRICS), len(curves), sharex="col", sharey="row", squeeze=False)
    for row, (metric, label) in enumerate(METRICS.items()):
        axes[row, 0].set_ylabel(label)
        for axis, curve in zip(axes[row], curves, strict=True):
            for name, marker in zip(
                dict.fromkeys(point["checkpoint"] for point in points), cycle("osD^vPX*"), strict=False
            ):
                own = [point for point in points if point["curve"] == curve and point["checkpoint"] == name]
                xs, ys = [point["at"] for point in own], [point[metric] for point in own]
                axis.plot(xs, ys, marker=marker, markersize=4, alpha=0.8, label=name)
                axis.set_xticks(xs)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if row == len(METRICS) - 1:
                axis.set_xlabel(CURVES[curve])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


if __name__ == "__main__":
    main()

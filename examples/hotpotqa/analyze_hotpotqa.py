"""How checkpoints bear less context and more dropout: exact match and F1, side by side.

    python analyze_hotpotqa.py --checkpoints baseline=out/baseline comparative=out/crop_drop --output_dir analysis

Two curves for each checkpoint: evaluation with 2, 3, … 10 paragraphs, the supporting ones always among them, and with
0, 1, 2, 3 cumulative drops (CmpDrop; the same random numbers for each, so that what is dropped once stays dropped).
Written are analysis.json, a table (analysis.md) and a plot (analysis.png).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hotpot_data import ANSWER_COLUMNS, COLUMNS, add_markers
from hotpot_inputs import EvaluationInputs, padding_multiple
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase

from cmp_trainer.ablations.crop_collator import CmpCropCollator
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.checks import train_mode_except_batch_norm
from cmp_trainer.execution.ablated import Ablated
from cmp_trainer.scripting import (
    ModelArguments,
    load_pretrained,
    load_splits,
    parse_arguments,
    plain_errors,
    take_split,
)

with plain_errors():
    from hotpot_answers import read_answers, score_answers
    from matplotlib.figure import Figure
    from run_hotpotqa import HotpotArguments, encode

Point = dict[str, Any]
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
    for checkpoint in args.checkpoints:
        name, _, folder = checkpoint.rpartition("=")
        points += evaluate(name or Path(folder).name, folder, examples, data_args, args)
        write(points, Path(args.output_dir))  # after each, so that nothing is lost when the next one fails
    print(table(points))
    print(f"written to {args.output_dir}: analysis.json, analysis.md, analysis.png")


def evaluate(
    name: str, folder: str, examples: Dataset, data_args: HotpotArguments, args: AnalysisArguments
) -> list[Point]:
    """Exact match and F1 of one checkpoint at each number of paragraphs and of drops."""
    model_args = ModelArguments(folder)
    tokenizer = load_pretrained(AutoTokenizer, folder, model_args)
    tokenizer.padding_side = "right"
    model = load_pretrained(AutoModelForQuestionAnswering, folder, model_args).eval()
    add_markers(tokenizer, model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoded, builder = encode(examples, "validation", data_args, tokenizer, model)

    asked = [("paragraphs", number, number, 0) for number in args.paragraphs]
    asked += [("drops", drops, data_args.num_paragraphs, drops) for drops in args.drops]
    points = []
    for curve, at, num_paragraphs, drops in tqdm(asked, desc=name):
        inputs = EvaluationInputs(encoded, builder, num_paragraphs)
        logits = predict(model, tokenizer, inputs, drops, args)
        scores = score_answers(read_answers(inputs, *logits, data_args.max_answer_length), encoded)
        points.append({"checkpoint": name, "curve": curve, "at": at, **scores})
    return points


def predict(
    model: Any, tokenizer: PreTrainedTokenizerBase, inputs: EvaluationInputs, drops: int, args: AnalysisArguments
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits, (questions, length) each, after that many drops."""
    collator = CmpCropCollator(tokenizer, pad_to_multiple_of=padding_multiple(model))
    loader = DataLoader(inputs, args.batch_size, collate_fn=collator)
    starts, ends = [], []
    for batch in tqdm(loader, desc=f"{drops} drops", leave=False):
        not_for_model = ("crop_segments", "start_positions", "end_positions")
        torch.manual_seed(args.seed)
        batch = {column: value.to(model.device) for column, value in batch.items() if column not in not_for_model}
        with torch.no_grad(), train_mode_except_batch_norm(model), Ablated([CmpDrop()], [drops]):
            outputs = model(**batch)
        starts += outputs.start_logits.float().cpu().unbind()
        ends += outputs.end_logits.float().cpu().unbind()
    return pad_sequence(starts, True, -torch.inf).numpy(), pad_sequence(ends, True, -torch.inf).numpy()


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
    number = points[0]["questions"] if points else 0
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

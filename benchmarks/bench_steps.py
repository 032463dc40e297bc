"""Step times and memory of comparative loss against what one would run instead; writes docs/performance.csv and .png.

    make bench                                               # everything: about 25 minutes on two idle cores
    python benchmarks/bench_steps.py --sizes 4x64            # some of it

A round runs a step (forward and backward) of each contender in random order, so that a noisy machine slows all of
them alike; ratios are taken within a round and their median and quartiles reported. What the CSV has already is not
run again. The table goes into docs/performance.md, between its two marks.
"""

import argparse
import ctypes
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
from contenders import Step, comparative, plain, published_scheme, r_drop
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
BERTS = {"BERT 6 x 384": (6, 384), "BERT 12 x 256": (12, 256)}
LONGFORMER = "Longformer 4 x 256"
SIZES = {"BERT 6 x 384": ("16x64", "4x64", "16x128"), "BERT 12 x 256": ("16x64",), LONGFORMER: ("2x2048",)}
ABLATIONS, LAYERS = (1, 2, 4), (1, 2, 3)


def variants(num_ablations: int, layers: int | None = None, **changes: Any) -> Callable[[Any], Step]:
    """A step with so many ablations of the top layers, or of all."""
    settings: dict[str, Any] = {"cmp_forward": "sequential", **changes}
    return lambda model: comparative(model, cmp_num_ablations=num_ablations, cmp_ablated_layers=layers, **settings)


# contender -> how its step is made, and whom it is measured against
DROPS: dict[str, tuple[Callable[[Any], Step], str]] = {
    "plain": (plain, "plain"),
    "c = 0": (lambda model: comparative(model), "plain"),
    "R-Drop": (r_drop, "plain"),
    "published scheme, c = 2": (lambda model: published_scheme(model, 2), "plain"),
    "c = 2": (variants(2), "plain"),
    **{f"c = 2, top {layers}": (variants(2, layers), "plain") for layers in LAYERS},
    "c = 2, stacked": (variants(2, cmp_forward="stacked"), "c = 2"),
    "c = 2, top 2, stacked": (variants(2, 2, cmp_forward="stacked"), "c = 2, top 2"),
    "c = 4, top 2": (variants(4, 2), "plain"),
    "c = 4, top 2, low memory": (variants(4, 2, cmp_forward="auto", cmp_low_memory=True), "c = 4, top 2"),
    "c = 2, low memory": (variants(2, cmp_forward="auto", cmp_low_memory=True), "c = 2"),
}
# At the size of the figure, every number of ablations with every number of layers.
CURVES = {
    f"c = {ablations}" + (f", top {layers}" if layers else ""): (variants(ablations, layers), "plain")
    for ablations in ABLATIONS
    for layers in (None, *LAYERS)
}
FIGURE = ("BERT 6 x 384", "16x64")
CROPS: dict[str, tuple[Callable[[Any], Step], str]] = {
    "plain": (plain, "plain"),
    "1 crop": (variants(1, cmp_num_crops=1, cmp_forward="auto"), "plain"),
    "1 crop + 1 drop": (variants(2, cmp_num_crops=1, cmp_forward="auto"), "plain"),
    "1 crop + 1 drop, top 2": (variants(2, 2, cmp_num_crops=1, cmp_forward="auto"), "plain"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", help="batch x length; by default those of the model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=DOCS / "performance.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = pd.read_csv(args.output) if args.output.is_file() else pd.DataFrame(columns=["model", "size"])
    for name in args.models:
        for size in args.sizes or SIZES[name]:
            if ((results["model"] == name) & (results["size"] == size)).any():
                continue
            rows, length = map(int, size.split("x"))
            measured = measure(name, make_batch(name, rows, length), args.rounds, f"{name}, {size}")
            measured.insert(0, "size", size)
            measured.insert(0, "model", name)
            results = measured if results.empty else pd.concat([results, measured])
            results.to_csv(args.output, index=False)
    plot(results, args.output.with_suffix(".png"))
    print(as_markdown(results))
    if args.output.parent == DOCS:
        insert(as_markdown(results), DOCS / "performance.md", "steps")
        insert(summary(results), DOCS / "performance.md", "summary")


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    if name == LONGFORMER:
        shape: dict[str, Any] = {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
        }
        config = LongformerConfig(**shape, attention_window=256, max_position_embeddings=2050, pad_token_id=1)
        return LongformerForSequenceClassification(config).train()
    layers, width = BERTS[name]
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return BertForSequenceClassification(BertConfig(**shape, intermediate_size=4 * width)).train()


def make_batch(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens; for the Longformer in 15 removable segments after a sixteenth that stays."""
    ids = torch.randint(1000, 30000, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    if name == LONGFORMER:
        segments = torch.arange(length).div(length // 16, rounding_mode="floor")
        batch["crop_segments"] = segments.expand(rows, length).contiguous()
    return batch


def measure(name: str, batch: dict[str, torch.Tensor], rounds: int, title: str) -> pd.DataFrame:
    """Interleaved step times of the contenders: ratios within a round, their quartiles, and memory."""
    model, contenders = make_model(name), CROPS if name == LONGFORMER else DROPS
    if title == ", ".join(FIGURE):
        contenders = contenders | CURVES
    steps = {contender: make_step(model) for contender, (make_step, _) in contenders.items()}
    memory = {contender: memory_megabytes(step, model, batch) for contender, step in steps.items()}  # warms up, too
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    order, draw = list(steps), random.Random(0)
    for _ in tqdm(range(rounds), desc=title):
        draw.shuffle(order)
        for contender in order:
            start = time.perf_counter()
            steps[contender](batch).backward()
            seconds[contender].append(time.perf_counter() - start)
            model.zero_grad()
    measured = []
    for contender, (_, against) in contenders.items():
        ratios = [one / other for one, other in zip(seconds[contender], seconds[against], strict=True)]
        low, median, high = statistics.quantiles(ratios)
        of_r_drop = zip(seconds[contender], seconds["R-Drop"], strict=True) if "R-Drop" in seconds else ()
        r_drop_ratios = [one / other for one, other in of_r_drop]
        step_time = statistics.median(seconds[contender])
        measured.append(
            {
                "contender": contender,
                "against": against,
                "rounds": rounds,
                "seconds": round(step_time, 4),
                "low": round(low, 3),
                "median": round(median, 3),
                "high": round(high, 3),
                "of_r_drop": round(statistics.median(r_drop_ratios), 3) if r_drop_ratios else None,
                **memory[contender],
            }
        )
    return pd.DataFrame(measured)


def memory_megabytes(step: Step, model: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a step takes: the most that autograd held for backward at one time, and the most that the process took
    above what it had before, gradients included (Linux only)."""
    step(batch).backward()  # the checks of the first step are not part of it
    model.zero_grad()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = process_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    activations = activation_megabytes(step, model, batch)
    peak = process_status("VmHWM")
    return {"activations_mb": round(activations, 1), "peak_mb": round(peak - before, 1)}


def process_status(name: str) -> float:
    """An entry of /proc/self/status in megabytes."""
    return int(re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) / 1024


def activation_megabytes(step: Step, model: Any, batch: dict[str, torch.Tensor]) -> float:
    """The most that autograd held for backward at one time, weights left out, in a step."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    now = peak = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal now, peak
            self.tensor, self.storage = tensor, tensor.untyped_storage()
            self.key = self.storage.data_ptr()
            if self.key not in weights:
                held[self.key] = held.get(self.key, 0) + 1
                now += self.storage.nbytes() if held[self.key] == 1 else 0
                peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            if self.key in held:
                held[self.key] -= 1
                if not held[self.key]:
                    del held[self.key]
                    now -= self.storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step(batch).backward()
    model.zero_grad()
    return peak / 2**20


def as_markdown(results: pd.DataFrame) -> str:
    """A table for each model and size."""
    head = "| contender | s / step | against | ratio, median (quartiles) | of R-Drop | activations, MB | peak, MB |"
    lines = []
    for model, size in results[["model", "size"]].drop_duplicates().to_numpy():
        rows: Any = results[(results["model"] == model) & (results["size"] == size)]
        lines += [f"\n**{model}, batch {size.replace('x', ' x ')}** ({rows['rounds'].iloc[0]} rounds)\n", head]
        lines.append("| --- " * 7 + "|")
        for row in rows.to_dict("records"):
            compared = row["contender"] != row["against"]
            ratio = f"{row['median']:.3f} ({row['low']:.3f} – {row['high']:.3f})" if compared else ""
            against = row["against"] if compared else ""
            of_r_drop = "" if pd.isna(row["of_r_drop"]) else f"{row['of_r_drop']:.3f}"
            lines.append(
                f"| {row['contender']} | {row['seconds']:.3f} | {against} | {ratio} | {of_r_drop} | "
                f"{row['activations_mb']:.1f} | {row['peak_mb']:.0f} |"
            )
    return "\n".join(lines).strip()


def summary(results: pd.DataFrame) -> str:
    """Step times as multiples of the plain Trainer's, by ablations and ablated layers, at the size of the figure."""
    model, size = FIGURE
    rows = results[(results["model"] == model) & (results["size"] == size)].set_index("contender")

    def cell(contender: str) -> str:
        row = rows.loc[contender]
        return f"{row['median']:.2f} ({row['low']:.2f} – {row['high']:.2f})"

    tops = [f"top {number}" for number in LAYERS]
    lines = ["| | " + " | ".join(tops) + f" | all {BERTS[model][0]} layers |", "| --- " * (len(LAYERS) + 2) + "|"]
    for ablations in ABLATIONS:
        cells = [cell(f"c = {ablations}, {top}") for top in tops] + [cell(f"c = {ablations}")]
        lines.append(f"| c = {ablations} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "| R-Drop |" + " |" * len(LAYERS) + f" {cell('R-Drop')} |"])


def insert(table: str, page: Path, mark: str) -> None:
    """Put the table between the two marks of a page."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def plot(results: pd.DataFrame, path: Path) -> None:
    """Step times as multiples of the plain Trainer's: a line for each number of ablations, over the ablated layers."""
    model, size = FIGURE
    rows = results[(results["model"] == model) & (results["size"] == size)].set_index("contender")
    if rows.empty:
        return
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    num_layers, _ = BERTS[model]
    layers = [*LAYERS, num_layers]
    for ablations, colour, marker in zip(ABLATIONS, ("#9ecae1", "#4292c6", "#08306b"), "osD", strict=True):
        names = [f"c = {ablations}, top {number}" for number in LAYERS] + [f"c = {ablations}"]
        found = rows.loc[names]
        spread = [found["median"] - found["low"], found["high"] - found["median"]]
        axes.errorbar(layers, found["median"], spread, color=colour, marker=marker, capsize=3, label=f"{names[-1]}")
    r_drop = rows.loc["R-Drop"]
    axes.axhspan(r_drop["low"], r_drop["high"], color="#bdbdbd", alpha=0.6, linewidth=0)
    axes.axhline(r_drop["median"], color="#636363", linestyle="--", linewidth=1)
    axes.text(num_layers + 0.15, r_drop["median"], "R-Drop", va="bottom", color="#636363")
    axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.text(num_layers + 0.15, 1, "plain Trainer", va="bottom")
    axes.set_xticks(layers, [f"top {number}" for number in LAYERS] + [f"all {num_layers}"])
    axes.set_xlim(0.6, num_layers + 1.1)
    axes.set_ylim(0, None)
    axes.set_xlabel("ablated layers")
    axes.set_ylabel("step time, multiples of the plain Trainer's")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

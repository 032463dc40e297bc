"""Step times of comparative loss against what one would run instead; writes docs/performance.csv and .png.

    python benchmarks/bench_steps.py                        # everything, the better part of an hour on two cores
    python benchmarks/bench_steps.py --sizes 4x64 --rounds 15

A round runs a step (forward and backward) of each contender after the other, so that a noisy machine slows all of
them alike; ratios are taken within a round and their median and quartiles reported. Results are appended to the CSV
as they come, and what is there already is not run again.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import Step, comparative, plain, published_scheme, r_drop
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

MODELS = {"4 layers x 256": (4, 256), "6 layers x 384": (6, 384)}
SIZES = ("4x64", "16x128", "32x128")
COLUMNS = ("model", "size", "contender", "against", "rounds", "seconds", "low", "median", "high", "activations_mb")
# contender -> how its step is made, and whom it is measured against
CONTENDERS: dict[str, tuple[Callable[[Any], Step], str]] = {
    "plain": (plain, "plain"),
    "c = 0": (lambda model: comparative(model), "plain"),
    "R-Drop": (r_drop, "plain"),
    "c = 1, auto": (lambda model: comparative(model, cmp_num_ablations=1), "R-Drop"),
    "published scheme, c = 2": (lambda model: published_scheme(model, 2), "plain"),
    "c = 2, sequential": (lambda model: comparative(model, cmp_num_ablations=2, cmp_forward="sequential"), "plain"),
    "c = 2, stacked": (
        lambda model: comparative(model, cmp_num_ablations=2, cmp_forward="stacked"),
        "c = 2, sequential",
    ),
    "c = 2, auto": (lambda model: comparative(model, cmp_num_ablations=2), "published scheme, c = 2"),
    "c = 4, sequential": (lambda model: comparative(model, cmp_num_ablations=4, cmp_forward="sequential"), "plain"),
    "c = 4, low memory": (
        lambda model: comparative(model, cmp_num_ablations=4, cmp_low_memory=True),
        "c = 4, sequential",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="batch x length")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("docs/performance.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done = read_rows(args.output)
    for name in args.models:
        for size in args.sizes:
            if not any(row["model"] == name and row["size"] == size for row in done):
                rows, length = map(int, size.split("x"))
                measured = measure(make_model(*MODELS[name]), make_batch(rows, length), args.contenders, args.rounds)
                append_rows(args.output, [{"model": name, "size": size, **row} for row in measured])


def make_model(layers: int, width: int) -> Any:
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # two classes by default
    return BertForSequenceClassification(config).train()


def make_batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (rows,))}


def measure(model: Any, batch: dict[str, torch.Tensor], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Interleaved step times of the contenders: ratios within a round, their quartiles, and activation memory."""
    steps = {name: CONTENDERS[name][0](model) for name in names}
    activations = {name: activation_megabytes(step, model, batch) for name, step in steps.items()}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in tqdm(range(rounds), desc=f"{tuple(batch['input_ids'].shape)}"):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch).backward()
            seconds[name].append(time.perf_counter() - start)
            model.zero_grad()
    measured = []
    for name in names:
        against = CONTENDERS[name][1] if CONTENDERS[name][1] in names else names[0]
        low, median, high = statistics.quantiles(
            [one / other for one, other in zip(seconds[name], seconds[against], strict=True)]
        )
        measured.append(
            {
                "contender": name,
                "against": against,
                "rounds": rounds,
                "seconds": round(statistics.median(seconds[name]), 4),
                "low": round(low, 3),
                "median": round(median, 3),
                "high": round(high, 3),
                "activations_mb": round(activations[name], 1),
            }
        )
    return measured


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

    step(batch).backward()  # checks of the first step are not part of it
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step(batch).backward()
    model.zero_grad()
    return peak / 2**20


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer: Any = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

"""Step times and peak memory on a GPU of NVIDIA; a table on standard output.

    python benchmarks/bench_gpu.py                     # BERT-base 32 x 128, GPT-2 8 x 512, ViT-base 64 images, in bf16
    python benchmarks/bench_gpu.py --models BERT-base --rounds 20

As in bench_steps.py, a round runs a step of each contender in random order, and ratios are taken within a round. The
weights are random. `--tiny --device cpu` tries the script where there is no GPU.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from contenders import r_drop
from torch import Tensor
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from cmp_trainer import CmpDrop, ComparativeStep

Batch = dict[str, Tensor]
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}


def bert(tiny: bool) -> tuple[Any, Batch]:
    ids = torch.randint(1000, 30000, (4, 16) if tiny else (32, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(len(ids)) % 2}
    return BertForSequenceClassification(BertConfig(**TINY if tiny else {})), batch


def gpt2(tiny: bool) -> tuple[Any, Batch]:
    ids = torch.randint(1000, 30000, (2, 16) if tiny else (8, 512))
    config = GPT2Config(n_embd=32, n_layer=3, n_head=2) if tiny else GPT2Config()
    return GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def vit(tiny: bool) -> tuple[Any, Batch]:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = ViTConfig(**{**(TINY if tiny else {}), **rates})
    images = torch.randn(4 if tiny else 64, 3, 224, 224)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(len(images)) % 2}


MODELS: dict[str, Callable[[bool], tuple[Any, Batch]]] = {"BERT-base": bert, "GPT-2": gpt2, "ViT-base": vit}


def contenders(name: str, model: Any) -> dict[str, Callable[[Batch], Tensor]]:
    def step(ablations: int, **settings: Any) -> ComparativeStep:
        return ComparativeStep(model, [CmpDrop()] * ablations, **settings)

    found: dict[str, Callable[[Batch], Tensor]] = {
        "plain": lambda batch: model(**batch).loss,
        "c = 2": step(2, forward="sequential"),
        "c = 2, stacked": step(2, forward="stacked"),
        "c = 2, low memory": step(2, low_memory=True),
        "c = 2, top 2": step(2, forward="sequential", ablated_layers=2),
        "c = 2, top 2, stacked": step(2, forward="stacked", ablated_layers=2),
        "c = 4, top 2, low memory": step(4, low_memory=True, ablated_layers=2),
    }
    return {**found, "R-Drop": r_drop(model)} if name != "GPT-2" else found  # R-Drop here is of classifiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{card}; torch {torch.__version__}, transformers {transformers.__version__}; {args.rounds} rounds\n")
    print(
        "| model | contender | ms / step | of plain, median (quartiles) | peak, MB |\n" + "| --- " * 5 + "|",
        flush=True,
    )
    for name in args.models:
        torch.manual_seed(0)
        model, batch = MODELS[name](args.tiny)
        batch = {key: value.to(device) for key, value in batch.items()}
        for row in measure(contenders(name, model.to(device).train()), model, batch, device, args.rounds):
            print(f"| {name} | {row}", flush=True)


def measure(
    steps: dict[str, Callable[[Batch], Tensor]], model: Any, batch: Batch, device: torch.device, rounds: int
) -> list[str]:
    """A row of the table for each contender."""
    on_gpu = device.type == "cuda"

    def run(contender: str) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = steps[contender](dict(batch))
        loss.backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        model.zero_grad()
        return seconds

    peak: dict[str, float] = {}
    for contender in steps:
        run(contender)  # checks, and choices of kernels
        gc.collect()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run(contender)
        peak[contender] = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else float("nan")
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    order, draw = list(steps), random.Random(0)
    for _ in tqdm(range(rounds)):
        draw.shuffle(order)
        for contender in order:
            seconds[contender].append(run(contender))
    rows = []
    for contender, times in seconds.items():
        low, median, high = statistics.quantiles([a / b for a, b in zip(times, seconds["plain"], strict=True)])
        spread = f"{median:.2f} ({low:.2f} – {high:.2f})"
        rows.append(f"{contender} | {statistics.median(times) * 1000:.1f} | {spread} | {peak[contender]:.0f} |")
    return rows


if __name__ == "__main__":
    main()

"""What CmpCrop costs and saves, at batch 8 and length 2,048.

    python benchmarks/bench_cropping.py

1. Cropping itself (checks, drawing, moving nine columns) against one training step of the full input, forward and
   backward: it should be under 2 %. The model is small; the larger the model, the smaller the share.
2. Steps on crops of fewer and fewer tokens: time should fall at least in proportion to the tokens kept.

Times are processor time of one thread, which other programs on the machine do not stretch; the median of several.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import BertConfig, BertForQuestionAnswering, LongformerConfig, LongformerForQuestionAnswering

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.crop_columns import crop_batch

BATCH, LENGTH, SEGMENTS = 8, 2048, 15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="File to write the numbers to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    inputs = batch()
    crop = CmpCrop(pad_values={"input_ids": 0})
    cropping = median_time(lambda: crop.batches(inputs, num_levels=1), 20)
    numbers: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "cropping_ms": round(1000 * cropping, 2),
        "steps": [],
    }
    print(f"cropping {BATCH} x {LENGTH}: {1000 * cropping:.1f} ms\n")
    print("| model | tokens kept | step, s | of the full step | cropping, % of the full step |")
    print("| --- | --- | --- | --- | --- |")
    for model in (bert(args), longformer(args)):
        full_time = 0.0
        for kept_segments in (SEGMENTS, 10, 5, 0):
            cropped = with_segments(inputs, kept_segments)
            seconds = median_time(lambda model=model, cropped=cropped: step(model, cropped), args.repeats)
            full_time = full_time or seconds
            share = cropped["attention_mask"].sum().item() / (BATCH * LENGTH)
            row = {"model": type(model).__name__, "kept": share, "seconds": seconds, "of_full": seconds / full_time}
            numbers["steps"].append(row | {"cropping_share": cropping / full_time})
            print(
                f"| {row['model']} | {share:.0%} | {seconds:.2f} | {row['of_full']:.0%} | "
                f"{100 * cropping / full_time:.2f} |"
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(numbers, file, indent=1)


def batch() -> dict[str, torch.Tensor]:
    """Eight full rows: a sixteenth of each must stay, the rest are 15 segments; an answer and six more columns."""
    must_stay = LENGTH // (SEGMENTS + 1)
    segments = torch.arange(LENGTH).div(must_stay, rounding_mode="floor").expand(BATCH, LENGTH).contiguous()
    ids = torch.randint(5, 1000, (BATCH, LENGTH))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "crop_segments": segments,
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous(),
        "global_attention_mask": (torch.arange(LENGTH) % must_stay == 0).long().expand(BATCH, LENGTH).contiguous(),
        "special_tokens_mask": torch.zeros_like(ids),
        "start_positions": torch.full((BATCH,), 7),
        "end_positions": torch.full((BATCH,), 9),
    }


def with_segments(inputs: dict[str, torch.Tensor], number: int) -> dict[str, Any]:
    """The batch with the first so many segments, and the columns that the step needs."""
    keep = inputs["crop_segments"] <= number
    names = ("input_ids", "attention_mask", "global_attention_mask", "start_positions", "end_positions")
    return crop_batch({name: inputs[name] for name in names}, keep, {"input_ids": 0})


def step(model: torch.nn.Module, inputs: dict[str, Any]) -> None:
    if isinstance(model, BertForQuestionAnswering):
        inputs = {name: value for name, value in inputs.items() if name != "global_attention_mask"}
    model.zero_grad()
    model(**inputs).loss.backward()


def median_time(function: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time, after one call to warm up."""
    function()
    times = []
    for _ in tqdm(range(repeats), leave=False):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def shape(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "vocab_size": 1000,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64 or 1,
        "intermediate_size": 4 * args.hidden_size,
        "max_position_embeddings": LENGTH + 2,
    }


def bert(args: argparse.Namespace) -> BertForQuestionAnswering:
    return BertForQuestionAnswering(BertConfig(**shape(args), pad_token_id=0))


def longformer(args: argparse.Namespace) -> LongformerForQuestionAnswering:
    return LongformerForQuestionAnswering(LongformerConfig(**shape(args), pad_token_id=0, attention_window=128))


if __name__ == "__main__":
    main()

"""What a save costs beside the Trainer's, the 5th and the 300th of a run that keeps all; into docs/performance.md.

    make bench
    python benchmarks/bench_saves.py

The Trainers save in turn, each into a folder of its own, so that a slow disk slows all of them alike. A number is the
median of five neighbouring saves.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, Trainer

from cmp_trainer import CmpTrainer, CmpTrainingArguments

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
MARKS = "<!-- saves: begin -->", "<!-- saves: end -->"
SAVES, PLACES = 302, (5, 300)
CONTENDERS: dict[str, tuple[type, int]] = {"Trainer": (Trainer, 0), "c = 0": (CmpTrainer, 0), "c = 2": (CmpTrainer, 2)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trained(kind, c, f"{folder}/{name}") for name, (kind, c) in CONTENDERS.items()}
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for number in tqdm(range(1, SAVES + 1), desc="saves"):
            for name, trainer in trainers.items():
                trainer.state.global_step = number
                begun = time.perf_counter()
                trainer._save_checkpoint(trainer.model, None)
                times[name].append(time.perf_counter() - begun)
    text = table(times)
    print(text)
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def trained(kind: type, ablations: int, folder: str) -> Any:
    """A Trainer after one step, so that there is an optimizer to save, of a small model: what is added shows."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    )
    args = CmpTrainingArguments(folder, max_steps=1, cmp_num_ablations=ablations, use_cpu=True, report_to=[])
    args.disable_tqdm = True
    data = Dataset.from_dict({"input_ids": [[2, 5, 6, 3]] * 8, "labels": [0, 1] * 4})
    trainer = kind(model=model, args=args, train_dataset=data)
    trainer.train()
    return trainer


def table(times: dict[str, list[float]]) -> str:
    """Milliseconds of a save, and the ratios to Trainer's save of the same number and to the first one."""
    lines = [
        "| | 5th save, ms | of Trainer's | 300th save, ms | of Trainer's | 300th / 5th |",
        "| --- |" + " --- |" * 5,
    ]
    found = {name: [statistics.median(of[place - 3 : place + 2]) for place in PLACES] for name, of in times.items()}
    for name, (first, last) in found.items():
        of_plain = [own / plain for own, plain in zip((first, last), found["Trainer"], strict=True)]
        lines.append(
            f"| {name} | {1000 * first:.1f} | {of_plain[0]:.2f} | {1000 * last:.1f} | {of_plain[1]:.2f} "
            f"| {last / first:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""The same small model trained as a baseline and with comparative loss, in a minute or so on a CPU.

    python examples/demo/demo.py

prints a table and draws runs/demo/losses.png. Both models start from the same weights and see the same letters in
the same order; afterwards both are judged as they are and with two ablations, on letters that neither has seen.
The settings were chosen for the task to be learned in short time, not for either of the two to win.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from letters import PLACES, make_letters, make_tokenizer
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding, set_seed
from transformers.trainer_utils import EvalPrediction

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.scripting import plain_errors

with plain_errors():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

STEPS, BATCH, SEED = 400, 32, 1
JUDGED = 1000
ABLATIONS = 2
FOLDER = Path("runs/demo")


def main() -> None:
    torch.set_num_threads(1)  # a second thread only waits, with a model this small
    train_letters = encode(make_letters(STEPS * BATCH, seed=SEED))
    new_letters = encode(make_letters(JUDGED, seed=SEED + 1))
    results, logs = {}, {}
    for name, ablations in {"baseline": 0, "comparative": ABLATIONS}.items():
        print(f"\n{name}: {STEPS} steps of {BATCH} letters, {ablations} ablations")
        trainer = make_trainer(make_model(), train_letters, ablations)
        run = trainer.train()
        logs[name] = [log for log in trainer.state.log_history if "loss" in log]
        judge = make_trainer(trainer.model, new_letters, ABLATIONS, cmp_eval_ablations=True)
        results[name] = judge.evaluate() | {"seconds": run.metrics["train_runtime"] / STEPS}
    print_table(results)
    plot_losses(logs, FOLDER / "losses.png")


def encode(letters: Dataset) -> Dataset:
    tokenizer = make_tokenizer()
    return letters.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns="text", desc="tokenizing")


def make_model() -> BertForSequenceClassification:
    set_seed(SEED)
    config = BertConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,  # 0.02 is meant for wide models; a narrow one hardly starts to learn from there
        id2label=dict(enumerate(PLACES)),
    )
    return BertForSequenceClassification(config)


def make_trainer(model: Any, letters: Dataset, ablations: int, **kwargs: Any) -> CmpTrainer:
    """Trains on these letters, or judges by them."""
    args = CmpTrainingArguments(
        output_dir=str(FOLDER),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=250,
        learning_rate=1e-3,
        warmup_steps=STEPS // 10,
        logging_steps=STEPS // 20,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        cmp_num_ablations=ablations,
        **kwargs,
    )
    return CmpTrainer(
        model,
        args,
        train_dataset=letters,
        eval_dataset=letters,
        data_collator=DataCollatorWithPadding(make_tokenizer()),
        compute_metrics=accuracy,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def print_table(results: dict[str, dict[str, float]]) -> None:
    columns = {
        "accuracy": "eval_accuracy",
        "loss": "eval_loss",
        **{f"ablated {number}": f"eval_loss_ablated_{number}" for number in range(1, ABLATIONS + 1)},
        "violation rate": "eval_violation_rate",
        "s/step": "seconds",
    }
    print(f"\nOn new letters (chance {1 / len(PLACES):.2f})")
    print(f"{'':12}" + "".join(f"{column:>16}" for column in columns))
    for name, values in results.items():
        print(f"{name:12}" + "".join(f"{values[key]:16.3f}" for key in columns.values()))


def plot_losses(logs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """The loss of each variant over training; told apart by dashes, so that they are in grey too."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    series = {"comparative: full model": ("comparative", "loss_full", "black", "-")}
    for number, (grey, dashes) in enumerate(zip(("0.3", "0.5"), ("--", ":"), strict=True), start=1):
        series[f"comparative: ablated {number}×"] = ("comparative", f"loss_ablated_{number}", grey, dashes)
    series["baseline (with dropout)"] = ("baseline", "loss", "0.7", "-")
    for label, (name, key, grey, dashes) in series.items():
        steps, losses = zip(*((log["step"], log[key]) for log in logs[name]), strict=True)
        axes.plot(steps, losses, color=grey, linestyle=dashes, linewidth=2, label=label)
    axes.set(xlabel="training step", ylabel="task loss (cross entropy)", ylim=(0, None), xlim=(0, STEPS))
    axes.set_title("Task loss of the variants over training", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)
    print(f"\nlosses over training: {file}")


if __name__ == "__main__":
    main()

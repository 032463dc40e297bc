"""The example in the docs: CoLA as baseline and with two ablations, the second one's card, and both curves.

    python benchmarks/model_card.py --data COLA_FOLDER --model MODEL --epochs 1

trains both from the same encoder with the same settings and seed, evaluates on the validation split, and writes
docs/model_card_example.md with the pictures model_card_curve.png (the card's) and ablation_curve_cola.png (both).
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.data.classification import METRICS
from cmp_trainer.reports.curves import as_text, plot_curves
from cmp_trainer.reports.model_card import CURVE_IMAGE

ROOT = Path(__file__).parent.parent
CLASSES = {0: "unacceptable", 1: "acceptable"}
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "warmup_steps": 30,
    "weight_decay": 0.01,
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "seed": 1,
    "report_to": [],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--model", required=True, help="the encoder both start from")
    parser.add_argument("--named", default="sentence-transformers/all-MiniLM-L6-v2", help="its name on the Hub")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "model_card")
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves = []
    for name, ablations in {"cola-baseline": 0, "cola-comparative": 2}.items():
        trainer = trained(options, name, ablations)
        trainer.evaluate()
        curves.append(trainer.evaluate_ablations(drops=4, seeds=range(3)))
        trainer.create_model_card(
            language="en",
            license="apache-2.0",
            finetuned_from=options.named,
            tasks="text-classification",
            dataset="CoLA (Corpus of Linguistic Acceptability)",
            dataset_tags="nyu-mll/glue",
            dataset_args="cola",
        )
    curve = pd.concat(curves, ignore_index=True)
    print(as_text(curve))
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    plot_curves(curve).savefig(images / "ablation_curve_cola.png")
    curve.to_csv(options.output / "curves.csv", index=False)
    shutil.copy(options.output / "cola-comparative" / CURVE_IMAGE, images / "model_card_curve.png")
    card = (options.output / "cola-comparative" / "README.md").read_text(encoding="utf-8")
    page = PAGE.format(card=card.strip(), table=as_text(curve), epochs=options.epochs)
    (ROOT / "docs" / "model_card_example.md").write_text(page, encoding="utf-8")


def trained(options: argparse.Namespace, name: str, ablations: int) -> CmpTrainer:
    set_seed(SETTINGS["seed"])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, id2label=CLASSES, label2id={label: number for number, label in CLASSES.items()}
    )
    files = {split: str(options.data / f"{split}.jsonl") for split in ("train", "validation")}
    data: Any = load_dataset("json", data_files=files).map(
        lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=128), batched=True
    )
    trainer = CmpTrainer(
        model=model,
        args=CmpTrainingArguments(
            str(options.output / name), num_train_epochs=options.epochs, cmp_num_ablations=ablations, **SETTINGS
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=matthews_correlation,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def matthews_correlation(prediction: EvalPrediction) -> dict[str, float]:
    """CoLA's metric."""
    decided = np.asarray(prediction.predictions).argmax(-1)
    name = "matthews_correlation"
    return {name: METRICS[name](decided, np.asarray(prediction.label_ids))}


PAGE = """\
# The card of a really trained model

A 22M-parameter encoder on CoLA, once as a baseline and once with two ablations: the same settings and seed, epochs:
{epochs:g}, nothing tuned. One run of each, so this shows what a card and a curve look like; it is no comparison of
methods. Made by

```bash
python benchmarks/model_card.py --data COLA_FOLDER --model all-MiniLM-L6-v2 --epochs {epochs:g}
```

Both models under ablation, on the validation split:

![Loss, Matthews correlation and violations of both models by number of drops](images/ablation_curve_cola.png)

```text
{table}
```

## The card, as it lands on the Hub

~~~~markdown
{card}
~~~~

with `ablation_curve.png`:

![The curve of the card](images/model_card_curve.png)
"""


if __name__ == "__main__":
    main()

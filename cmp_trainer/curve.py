"""`cmp-trainer curve`: ablation curves of saved models on a file of labelled examples, side by side.

    cmp-trainer curve runs/baseline runs/comparative --data validation.jsonl --output cola

prints a table of loss, metrics and examples in violation at 0 … K drops (and 0 … all crops, where rows carry
`crop_segments`) and writes cola.csv (every seed), cola.json and cola.png. reports/curves.py says what is measured;
curve_data.py, how rows become batches and what the metrics are.
"""

import argparse
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cmp_trainer.ablations.crop import SEGMENTS
from cmp_trainer.arguments import CmpTrainingArguments
from cmp_trainer.curve_data import Columns, TaskData, prepare, rows_of, task_of
from cmp_trainer.data.tables import take_split
from cmp_trainer.reports.curves import ablation_curve, as_text, measures, plot_curves
from cmp_trainer.saving.files import written_whole
from cmp_trainer.scripting import ModelArguments, distinct_names, load_pretrained, plain_errors
from cmp_trainer.trainer import CmpTrainer


@plain_errors()
def run_curve(options: argparse.Namespace) -> None:
    """Measure every model, print the table, write the files.

    Raises:
        SystemExit: with one line that says what is wrong with models, data or options.
    """
    _check_options(options)
    names = _names(options.models, options.names)
    transformers_logging.set_verbosity_error()
    curves = [_measure(model, name, options) for model, name in zip(options.models, names, strict=True)]
    curve = pd.concat(curves, ignore_index=True)
    print(as_text(curve))
    if options.output is not None:
        _write(curve, options)


def _measure(path: str, name: str, options: argparse.Namespace) -> pd.DataFrame:
    model_args = ModelArguments(path)
    config, tokenizer = (load_pretrained(kind, path, model_args) for kind in (AutoConfig, AutoTokenizer))
    task = options.task or task_of(config, Path(options.data))
    rows = take_split({"data": rows_of(task, Path(options.data))}, "data", [], options.max_samples)
    model = load_pretrained(getattr(transformers, _architecture(config, path)), path, model_args)
    columns = Columns(options.columns, options.label_column, options.label_separator)
    data = prepare(task, rows, tokenizer, model, options.max_length, columns)
    if options.metric is not None and options.metric not in data.metrics:
        raise ValueError(f"--metric {options.metric} is none of this task; it has {', '.join(data.metrics) or 'none'}")
    with tempfile.TemporaryDirectory() as folder:  # which a Trainer wants, and makes
        trainer = CmpTrainer(
            model=model,
            args=_arguments(options, data, folder),
            eval_dataset=data.dataset,
            data_collator=data.collator,
            compute_metrics=data.compute_metrics,
            processing_class=tokenizer,
        )
        return ablation_curve(trainer, drops=options.drops, seeds=range(options.seeds), model_name=name)


def _arguments(options: argparse.Namespace, data: TaskData, folder: str) -> CmpTrainingArguments:
    crops = 1 if SEGMENTS in data.dataset.column_names else 0  # that there are any makes the trainer keep the column
    return CmpTrainingArguments(
        output_dir=folder,
        cmp_num_ablations=max(1, options.drops) + crops,
        cmp_num_crops=crops,
        cmp_dropout=options.dropout,
        per_device_eval_batch_size=options.batch_size,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )


def _write(curve: pd.DataFrame, options: argparse.Namespace) -> None:
    output: Path = options.output
    files = [output.with_name(output.name + suffix) for suffix in (".csv", ".json", ".png")]
    unit = None if "pearson" in measures(curve) else "nats"  # losses of a regression are squares
    with written_whole(files[0]) as file:
        curve.to_csv(file, index=False)
    with written_whole(files[1]) as file:
        curve.to_json(file, orient="records", indent=1, double_precision=15)
    with written_whole(files[2]) as file:
        plot_curves(curve, options.metric, unit).savefig(file)
    print(f"written: {', '.join(str(file) for file in files)}")


def _check_options(options: argparse.Namespace) -> None:
    for name in ("seeds", "max_length", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected 1 or more")
    needed = {"sklearn": "scikit-learn", "scipy": "scipy", "torchmetrics": "torchmetrics", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"curves need {', '.join(missing)}: pip install 'cmp-trainer[plot]'")


def _names(models: Sequence[str], given: Sequence[str] | None) -> Sequence[str]:
    if given is not None and len(given) != len(models):
        raise ValueError(f"--names {' '.join(given)}: {len(given)} names for {len(models)} models; give one for each")
    return given or distinct_names(models)


def _architecture(config: Any, path: str) -> str:
    names = getattr(config, "architectures", None) or ["none"]
    if not hasattr(transformers, names[0]):
        raise ValueError(f"{path!r} is of the architecture {names[0]!r}, which transformers does not have")
    return names[0]

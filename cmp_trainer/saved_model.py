"""A saved model and labelled rows to evaluate it on, as `cmp-trainer curve` and `cmp-trainer shrink` take them."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from cmp_trainer.arguments import CmpTrainingArguments
from cmp_trainer.curve_data import Columns, TaskData, prepare, rows_of, task_of
from cmp_trainer.data.tables import take_split
from cmp_trainer.scripting import ModelArguments, load_pretrained
from cmp_trainer.trainer import CmpTrainer

logger = logging.getLogger(__name__)


@dataclass
class SavedModel:
    """A model that was loaded from a folder or the Hub, and its tokenizer, or what else prepares its inputs."""

    path: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, path: str, for_texts: bool = True) -> SavedModel:
        """A model with the architecture that its configuration names.

        Args:
            for_texts: whether it needs a tokenizer. Otherwise it may have a tokenizer, another processor, or none.

        Raises:
            ValueError: there is no such model, or no tokenizer with it where one is needed.
        """
        model_args = ModelArguments(path)
        config = load_pretrained(AutoConfig, path, model_args)
        if for_texts:
            processor = load_pretrained(AutoTokenizer, path, model_args)
        else:
            try:
                processor = load_pretrained(AutoProcessor, path, model_args)
            except ValueError:
                logger.warning("%s has no tokenizer or other processor; the model is taken alone", path)
                processor = None
        return cls(path, load_pretrained(architecture(config, path), path, model_args), processor)

    def read(self, options: argparse.Namespace) -> TaskData:
        """Labelled rows for this model, from the options of a command.

        Raises:
            ValueError: rows that do not fit the task, or a metric that it does not have.
        """
        task = options.task or task_of(self.model.config, Path(options.data))
        rows = take_split({"data": rows_of(task, Path(options.data))}, "data", [], options.max_samples)
        columns = Columns(options.columns, options.label_column, options.label_separator)
        data = prepare(task, rows, self.processor, self.model, options.max_length, columns)
        if options.metric is not None and options.metric not in data.metrics:
            names = ", ".join(data.metrics) or "none"
            raise ValueError(f"--metric {options.metric} is none of this task; it has {names}")
        return data

    def trainer(self, data: TaskData, folder: str, batch_size: int, **arguments: Any) -> CmpTrainer:
        """A trainer that evaluates the model on the rows; it makes `folder` and writes nothing into it."""
        args = CmpTrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            **arguments,
        )
        args._n_gpu = min(1, args.n_gpu)  # nn.DataParallel would run forwards in threads, which no ablation reaches
        return CmpTrainer(
            model=self.model,
            args=args,
            eval_dataset=data.dataset,
            data_collator=data.collator,
            compute_metrics=data.compute_metrics,
            processing_class=self.processor,
        )


def architecture(config: Any, path: str) -> Any:
    """The class of a saved model.

    Raises:
        ValueError: transformers does not have it.
    """
    names = getattr(config, "architectures", None) or ["none"]
    if not hasattr(transformers, names[0]):
        raise ValueError(f"{path!r} is of the architecture {names[0]!r}, which transformers does not have")
    return getattr(transformers, names[0])


def check_packages(what: str) -> None:
    """Raises a ValueError where a package is missing that evaluates and draws."""
    needed = {"sklearn": "scikit-learn", "scipy": "scipy", "torchmetrics": "torchmetrics", "matplotlib": "matplotlib"}
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}: pip install 'cmp-trainer[plot]'")

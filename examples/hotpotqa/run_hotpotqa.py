"""Multi-hop question answering on HotpotQA (distractor setting), with or without comparative loss.

    python run_hotpotqa.py configs/longformer_crop_drop.yaml --output_dir out
    python run_hotpotqa.py configs/longformer_crop_drop.yaml --output_dir out \\
        --train_file train.jsonl --validation_file dev.jsonl

Particular to HotpotQA are its questions (hotpot_data), its inputs (hotpot_inputs) and its metric (hotpot_answers);
answers are read by the package. analyze_hotpotqa.py evaluates checkpoints at fewer paragraphs and at more dropout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from hotpot_answers import joint_predictions, score_answers
from hotpot_data import ANSWER_COLUMNS, COLUMNS, Limits, add_markers, encode_questions
from hotpot_inputs import EvaluationInputs, InputBuilder, NewEpochs, TrainingInputs, collator_of
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.data.answer_batches import loss_of_all
from cmp_trainer.data.answers import AnswerSettings, read_answers
from cmp_trainer.data.lengths import check_length
from cmp_trainer.scripting import (
    DataArguments,
    ModelArguments,
    load_pretrained,
    load_splits,
    parse_arguments,
    plain_errors,
    run,
    set_up,
    take_split,
)

with plain_errors():
    import torchmetrics as torchmetrics  # what scores answers: missed now, not after the training


@dataclass
class HotpotArguments(DataArguments):
    """HotpotQA's data, inputs and answers. Files are JSON lines or parquet with the Hub's columns."""

    dataset_name: str | None = field(default="hotpotqa/hotpot_qa", metadata={"help": "Dataset on the Hub"})
    dataset_config_name: str | None = field(default="distractor", metadata={"help": "Its configuration"})
    max_length: int = field(default=2048, metadata={"help": "Longest input in training, in tokens"})
    eval_max_length: int | None = field(default=None, metadata={"help": "In evaluation; the same where not given"})
    max_question_length: int = field(default=160, metadata={"help": "Longest question; longer ones are cut"})
    max_paragraph_length: int = field(default=256, metadata={"help": "Longest paragraph with title and markers"})
    max_answer_length: int = field(default=64, metadata={"help": "Longest answer in tokens"})
    num_paragraphs: int | None = field(
        default=None, metadata={"help": "Use so many of the paragraphs, supporting ones first; all where not given"}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize"})


@plain_errors()
def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(ModelArguments, HotpotArguments, CmpTrainingArguments, argv=argv)
    set_up(args)
    asked = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    tokenizer, model = load(model_args, data_args, [split for split, is_asked in asked.items() if is_asked])

    splits = load_splits(data_args)
    train_dataset, evaluated = None, {}
    with args.main_process_first(desc="inputs"):
        if args.do_train:
            examples = take_split(splits, "train", COLUMNS + ANSWER_COLUMNS, data_args.max_train_samples)
            encoded, builder = encode(examples, "train", data_args, tokenizer, model)
            train_dataset = TrainingInputs(encoded, builder, data_args.num_paragraphs, args.seed)
            train_dataset.check_crops(args.cmp_num_crops)
        for prefix, split, columns, max_samples in (
            ("eval", "validation", COLUMNS + ANSWER_COLUMNS, data_args.max_eval_samples),
            ("test", "test", COLUMNS, data_args.max_predict_samples),
        ):
            if asked[split]:
                examples = take_split(splits, split, columns, max_samples)
                encoded, builder = encode(examples, split, data_args, tokenizer, model)
                evaluated[prefix] = EvaluationInputs(encoded, builder, data_args.num_paragraphs)

    trainer = HotpotTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=evaluated.get("eval"),
        processing_class=tokenizer,
        data_collator=collator_of(tokenizer, model, max(length_of(split, data_args)[1] for split in asked)),
        callbacks=[NewEpochs(train_dataset)] if train_dataset is not None else None,
        max_answer_length=data_args.max_answer_length,
    )
    run(
        trainer,
        evaluation={"eval": evaluated["eval"]} if args.do_eval else None,
        prediction={"test": evaluated["test"]} if args.do_predict else None,
        card={"tasks": "question-answering", **data_args.card()},
    )


class HotpotTrainer(CmpTrainer):
    """Adds exact match and F1 to each evaluation, and writes its answers to <output_dir>/<prefix>_predictions.json.

    Args:
        max_answer_length: in tokens.
    """

    def __init__(self, *args: Any, max_answer_length: int, **kwargs: Any):
        # Some models return hidden states too; those of all questions would fill the memory.
        super().__init__(*args, preprocess_logits_for_metrics=lambda logits, labels: logits[:2], **kwargs)
        self.answer_settings = AnswerSettings(1, max_answer_length, all_spans=True)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        inputs: Any = dataloader.dataset  # EvaluationInputs
        starts, ends = (np.asarray(logits) for logits in output.predictions)
        tokens, show = inputs.tokens(), self.args.should_save and not self.args.disable_tqdm
        answers = read_answers(inputs.encoded, tokens, starts, ends, self.answer_settings, show).predictions
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / f"{metric_key_prefix}_predictions.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(joint_predictions(answers), indent=1, ensure_ascii=False), encoding="utf-8")
        scores = score_answers(answers, inputs.encoded)
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": one for name, one in scores.items()}}
        return output._replace(metrics=metrics)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """The Trainer's, without labels, which no metric needs, and with a loss in every process or in none."""
        loss, logits, _ = super().prediction_step(model, inputs, *args, **kwargs)
        return loss_of_all(loss, inputs, self.accelerator), logits, None


def load(model_args: ModelArguments, data_args: HotpotArguments, splits: Sequence[str]) -> tuple[Any, Any]:
    """Tokenizer and model with the markers, for inputs as long as those of the splits.

    Raises:
        ValueError: a length that the model does not take.
    """
    name = model_args.model_name_or_path
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or name, model_args)
    model = load_pretrained(AutoModelForQuestionAnswering, name, model_args)
    for split in splits:
        check_length(*length_of(split, data_args), tokenizer, model)
    add_markers(tokenizer, model)
    return tokenizer, model


def length_of(split: str, data_args: HotpotArguments) -> tuple[str, int]:
    """The argument that says how long a split's inputs may be, and its value."""
    if split == "train" or data_args.eval_max_length is None:
        return "--max_length", data_args.max_length
    return "--eval_max_length", data_args.eval_max_length


def encode(
    examples: Dataset, split: str, data_args: HotpotArguments, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[Dataset, InputBuilder]:
    """A split's questions as tokens, and what puts them together."""
    max_length = length_of(split, data_args)[1]
    limits = Limits(max_length, data_args.max_question_length, data_args.max_paragraph_length)
    builder = InputBuilder(tokenizer, limits, model)
    return encode_questions(examples, tokenizer, limits, split, data_args.preprocessing_num_workers), builder


if __name__ == "__main__":
    main()

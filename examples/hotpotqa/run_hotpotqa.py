"""Multi-hop question answering on HotpotQA (distractor setting), with or without comparative loss.

    python run_hotpotqa.py configs/longformer_crop_drop.yaml --output_dir out
    python run_hotpotqa.py configs/longformer_crop_drop.yaml --output_dir out \\
        --train_file train.jsonl --validation_file dev.jsonl

Here is what is particular to HotpotQA: its questions (hotpot_data), its inputs (hotpot_inputs), its answers and
metric (hotpot_answers). analyze_hotpotqa.py evaluates the checkpoints at fewer paragraphs and at more dropout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from hotpot_data import ANSWER_COLUMNS, COLUMNS, Limits, add_markers, encode_questions
from hotpot_inputs import EvaluationInputs, InputBuilder, NewEpochs, TrainingInputs, padding_multiple
from torch.utils.data import DataLoader
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from cmp_trainer import CmpTrainer, CmpTrainingArguments
from cmp_trainer.ablations.crop_collator import CmpCropCollator
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
    from hotpot_answers import joint_predictions, read_answers, score_answers


@dataclass
class HotpotArguments(DataArguments):
    """HotpotQA's data, inputs and answers. Files are JSON lines with the columns of the dataset on the Hub."""

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
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or model_args.model_name_or_path, model_args)
    tokenizer.padding_side = "right"  # answers are counted from the left
    model = load_pretrained(AutoModelForQuestionAnswering, model_args.model_name_or_path, model_args)
    add_markers(tokenizer, model)

    splits = load_splits(data_args)
    train_dataset, evaluated = None, {}
    with args.main_process_first(desc="inputs"):
        if args.do_train:
            examples = take_split(splits, "train", COLUMNS + ANSWER_COLUMNS, data_args.max_train_samples)
            encoded, builder = encode(examples, "train", data_args, tokenizer, model)
            train_dataset = TrainingInputs(encoded, builder, data_args.num_paragraphs, args.seed)
        for asked, prefix, split, columns, max_samples in (
            (args.do_eval, "eval", "validation", COLUMNS + ANSWER_COLUMNS, data_args.max_eval_samples),
            (args.do_predict, "test", "test", COLUMNS, data_args.max_predict_samples),
        ):
            if asked:
                examples = take_split(splits, split, columns, max_samples)
                encoded, builder = encode(examples, split, data_args, tokenizer, model)
                evaluated[prefix] = EvaluationInputs(encoded, builder, data_args.num_paragraphs)

    trainer = HotpotTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=evaluated.get("eval"),
        processing_class=tokenizer,
        data_collator=CmpCropCollator(tokenizer, pad_to_multiple_of=padding_multiple(model)),
        callbacks=[NewEpochs(train_dataset)] if train_dataset is not None else None,
        inputs=evaluated,
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
        inputs: what is evaluated, by the prefix of its metrics.
        max_answer_length: in tokens.
    """

    def __init__(self, *args: Any, inputs: Mapping[str, EvaluationInputs], max_answer_length: int, **kwargs: Any):
        # Some models return hidden states too; those of all questions would fill the memory.
        super().__init__(*args, preprocess_logits_for_metrics=lambda logits, labels: logits[:2], **kwargs)
        self.inputs, self.max_answer_length = inputs, max_answer_length

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        inputs = self.inputs[metric_key_prefix]
        start_logits, end_logits = output.predictions
        answers = read_answers(inputs, np.asarray(start_logits), np.asarray(end_logits), self.max_answer_length)
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / f"{metric_key_prefix}_predictions.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(joint_predictions(answers), indent=1, ensure_ascii=False), encoding="utf-8")
        scores = score_answers(answers, inputs.encoded)
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": one for name, one in scores.items()}}
        return output._replace(metrics=metrics)


def encode(
    examples: Dataset, split: str, data_args: HotpotArguments, tokenizer: PreTrainedTokenizerBase, model: Any
) -> tuple[Dataset, InputBuilder]:
    """A split's questions as tokens, and what puts them together."""
    longer = data_args.eval_max_length if split != "train" else None
    limits = Limits(longer or data_args.max_length, data_args.max_question_length, data_args.max_paragraph_length)
    builder = InputBuilder(tokenizer, limits, model)
    return encode_questions(examples, tokenizer, limits, split, data_args.preprocessing_num_workers), builder


if __name__ == "__main__":
    main()

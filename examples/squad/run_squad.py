"""Extractive question answering on SQuAD v1.1 and v2, with or without comparative loss.

    python run_squad.py configs/bert_base_comparative.yaml --output_dir out
    python run_squad.py configs/bert_base_comparative.yaml --output_dir out \\
        --train_file train.json --validation_file dev.json --version_2_with_negative true

Questions, windows, answers and metrics are the package's (cmp_trainer/data), which `cmp-trainer curve` shares. This
script adds arguments, the files that are written and a trainer that scores answers (qa_trainer).
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from qa_trainer import QuestionAnsweringTrainer, Scorer
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase

from cmp_trainer import CmpTrainingArguments
from cmp_trainer.data.answer_batches import POSITIONS, AnswerCollator, padding_multiple
from cmp_trainer.data.answer_metrics import squad_metrics, squad_v2_metrics
from cmp_trainer.data.answers import Answers, AnswerSettings, read_answers
from cmp_trainer.data.lengths import check_length
from cmp_trainer.data.questions import read_questions, to_questions
from cmp_trainer.data.windows import WindowSettings, evaluation_windows, training_windows
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

logger = logging.getLogger("cmp_trainer.examples.squad")


@dataclass
class SquadArguments(DataArguments):
    """SQuAD's data, windows and answers. Files are csv, tsv, parquet, JSON lines, flat JSON or SQuAD's nested JSON."""

    dataset_name: str | None = field(
        default="rajpurkar/squad", metadata={"help": "Dataset on the Hub: rajpurkar/squad or rajpurkar/squad_v2"}
    )
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer (SQuAD v2)"})
    null_score_diff_threshold: float = field(
        default=0.0, metadata={"help": "No answer where null score - best span's score is above this (SQuAD v2)"}
    )
    max_seq_length: int = field(default=384, metadata={"help": "Longest input in tokens; longer contexts are split"})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows of a context share"})
    max_question_length: int = field(default=64, metadata={"help": "Longest question in tokens; longer ones are cut"})
    n_best_size: int = field(default=20, metadata={"help": "Best starts, ends and answers that are kept"})
    max_answer_length: int = field(default=30, metadata={"help": "Longest answer in tokens"})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize"})


@plain_errors()
def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, args = parse_arguments(ModelArguments, SquadArguments, CmpTrainingArguments, argv=argv)
    set_up(args)
    tokenizer = load_pretrained(AutoTokenizer, model_args.tokenizer_name or model_args.model_name_or_path, model_args)
    model = load_pretrained(AutoModelForQuestionAnswering, model_args.model_name_or_path, model_args)
    check_length("--max_seq_length", data_args.max_seq_length, tokenizer, model)

    train_dataset, evaluation, scorers = None, {}, {}
    with args.main_process_first(desc="windows"):
        splits = read_splits(data_args)
        if args.do_train:
            examples = questions_of(splits, "train", data_args, data_args.max_train_samples)
            train_dataset = make_windows(examples, tokenizer, data_args, "train")
        for asked, prefix, split, max_samples in (
            (args.do_eval, "eval", "validation", data_args.max_eval_samples),
            (args.do_predict, "test", "test", data_args.max_predict_samples),
        ):
            if asked:
                examples = questions_of(splits, split, data_args, max_samples)
                evaluation[prefix] = make_windows(examples, tokenizer, data_args, prefix)
                folder = Path(str(args.output_dir)) if args.should_save else None
                scorers[prefix] = make_scorer(examples, evaluation[prefix], data_args, folder, prefix)

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=evaluation.get("eval"),
        processing_class=tokenizer,
        data_collator=AnswerCollator(tokenizer, padding_multiple(data_args.max_seq_length)),
        scorers=scorers,
    )
    run(
        trainer,
        evaluation={"eval": evaluation["eval"]} if args.do_eval else None,
        prediction={"test": evaluation["test"]} if args.do_predict else None,
        card={"tasks": "question-answering", **data_args.card()},
    )


def read_splits(data_args: SquadArguments) -> dict[str, Dataset]:
    """The splits, from the files where any is given, else from the Hub. Only a test file may go without answers."""
    if files := data_args.files():
        return {split: read_questions(file, split != "test", split) for split, file in files.items()}
    return {
        split: to_questions(rows, f"{data_args.dataset_name}, {split}", split != "test")
        for split, rows in load_splits(data_args).items()
    }


def questions_of(
    splits: dict[str, Dataset], split: str, data_args: SquadArguments, max_samples: int | None
) -> Dataset:
    """The questions of a split; refused where some have no answer and that was not asked for."""
    examples = take_split(splits, split, [], max_samples)
    without = sum(not answers["text"] for answers in examples["answers"][:])
    if without and not data_args.version_2_with_negative and not (split == "test" and without == len(examples)):
        raise ValueError(
            f"{without} of {len(examples)} questions of {split} have no answer, as in SQuAD v2. "
            "Pass --version_2_with_negative true, or data in which every question has one."
        )
    return examples


def make_windows(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: SquadArguments, prefix: str
) -> Dataset:
    """The windows of some questions, unlabelled if a test set has no answers; what is cut or lost is in the log."""
    settings = WindowSettings(data_args.max_seq_length, data_args.doc_stride, data_args.max_question_length)
    make = training_windows if prefix == "train" else evaluation_windows
    windows, report = make(examples, tokenizer, settings, data_args.preprocessing_num_workers)
    report.log(prefix)
    return windows.remove_columns(list(POSITIONS)) if prefix == "test" and not _has_answers(examples) else windows


def make_scorer(
    examples: Dataset, windows: Dataset, data_args: SquadArguments, folder: Path | None, prefix: str
) -> Scorer:
    """A function that reads the answers of one data set, writes them to `folder` and returns the metrics."""
    unanswerable = data_args.version_2_with_negative
    settings = AnswerSettings(
        data_args.n_best_size, data_args.max_answer_length, unanswerable, data_args.null_score_diff_threshold
    )
    right = [answers["text"] for answers in examples["answers"][:]]
    show = folder is not None

    def score(start_logits: np.ndarray, end_logits: np.ndarray) -> dict[str, float]:
        answers = read_answers(examples, windows, start_logits, end_logits, settings, progress=show)
        if answers.without_span:
            logger.warning("%s: %d questions have no context to answer from", prefix, answers.without_span)
        if folder is not None:
            write_answers(answers, folder, prefix)
        if prefix == "test" and not any(right):
            logger.warning("%s: no question comes with an answer; predictions are written, nothing is scored", prefix)
            return {}
        predictions = list(answers.predictions.values())
        if not unanswerable:
            return squad_metrics(predictions, right, show)
        odds = list(answers.null_odds.values())
        return squad_v2_metrics(predictions, list(answers.spans.values()), odds, right, show)

    return score


def write_answers(answers: Answers, folder: Path, prefix: str) -> None:
    """predictions.json, nbest_predictions.json and, with unanswerable questions, null_odds.json."""
    folder.mkdir(parents=True, exist_ok=True)
    # JSON has no infinity, which is the null odds of an empty context
    odds = {key: min(value, sys.float_info.max) for key, value in answers.null_odds.items()}
    contents = {"predictions": answers.predictions, "nbest_predictions": answers.nbest, "null_odds": odds}
    for name, content in contents.items():
        if content:
            path = folder / f"{prefix}_{name}.json"
            path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _has_answers(examples: Dataset) -> bool:
    return any(answers["text"] for answers in examples["answers"][:])


if __name__ == "__main__":
    main()

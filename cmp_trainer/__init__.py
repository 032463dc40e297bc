"""Comparative loss for the Hugging Face Trainer."""

__version__ = "0.1.0"

from cmp_trainer.trainer import CmpSeq2SeqTrainer, CmpTrainer, CmpTrainerMixin
from cmp_trainer.training_args import CmpSeq2SeqTrainingArguments, CmpTrainingArguments

__all__ = [
    "CmpSeq2SeqTrainer",
    "CmpSeq2SeqTrainingArguments",
    "CmpTrainer",
    "CmpTrainerMixin",
    "CmpTrainingArguments",
]

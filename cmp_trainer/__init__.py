"""Comparative loss for the Hugging Face Trainer."""

__version__ = "0.1.0"

from cmp_trainer.arguments import CmpSeq2SeqTrainingArguments, CmpTrainingArguments
from cmp_trainer.trainer import CmpSeq2SeqTrainer, CmpTrainer, CmpTrainerMixin

__all__ = [
    "CmpSeq2SeqTrainer",
    "CmpSeq2SeqTrainingArguments",
    "CmpTrainer",
    "CmpTrainerMixin",
    "CmpTrainingArguments",
]

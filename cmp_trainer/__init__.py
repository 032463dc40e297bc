"""Comparative loss for the Hugging Face Trainer."""

__version__ = "0.1.0"

from cmp_trainer.ablations.crop import CmpCrop
from cmp_trainer.ablations.drop import CmpDrop
from cmp_trainer.ablations.plan import plan
from cmp_trainer.ablations.skip import CmpSkip
from cmp_trainer.arguments import CmpSeq2SeqTrainingArguments, CmpTrainingArguments
from cmp_trainer.losses.comparative import ComparativeLoss, RegularizedLoss
from cmp_trainer.step import ComparativeStep
from cmp_trainer.trainer import CmpSeq2SeqTrainer, CmpTrainer

__all__ = [
    "CmpCrop",
    "CmpDrop",
    "CmpSeq2SeqTrainer",
    "CmpSeq2SeqTrainingArguments",
    "CmpSkip",
    "CmpTrainer",
    "CmpTrainingArguments",
    "ComparativeLoss",
    "ComparativeStep",
    "RegularizedLoss",
    "plan",
]

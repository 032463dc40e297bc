"""Stands for a library that was imported before a run began, and so is built on the plain Trainer."""

from transformers import Trainer, TrainingArguments


class TrainerOfALibrary(Trainer):
    pass


class ArgumentsOfALibrary(TrainingArguments):
    pass

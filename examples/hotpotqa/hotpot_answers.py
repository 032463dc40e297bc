"""HotpotQA's scores and predictions file; answers are read from logits by cmp_trainer.data.answers.

Exact match and F1 are SQuAD's, except that, as in HotpotQA's own evaluation, a yes or no that is wrong has no F1 for
words it shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from hotpot_data import logger

from cmp_trainer.data.answer_metrics import question_scores


def score_answers(predictions: Mapping[str, str], encoded: Dataset) -> dict[str, float]:
    """exact_match and f1, in percent, over the questions that come with an answer, and their number.

    Empty where none does.
    """
    questions = [(one, answer) for one, answer in zip(encoded["id"][:], encoded["answer"][:], strict=True) if answer]
    if not questions:
        return {}
    unanswered = len(encoded) - len(questions)
    if unanswered:
        logger.warning("%d of %d questions come without an answer and are not scored", unanswered, len(encoded))
    exact, f1 = zip(*(answer_scores(predictions[one], answer) for one, answer in questions), strict=True)
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1)), "questions": len(questions)}


def answer_scores(prediction: str, answer: str) -> tuple[float, float]:
    """Exact match and F1 of one answer, in percent.

    >>> answer_scores("The cat", "cat"), answer_scores("no", "no way")
    ((100.0, 100.0), (0.0, 0.0))
    """
    exact, f1 = (float(scores[0]) for scores in question_scores([prediction], [[answer]]))
    if exact or not f1:
        return exact, f1
    words = ["yes", "no", "noanswer"]
    is_special, _ = question_scores([prediction, answer], [words, words])
    return exact, 0.0 if is_special.any() else f1


def joint_predictions(answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """HotpotQA's predictions file. Supporting facts are not predicted, so each question has an empty list of them."""
    return {"answer": dict(answers), "sp": {one: [] for one in answers}}

"""HotpotQA's answers: from start and end logits to text, and their scores.

The answer is the span of highest start plus end logit among all spans of at most `max_answer_length` tokens that lie
within the text of one paragraph, and the one-token spans YES and NO. Exact match and F1 are SQuAD's, from
torchmetrics; as in HotpotQA's own evaluation a yes or no that is wrong has no F1 for words it shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hotpot_data import logger
from hotpot_inputs import NO_SPAN, NOT_TEXT, YES_SPAN, EvaluationInputs
from torch import Tensor
from torchmetrics.functional.text import squad
from tqdm.auto import tqdm

CHUNK = 64  # questions at a time


def best_spans(start_logits: Tensor, end_logits: Tensor, paragraph: Tensor, max_answer_length: int) -> Tensor:
    """First and last position (batch, 2) of the best span of each input.

    Args:
        start_logits, end_logits: (batch, length).
        paragraph: (batch, length), equal for tokens that one span may hold; NOT_TEXT where none may.
        max_answer_length: in tokens.

    >>> logits = torch.tensor([[0.0, 5.0, 1.0, 1.0]])
    >>> best_spans(logits, logits, torch.tensor([[-2, -1, 0, 0]]), 2).tolist()
    [[2, 2]]
    """
    length = paragraph.size(1)
    best = torch.full_like(start_logits[:, 0], -torch.inf)
    spans = torch.zeros(len(best), 2, dtype=torch.long, device=best.device)
    for reach in range(min(max_answer_length, length)):
        scores = start_logits[:, : length - reach] + end_logits[:, reach:]
        inside = (paragraph[:, : length - reach] == paragraph[:, reach:]) & (paragraph[:, reach:] != NOT_TEXT)
        values, starts = scores.masked_fill(~inside, -torch.inf).max(dim=1)
        better = values > best
        best = torch.where(better, values, best)
        spans = torch.where(better[:, None], torch.stack([starts, starts + reach], dim=1), spans)
    return spans


def read_answers(
    inputs: EvaluationInputs, start_logits: np.ndarray, end_logits: np.ndarray, max_answer_length: int = 64
) -> dict[str, str]:
    """Answers by question id.

    Args:
        inputs: the evaluated inputs, in the order of the logits.
        start_logits, end_logits: (questions, length), padded on the right.

    Raises:
        ValueError: the logits hold NaN.
    """
    if np.isnan(start_logits).any() or np.isnan(end_logits).any():
        raise ValueError("the model's logits hold NaN, so no answer can be read from them; has training diverged?")
    answers: dict[str, str] = {}
    for begin in tqdm(range(0, len(inputs), CHUNK), desc="Answers", disable=len(inputs) <= CHUNK):
        chunk = slice(begin, begin + CHUNK)
        made = [inputs.made(index) for index in range(begin, min(begin + CHUNK, len(inputs)))]
        width = start_logits.shape[1]
        paragraph = torch.tensor([one.paragraph + [NOT_TEXT] * (width - len(one.paragraph)) for one in made])
        starts, ends = torch.from_numpy(start_logits[chunk]), torch.from_numpy(end_logits[chunk])
        spans = best_spans(starts.float(), ends.float(), paragraph, max_answer_length).tolist()
        for offset, (one, (first, last)) in enumerate(zip(made, spans, strict=True)):
            example: dict[str, Any] = inputs.encoded[begin + offset]
            answers[example["id"]] = _text(one.paragraph[first], one.token[first], one.token[last], example)
    return answers


def score_answers(predictions: Mapping[str, str], encoded: Dataset) -> dict[str, float]:
    """exact_match and f1, in percent, over the questions that come with an answer, and their number; {} where none
    does."""
    questions = [(one, answer) for one, answer in zip(encoded["id"], encoded["answer"], strict=True) if answer]
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
    target = {"id": "", "answers": {"text": [answer], "answer_start": []}}
    scores = squad({"id": "", "prediction_text": prediction}, target)
    exact, f1 = scores["exact_match"].item(), scores["f1"].item()
    if exact or not f1:
        return exact, f1
    words = [{"id": "", "answers": {"text": ["yes", "no", "noanswer"], "answer_start": []}}]
    special = any(squad({"id": "", "prediction_text": one}, words)["exact_match"] for one in (prediction, answer))
    return exact, 0.0 if special else f1


def joint_predictions(answers: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """HotpotQA's predictions file. Supporting facts are not predicted, so each question has an empty list of them."""
    return {"answer": dict(answers), "sp": {one: [] for one in answers}}


def _text(paragraph: int, first: int, last: int, example: Mapping[str, Any]) -> str:
    if paragraph in (YES_SPAN, NO_SPAN):
        return "yes" if paragraph == YES_SPAN else "no"
    starts: Sequence[int] = example["text_starts"][paragraph]
    ends: Sequence[int] = example["text_ends"][paragraph]
    return example["paragraphs"][paragraph][starts[first] : ends[last]].strip()

"""Exact match and F1 of answers, in percent; for SQuAD v2 also separately for answerable and unanswerable questions.

`cmp-trainer curve` and the example scripts score answers here. The two scores of a question, with SQuAD's official
normalization (lower case, no punctuation, no articles), are torchmetrics'. This file adds what the official evaluation
of v2 does with them (Rajpurkar et al. 2018): averages over both kinds of questions, and the best null threshold.
"""

from collections.abc import Sequence

import numpy as np
from tqdm.auto import tqdm


def question_scores(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each question, 0 … 100, each the highest over the question's answers.

    Args:
        predictions: (questions,) the predicted answers.
        answers: for each question the right ones; none for an unanswerable question, whose right answer is "".
        progress: whether to show a progress bar.

    >>> question_scores(["The cat.", ""], [["cat", "a black cat"], []])
    (array([100., 100.]), array([100., 100.]))
    """
    from torchmetrics.functional.text import squad  # an extra

    pairs = list(zip(predictions, answers, strict=True))
    scores = np.zeros((2, len(pairs)))
    for row, (prediction, texts) in enumerate(tqdm(pairs, desc="Scores", disable=not progress)):
        target = {"id": "", "answers": {"text": list(texts) or [""], "answer_start": []}}
        score = squad({"id": "", "prediction_text": prediction}, target)
        scores[:, row] = score["exact_match"].item(), score["f1"].item()
    return scores[0], scores[1]


def squad_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], progress: bool = False
) -> dict[str, float]:
    """SQuAD v1.1: `exact_match`, `f1` and how many `questions` they are of."""
    return _means(*question_scores(predictions, answers, progress))


def squad_v2_metrics(
    predictions: Sequence[str],
    spans: Sequence[str],
    null_odds: Sequence[float],
    answers: Sequence[Sequence[str]],
    progress: bool = False,
) -> dict[str, float]:
    """SQuAD v2: scores over all questions, those with (HasAns) and without answers (NoAns), and the best threshold.

    `best_exact` and `best_f1` are what the best null threshold of this very data would have given; the threshold is
    tuned on what it is measured on, so they say how far the chosen one is from it, and are no result of their own.

    Args:
        predictions: (questions,) the answers, "" where unanswerable.
        spans: (questions,) the best span of each question, whether or not it was preferred to "".
        null_odds: (questions,) null score - best span's score.
        answers: for each question the right ones.
        progress: whether to show a progress bar.
    """
    exact, f1 = question_scores(predictions, answers, progress)
    metrics = _means(exact, f1)
    answerable = np.array([len(texts) > 0 for texts in answers])
    for name, group in (("HasAns", answerable), ("NoAns", ~answerable)):
        if group.any():
            metrics[f"{name}_exact"] = float(exact[group].mean())
            metrics[f"{name}_f1"] = float(f1[group].mean())
        metrics[f"{name}_total"] = int(group.sum())
    # only an answerable question gains by its span: an unanswerable one is right as long as it is left unanswered
    rows = [row for row, texts in enumerate(answers) if texts]
    span_scores = question_scores([spans[row] for row in rows], [answers[row] for row in rows], progress)
    for name, scores in zip(("exact", "f1"), span_scores, strict=True):
        if_answered = np.zeros(len(answerable))
        if_answered[rows] = scores
        best, threshold = best_null_threshold(if_answered, answerable, np.asarray(null_odds))
        metrics[f"best_{name}"], metrics[f"best_{name}_threshold"] = best, threshold
    return metrics


def best_null_threshold(scores: np.ndarray, answerable: np.ndarray, null_odds: np.ndarray) -> tuple[float, float]:
    """The highest mean score, and the lowest threshold that reaches it.

    A question is answered where its null odds are not above the threshold, and then scores `scores`; left unanswered
    it scores 100 if it is unanswerable, else 0.

    Args:
        scores: (questions,) the score of the best span, 0 for unanswerable questions.
        answerable: (questions,) bool.
        null_odds: (questions,).

    >>> best_null_threshold(np.array([80.0, 0.0]), np.array([True, False]), np.array([-1.0, 3.0]))
    (90.0, -1.0)
    """
    order = np.argsort(null_odds, kind="stable")
    odds = null_odds[order]
    gains = np.where(answerable, scores, -100.0)[order]
    # totals[k]: the k questions of lowest odds are answered
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + 100.0 * (~answerable).sum()
    # questions of equal odds are answered together, and none of infinite odds is
    reachable = np.concatenate([[True], np.append(odds[1:] > odds[:-1], True) & np.isfinite(odds)])
    best = int(np.argmax(np.where(reachable, totals, -np.inf)))
    threshold = odds[best - 1] if best else np.nextafter(odds[0], -np.inf) if np.isfinite(odds[0]) else 0.0
    return float(totals[best] / len(scores)), float(threshold)


def _means(exact: np.ndarray, f1: np.ndarray) -> dict[str, float]:
    return {"exact_match": float(exact.mean()), "f1": float(f1.mean()), "questions": len(exact)}

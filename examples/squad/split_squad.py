"""Splits one SQuAD file into train.json and test.json by paragraph, so that no context is in both.

    python split_squad.py xquad.en.json --test_share 0.25 --seed 0 --output_dir data
    python split_squad.py xquad.en.json --unanswerable_share 0.5 --output_dir data_v2

For trying things out where there is only one file. Paragraphs are drawn by --seed; the same seed gives the same split.
With --unanswerable_share s, s times as many questions without an answer are added, as in SQuAD v2 but synthetic: a
question is asked of another paragraph of its article (on the same side of the split) that holds none of its answers.
They are easier than SQuAD v2's, which people wrote to deceive.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any


def split_by_paragraph(
    articles: list[dict[str, Any]], test_share: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and test articles; each paragraph is in exactly one, `test_share` of them (rounded) in test."""
    places = [(a, p) for a, article in enumerate(articles) for p in range(len(article["paragraphs"]))]
    test = set(random.Random(seed).sample(places, round(test_share * len(places))))

    def chosen(is_test: bool) -> list[dict[str, Any]]:
        sides = [
            {**article, "paragraphs": [q for p, q in enumerate(article["paragraphs"]) if ((a, p) in test) == is_test]}
            for a, article in enumerate(articles)
        ]
        return [article for article in sides if article["paragraphs"]]

    return chosen(False), chosen(True)


def add_unanswerable(articles: list[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """The articles with unanswerable questions added: up to `share` times as many as there are questions.

    Fewer where too few paragraphs without a question's answer can be found.
    """
    candidates = [
        (a, other, question)
        for a, article in enumerate(articles)
        for p, paragraph in enumerate(article["paragraphs"])
        for question in paragraph["qas"]
        for other in range(len(article["paragraphs"]))
        if other != p and not _holds_answer(article["paragraphs"][other]["context"], question)
    ]
    generator = random.Random(seed)
    generator.shuffle(candidates)
    wanted = round(share * sum(len(p["qas"]) for article in articles for p in article["paragraphs"]))
    # a question moves once, so that none is asked of two paragraphs
    once = {question["id"]: (a, other, question) for a, other, question in reversed(candidates)}
    copied = json.loads(json.dumps(articles))
    for a, other, question in list(once.values())[:wanted]:
        moved = {
            "id": f"{question['id']}-elsewhere",
            "question": question["question"],
            "answers": [],
            "is_impossible": True,
        }
        copied[a]["paragraphs"][other]["qas"].append(moved)
    return copied


def _holds_answer(context: str, question: dict[str, Any]) -> bool:
    return any(answer["text"].lower() in context.lower() for answer in question["answers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a file in SQuAD's nested form")
    parser.add_argument("--test_share", type=float, default=0.25, help="share of the paragraphs for test.json")
    parser.add_argument("--unanswerable_share", type=float, default=0.0, help="added questions without an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    articles = json.loads(arguments.file.read_text(encoding="utf-8-sig"))["data"]
    sides = split_by_paragraph(articles, arguments.test_share, arguments.seed)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "test"), sides, strict=True):
        if arguments.unanswerable_share:
            side = add_unanswerable(side, arguments.unanswerable_share, arguments.seed)
        path = arguments.output_dir / f"{name}.json"
        path.write_text(json.dumps({"version": "1.1", "data": side}, ensure_ascii=False), encoding="utf-8")
        paragraphs = [paragraph for article in side for paragraph in article["paragraphs"]]
        questions = [question for paragraph in paragraphs for question in paragraph["qas"]]
        unanswerable = sum(not question["answers"] for question in questions)
        print(f"{path}: {len(paragraphs)} paragraphs, {len(questions)} questions, {unanswerable} without an answer")


if __name__ == "__main__":
    main()

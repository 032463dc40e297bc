"""train_classifier.py on texts that are followed by sentences which do not matter: a task for crops.

    python examples/study/train_with_distractors.py --distractor_file other.jsonl --distractors 4 …

After each text come `--distractors` sentences, drawn for each row from the texts of another data set. They are the
segments that crops remove; the text itself always stays.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

from train_classifier import main
from transformers import Trainer

from cmp_trainer.ablations.crop_collator import CmpCropCollator


def with_distractors(
    sentences: list[str], number: int, tokenizer: Any, texts: list[list[str]], max_length: int
) -> Any:
    """The inputs of `text [SEP] sentence sentence …`, with `crop_segments`: 0 for the text, 1, 2, … for sentences.

    The same text has the same sentences in every run.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "token_type_ids": [], "crop_segments": []}
    for text in texts[0]:
        draw = random.Random(text)
        ids = tokenizer(text)["input_ids"]
        types, segments = [0] * len(ids), [0] * len(ids)
        for segment, sentence in enumerate(draw.sample(sentences, number), start=1):
            added = tokenizer(sentence, add_special_tokens=False)["input_ids"]
            ids, types, segments = ids + added, types + [1] * len(added), segments + [segment] * len(added)
        ids = [*ids[: max_length - 1], tokenizer.sep_token_id]
        columns["input_ids"].append(ids)
        columns["token_type_ids"].append([*types, 1][: len(ids)])
        columns["crop_segments"].append([*segments[: len(ids) - 1], 0])
    columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
    return columns


def make_trainer(*args: Any, **kwargs: Any) -> Trainer:
    """With the collator that pads `crop_segments`."""
    return Trainer(*args, **{**kwargs, "data_collator": CmpCropCollator(kwargs["processing_class"])})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distractor_file", type=Path, required=True, help="jsonl whose texts are the sentences")
    parser.add_argument("--distractors", type=int, default=4, help="how many follow each text")
    given, sys.argv[1:] = parser.parse_known_args()
    lines = given.distractor_file.read_text(encoding="utf-8").splitlines()
    others = [json.loads(line)["text"] for line in lines]
    main(make_trainer, partial(with_distractors, others, given.distractors))

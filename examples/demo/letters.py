"""Generated letters: where was this letter written?

A letter mixes words of four places. The class is the place that most of its words belong to; the words of the other
places are distractors, at most one fewer each, and the rest of the letter says nothing. Which word belongs where is
not given, a model has to learn it from letters. Letters are drawn at random, so those of the evaluation are new.
"""

import random
from collections.abc import Iterator

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

PLACES = {
    "kitchen": "bread butter flour honey kettle ladle onion oven pepper plate recipe spoon",
    "garden": "apple bee bench fence hedge ivy lawn pond rake rose seed spade",
    "harbour": "anchor boat buoy captain crane gull mast net pier rope sail tide",
    "workshop": "bolt drill file glue hammer nail plane saw screw varnish vice wrench",
}
NOTHING = "a again and by day for he it left my of old on or out she so that then this to was we with"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_letters(count: int, seed: int) -> Dataset:
    """`count` rows of text and label (the number of the place), the same for the same seed."""
    return Dataset.from_list(list(_letters(count, random.Random(seed))))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `[CLS] letter [SEP]`."""
    words = SPECIAL + " ".join([*PLACES.values(), NOTHING]).split()
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _letters(count: int, draw: random.Random) -> Iterator[dict]:
    for _ in range(count):
        label, most = draw.randrange(len(PLACES)), draw.randint(3, 6)
        letter = draw.choices(NOTHING.split(), k=most)
        for number, words in enumerate(PLACES.values()):
            letter += draw.choices(words.split(), k=most if number == label else draw.randint(0, most - 1))
        draw.shuffle(letter)
        yield {"text": " ".join(letter), "label": label}

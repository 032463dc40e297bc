"""Questions, tokenizers and logits for the tests of extractive question answering."""

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cmp_trainer.data.questions import FEATURES
from cmp_trainer.data.windows import NO_LABEL, WindowSettings

SMALL = WindowSettings(max_seq_length=24, doc_stride=6, max_question_length=8)
CONTEXT = "The river rises in the north, passes nine old towns and ends in a lake that has no name on any map."


def word_pieces(*texts: str) -> Tokenizer:
    """A tokenizer that strips accents, as BERT's does."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator([CONTEXT, *texts], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_pairs() -> Tokenizer:
    """Every byte of an emoji is a token of its own; spaces belong to the token behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([CONTEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def questions(*rows: tuple[str, str, list[tuple[str, int]]]) -> Dataset:
    """A data set of (question, context, answers)."""
    return Dataset.from_list(
        [
            {
                "id": f"q{n}",
                "question": question,
                "context": context,
                "answers": {"text": [a[0] for a in answers], "answer_start": [a[1] for a in answers]},
            }
            for n, (question, context, answers) in enumerate(rows)
        ],
        features=FEATURES,
    )


def about(context: str, answer: str) -> Dataset:
    return questions(("what is it?", context, [(answer, context.index(answer))]))


def labelled_texts(examples: Dataset, windows: Dataset) -> list[str | None]:
    """The text that each window's labels stand for; None for the null label."""
    texts = []
    for window in windows:
        start, end = window["start_positions"], window["end_positions"]
        context = examples[window["example_index"]]["context"]
        is_null = start == end == window["null_position"]
        texts.append(None if is_null else context[window["token_starts"][start] : window["token_ends"][end]])
    return texts


def oracle_logits(windows: Dataset, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model that is sure of the labels."""
    width = max(width, max(len(ids) for ids in windows["input_ids"]))
    logits = np.zeros((2, len(windows), width), dtype=np.float32)
    for row, name in enumerate(("start_positions", "end_positions")):
        positions = np.array(windows[name])
        kept = np.flatnonzero(positions != NO_LABEL)
        logits[row, kept, positions[kept]] = 9.0
    return logits[0], logits[1]

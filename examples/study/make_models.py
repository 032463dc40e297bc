"""Make the folder of the small model that is trained from scratch: its configuration, and a tokenizer of its own.

    python examples/study/make_models.py DATA_FOLDER runs/study/models/small

The tokenizer's 8,000 word pieces are learned from the training texts under DATA_FOLDER.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import BertConfig, BertTokenizer

VOCABULARY = 8000


def main(data: Path, folder: Path) -> None:
    empty = BertTokenizer(vocab={name: at for at, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])})
    tokenizer = empty.train_new_from_iterator(texts(data), VOCABULARY)
    tokenizer.save_pretrained(folder)
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def texts(data: Path) -> Iterator[str]:
    """All texts of all training files, in the order of their paths."""
    for file in sorted(data.glob("**/train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from (
                value for name, value in json.loads(line).items() if name != "label" and isinstance(value, str)
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

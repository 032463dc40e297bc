"""The longest input that a model and its tokenizer take, checked before anything is encoded or trained.

A model with learned position embeddings fails at the first longer text, hours into a training perhaps. Models with
relative or rotary positions have no such table, and so no limit of their own.
"""

from typing import Any

from torch import nn

POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")


def check_length(argument: str, asked: int, tokenizer: Any, model: nn.Module) -> None:
    """Refuse a length that is no length, or more tokens than the model or its tokenizer takes.

    Args:
        argument: the argument's name, `--max_seq_length`.
        asked: its value.

    Raises:
        ValueError: names argument, value and limit.
    """
    if asked < 1:
        raise ValueError(f"{argument} {asked}: expected 1 or more")
    limit = longest_input(tokenizer, model)
    if limit is not None and asked > limit:
        raise ValueError(f"{argument} {asked} is more than the model takes; pass at most {limit}")


def longest_input(tokenizer: Any, model: nn.Module) -> int | None:
    """The smaller one of the tokenizer's limit and the model's number of positions; None where neither is known."""
    limits = [tokenizer.model_max_length, *_position_counts(model)]
    known = [limit for limit in limits if limit is not None and 0 < limit < 2**30]  # "no limit" is a huge number
    return min(known) if known else None


def _position_counts(model: nn.Module) -> list[int]:
    """How many positions each table of learned positions has for tokens.

    RoBERTa and its relatives count positions from the padding token's id on, BART and OPT from an offset of 2.
    """
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
    ]
    return [table.num_embeddings - _first_position(table) for table in tables]


def _first_position(table: nn.Embedding) -> int:
    return getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1

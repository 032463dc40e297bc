"""Which tokens may be removed: making the `crop_segments` column that CmpCrop reads.

0 marks the tokens of an example that must stay; 1, 2, … its removable segments, in their order. The column is made
when the texts are tokenized, from the character spans of what may go (`crop_segments_from_spans`), or where each
token's sequence is known anyway, from that (`crop_segments_from_sequence_ids`). Batches are then padded by
`cmp_trainer.ablations.crop.CmpCropCollator`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import BatchEncoding


def crop_segments_from_spans(
    encoding: BatchEncoding | Mapping[str, Any],
    texts: Sequence[str],
    removable: Sequence[Sequence[tuple[int, int]]],
    sequence: int = 0,
) -> list[list[int]]:
    """crop_segments of a tokenized batch, from the character spans of its texts that may be removed.

    A token belongs to a span when all its characters but white space lie inside; a token that reaches out of it stays.
    Special tokens and the other text of a pair stay. Windows of one text (`return_overflowing_tokens`) find their
    text by `overflow_to_sample_mapping`.

    Args:
        encoding: from a fast tokenizer, with `return_offsets_mapping=True`.
        texts: the texts that the offsets count in (the second ones, for `sequence=1`).
        removable: for each text its spans (start, end), end excluded, in their order, which is their numbering.
        sequence: which text of a pair the spans are of.

    Returns:
        One list for each row of the encoding, as long as its `input_ids`.

    Raises:
        ValueError: without offsets, for spans that overlap or leave their text, or where a text's every token is
            removable.
    """
    if not isinstance(encoding, BatchEncoding) or not encoding.is_fast or "offset_mapping" not in encoding:
        raise ValueError(
            "Spans need token offsets: call a fast tokenizer with return_offsets_mapping=True and a list of texts, "
            f"and pass on what it returns (given: {type(encoding).__name__})."
        )
    offsets: Any = encoding["offset_mapping"]
    samples: Any = encoding.get("overflow_to_sample_mapping", range(len(offsets)))
    if isinstance(texts, str) or len(set(map(int, samples))) != len(texts):
        raise ValueError(f"texts must be the list that was tokenized, {len(offsets)} rows; given: {texts!r:.200}.")
    if len(texts) != len(removable):
        raise ValueError(
            f"{len(texts)} texts, but spans for {len(removable)}; give a list (it may be empty) for each."
        )
    for index, spans in enumerate(removable):
        _check_spans(spans, texts[index], index)
    rows = []
    stays, goes = [False] * len(texts), [False] * len(texts)
    for row, sample in enumerate(map(int, samples)):
        positions = encoding.sequence_ids(row)
        inside = [position == sequence for position in positions]
        segments = _segments_of_offsets(offsets[row], inside, texts[sample], removable[sample])
        goes[sample] |= any(segments)
        stays[sample] |= any(p is not None and not s for p, s in zip(positions, segments, strict=True))
        rows.append(segments)
    for sample in range(len(texts)):
        if goes[sample] and not stays[sample]:
            raise ValueError(
                f"Every token of text {sample} is removable, so a crop could leave nothing of it; leave out the spans "
                "of what must stay."
            )
    return rows


def crop_segments_from_sequence_ids(
    sequence_ids: Sequence[Sequence[int | None]], removable: Sequence[Collection[int]] | Collection[int]
) -> list[list[int]]:
    """crop_segments of a batch whose every token is known to belong to a sequence: a text, a passage, a sentence.

    Args:
        sequence_ids: for each row, each token's sequence, as `BatchEncoding.sequence_ids(row)` gives it; None for
            tokens of no sequence, which stay.
        removable: the sequences that may be removed, for all rows or for each; they are numbered 1, 2, … in the order
            they come in.

    >>> crop_segments_from_sequence_ids([[None, 0, None, 1, 1, None, 2]], removable={1, 2})
    [[0, 0, 0, 1, 1, 0, 2]]
    """
    each: list[Any] = list(removable)
    per_row = each if any(isinstance(item, Collection) for item in each) else [each] * len(sequence_ids)
    if len(per_row) != len(sequence_ids):
        raise ValueError(f"{len(sequence_ids)} rows, but removable sequences for {len(per_row)}.")
    rows = []
    for ids, allowed in zip(sequence_ids, per_row, strict=True):
        present = dict.fromkeys(one for one in ids if one in allowed)
        numbers = {one: number for number, one in enumerate(present, start=1)}
        rows.append([0 if one is None else numbers.get(one, 0) for one in ids])
    return rows


def _check_spans(spans: Sequence[tuple[int, int]], text: str, index: int) -> None:
    reached = 0
    for start, end in sorted(spans):
        if not (reached <= start < end <= len(text)):
            raise ValueError(
                f"Text {index} has {len(text)} characters; its removable span ({start}, {end}) is empty, leaves the "
                "text or overlaps another. Spans are (start, end) in characters, end excluded."
            )
        reached = end


def _segments_of_offsets(offsets: Any, inside: list[bool], text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    segments = [0] * len(inside)
    following = 0  # a token of white space alone goes with the word it precedes
    for token in reversed(range(len(inside))):
        if not inside[token]:
            following = 0
            continue
        start, end = (int(edge) for edge in offsets[token])
        piece = text[start:end]
        start, end = end - len(piece.lstrip()), start + len(piece.rstrip())
        if start < end:
            numbered = enumerate(spans, start=1)
            following = next((number for number, (first, last) in numbered if first <= start and end <= last), 0)
        segments[token] = following
    return segments

"""Making the `crop_segments` column, which tells CmpCrop which tokens may be removed.

0 marks the tokens of an example that must stay; 1, 2, … mark its removable segments, in their order. Make the column
when you tokenize: from the character spans of removable text (`crop_segments_from_spans`), or, if you know to which
sequence each token belongs, from that (`crop_segments_from_sequence_ids`). `CmpCropCollator` then pads it.
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

    A token belongs to a span when all its characters except white space lie inside; a token that is only partly in a
    span stays. Special tokens and the other text of a pair stay. Windows of one text (`return_overflowing_tokens`)
    are matched to their text by `overflow_to_sample_mapping`.

    Args:
        encoding: the output of a fast tokenizer, called with `return_offsets_mapping=True`.
        texts: the tokenized texts; the second texts of the pairs for `sequence=1`.
        removable: the spans (start, end) of each text, end excluded; they are numbered in the order given.
        sequence: which text of a pair the spans belong to, 0 or 1.

    Returns:
        One list for each row of the encoding, as long as its `input_ids`.

    Raises:
        ValueError: if there are no offsets, if spans overlap or leave their text, or if every token of a text is
            removable.
    """
    if not isinstance(encoding, BatchEncoding) or not encoding.is_fast or "offset_mapping" not in encoding:
        raise ValueError(
            "Spans need token offsets. Call a fast tokenizer with a list of texts and return_offsets_mapping=True, "
            f"and pass its output; got {type(encoding).__name__}."
        )
    offsets: Any = encoding["offset_mapping"]
    samples: Any = encoding.get("overflow_to_sample_mapping", range(len(offsets)))
    if isinstance(texts, str) or len(set(map(int, samples))) != len(texts):
        raise ValueError(f"texts must be the list that was tokenized ({len(offsets)} rows); got {texts!r:.200}.")
    if len(texts) != len(removable):
        raise ValueError(
            f"Got {len(texts)} texts, but spans for {len(removable)}; pass a list of spans, possibly empty, for each."
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
                f"Every token of text {sample} is removable, so a crop could leave nothing of it; do not pass spans "
                "of text that must stay."
            )
    return rows


def crop_segments_from_sequence_ids(
    sequence_ids: Sequence[Sequence[int | None]], removable: Sequence[Collection[int]] | Collection[int]
) -> list[list[int]]:
    """crop_segments of a batch, from the sequence that each token belongs to: a text, a passage, a sentence.

    Args:
        sequence_ids: for each row, the sequence of each token, as returned by `BatchEncoding.sequence_ids(row)`. None
            means no sequence; these tokens stay.
        removable: the sequences that may be removed, one collection for all rows or one for each row. They are
            numbered 1, 2, … in order of appearance.

    Returns:
        One list for each row, as long as its sequence ids.

    Raises:
        ValueError: if there are collections for another number of rows.

    >>> crop_segments_from_sequence_ids([[None, 0, None, 1, 1, None, 2]], removable={1, 2})
    [[0, 0, 0, 1, 1, 0, 2]]
    """
    each: list[Any] = list(removable)
    per_row = each if any(isinstance(item, Collection) for item in each) else [each] * len(sequence_ids)
    if len(per_row) != len(sequence_ids):
        raise ValueError(
            f"Got {len(sequence_ids)} rows, but removable sequences for {len(per_row)}; pass one collection for each "
            "row, or one for all."
        )
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
                "text or overlaps another. Spans are (start, end) in characters, with the end excluded."
            )
        reached = end


def _segments_of_offsets(offsets: Any, inside: list[bool], text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    segments = [0] * len(inside)
    following = 0  # a token of white space alone belongs to the word after it
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

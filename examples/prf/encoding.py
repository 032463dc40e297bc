"""Encoding a corpus: every passage through a frozen encoder, once, kept on disk.

The corpus is cut into blocks of rows. Each block is one file (dense: `.npy`, memory-mapped when read; sparse:
`.npz`), written under another name and renamed when complete. So a block that exists is whole: an interrupted
encoding continues with the blocks that are missing, and under `accelerate launch` (or torchrun) each process takes
every n-th of them, with any number of processes. `encoding.json` says what was encoded by what; anything else in the
same folder is rejected.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from accelerate import PartialState
from collection import Passages, read_jsonl
from feedback import query_inputs
from reformulators import Reformulator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from cmp_trainer.checks.settings import check_launch
from cmp_trainer.saving.files import written_whole

BLOCK_SIZE = 1_024
Vectors = Any  # (rows, dimension): np.ndarray, or sp.csr_matrix of sparse encodings


@dataclass(frozen=True)
class EncodingCard:
    """What an encoding is of: compared before it is continued, searched or trained on."""

    encoder: str
    corpus: str
    passages: int
    dimension: int
    max_length: int
    form: str  # dense or sparse
    dtype: str
    block_size: int = BLOCK_SIZE
    terms: int | None = None

    def check(self, path: Path) -> None:
        """Raises ValueError where the card in `path` differs, naming each difference."""
        check_card(path, asdict(self))

    def write(self, path: Path) -> None:
        with written_whole(path) as file:
            file.write_text(json.dumps(asdict(self), indent=1) + "\n")


class EncodedCorpus:
    """A complete encoding on disk. Blocks are mapped as they are read, never all in memory."""

    def __init__(self, folder: Path, card: EncodingCard) -> None:
        self.folder, self.card = folder, card

    def __len__(self) -> int:
        return self.card.passages

    def block(self, number: int) -> Vectors:
        return load_block(block_path(self.folder, self.card, number))

    def blocks(self) -> Iterator[Vectors]:
        return (self.block(number) for number in range(num_blocks(self.card)))

    def rows(self, rows: Sequence[int] | np.ndarray) -> Vectors:
        """The vectors of these rows, in their order: (rows, dimension)."""
        rows = np.asarray(rows, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // self.card.block_size, return_index=True)
        parts = [
            self.block(int(number))[rows[chunk] % self.card.block_size]
            for number, chunk in zip(numbers, np.split(order, starts[1:]), strict=True)
        ]
        return stack(parts, self.card.form)[np.argsort(order, kind="stable")]


def encode_corpus(
    model: Reformulator,
    tokenizer: PreTrainedTokenizerBase,
    passages: Passages,
    folder: str | Path,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    dtype: str = "float32",
    block_size: int = BLOCK_SIZE,
    terms: int | None = None,
) -> EncodedCorpus:
    """Encode all passages, or what is missing of them, on every process of this launch. Of a sparse vector the `terms`
    largest weights are kept, or all of them.

    Raises ValueError where the folder holds the encoding of another encoder, corpus or setting."""
    folder = Path(folder)
    form = "sparse" if hasattr(model.config, "zeroed_ids") else "dense"
    card = EncodingCard(
        encoder=model_fingerprint(model), corpus=passages.fingerprint, passages=len(passages),
        dimension=model.dimension, max_length=max_length, form=form, dtype=dtype, block_size=block_size,
        terms=terms,
    )  # fmt: skip

    def encode_block(rows: range) -> Vectors:
        texts = passages.texts(rows)
        vectors = encode_texts(model, tokenizer, texts, max_length=max_length, batch_size=batch_size, form=form)
        return (largest_terms(vectors, terms) if terms else vectors).astype(dtype)

    return write_blocks(folder, card, encode_block)


def import_sparse_vectors(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, passages: Passages, folder: str | Path, scale: float = 1.0
) -> EncodedCorpus:
    """Published sparse passage vectors, as uniCOIL's: jsonl files of `{"_id" or "id", "vector": {token: weight}}`.
    Weights are multiplied by `scale`: those stored as whole numbers become what the encoder wrote.

    Raises ValueError where a passage has no vector or a token is not of this vocabulary."""
    card = EncodingCard(
        encoder=f"vectors of {Path(source).name} times {scale}", corpus=passages.fingerprint, passages=len(passages),
        dimension=len(tokenizer), max_length=0, form="sparse", dtype="float32",
    )  # fmt: skip

    @functools.cache
    def weights() -> dict[str, tuple[np.ndarray, np.ndarray]]:  # read only where a block is missing
        return published_weights(Path(source), tokenizer.get_vocab(), passages, scale)

    def take_block(rows: range) -> sp.csr_matrix:
        found = [weights()[passages.ids[row]] for row in rows]
        ends = np.cumsum([0] + [len(columns) for columns, _ in found])
        columns = np.concatenate([columns for columns, _ in found])
        values = np.concatenate([values for _, values in found])
        return sp.csr_matrix((values, columns, ends), shape=(len(found), card.dimension))

    return write_blocks(Path(folder), card, take_block)


def published_weights(
    source: Path, vocabulary: dict[str, int], passages: Passages, scale: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By passage: the columns of its vector and their weights."""
    weights = {}
    for path in sorted(source.glob("*.jsonl")):
        for number, passage, record in read_jsonl(path, "vector"):
            vector = record["vector"]
            if not isinstance(vector, dict) or not all(is_weight(weight) for weight in vector.values()):
                raise ValueError(f"{path}, line {number}: vector must give each token a finite number")
            unknown = [token for token in vector if token not in vocabulary]
            if unknown:
                raise ValueError(f"{path}, line {number}: tokens {unknown[:3]} are not in the tokenizer's vocabulary")
            columns = np.array([vocabulary[token] for token in vector], dtype=np.int32)
            weights[passage] = (columns, np.array(list(vector.values()), dtype=np.float32) * np.float32(scale))
    missing = [passage for passage in passages.ids if passage not in weights]
    if missing:
        raise ValueError(f"{source}: {len(missing)} of {len(passages)} passages have no vector, e.g. {missing[0]}")
    return weights


def is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def write_blocks(folder: Path, card: EncodingCard, make_block: Callable[[range], Vectors]) -> EncodedCorpus:
    """Make the blocks that are missing, shared among the processes of this launch."""
    state = PartialState()
    check_launch(state.num_processes)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "encoding.json").exists():
        card.check(folder / "encoding.json")
    state.wait_for_everyone()  # checked by all before one writes
    if state.is_main_process:
        card.write(folder / "encoding.json")
    missing = [number for number in range(num_blocks(card)) if not block_path(folder, card, number).exists()]
    state.wait_for_everyone()  # every process has seen the same list before the first block is added to it
    mine = missing[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="encoding", unit="block", disable=not state.is_local_main_process):
        start = number * card.block_size
        rows = range(start, min(start + card.block_size, card.passages))
        save_block(block_path(folder, card, number), make_block(rows))
    state.wait_for_everyone()
    return EncodedCorpus(folder, card)


@torch.inference_mode()
def encode_texts(
    model: Reformulator,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    feedback: Sequence[Sequence[str]] | None = None,
    max_length: int = 128,
    feedback_length: int = 128,
    total_length: int | None = None,
    batch_size: int = 64,
    form: str = "dense",
) -> Vectors:
    """The vectors of texts, or of queries with their feedback passages: (texts, dimension), in the texts' order.

    Batches hold texts of about equal length, longest first, so that little is padding and memory runs out at once or
    never."""
    feedback = feedback or [()] * len(texts)
    inputs = query_inputs(tokenizer, texts, feedback, max_length, feedback_length, total_length)
    order = sorted(range(len(texts)), key=lambda i: -len(inputs[i]["input_ids"]))
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    parts: list[Vectors] = []
    for start in range(0, len(order), batch_size):
        chosen = [{"input_ids": inputs[i]["input_ids"]} for i in order[start : start + batch_size]]
        batch = tokenizer.pad(chosen, return_tensors="pt").to(device)
        vectors = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).query_vectors
        vectors = vectors.float().cpu().numpy()
        if not np.isfinite(vectors).all():
            raise ValueError("the encoder writes vectors that hold NaN or infinity, which nothing can be searched by")
        parts.append(sp.csr_matrix(vectors) if form == "sparse" else vectors)
    model.train(was_training)
    return stack(parts, form)[np.argsort(order)]


def check_card(path: Path, card: Mapping[str, Any]) -> None:
    """Raises ValueError where the card in `path` is missing or differs, naming each difference."""
    if not path.exists():
        raise ValueError(
            f"{path} is missing, which says what the files beside it are of; remove them to make them anew"
        )
    found = json.loads(path.read_text())
    differing = [
        f"{key}: there {found.get(key)}, here {value}" for key, value in card.items() if found.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path} is of another encoder, corpus or setting ({'; '.join(differing)}); give another folder, or "
            "remove this one to make it anew"
        )


def largest_terms(vectors: Vectors, number: int) -> sp.csr_matrix:
    """The `number` largest weights of each row; of equal ones those of the first columns."""
    rows = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
    order = np.lexsort((vectors.indices, -vectors.data, rows))
    places = np.arange(len(order)) - vectors.indptr[rows]  # of each weight in its row, the largest first
    kept = order[places < number]
    return sp.csr_matrix((vectors.data[kept], (rows[kept], vectors.indices[kept])), shape=vectors.shape)


def model_fingerprint(model: Reformulator) -> str:
    """Hash of the config's and all weights' bytes: two encoders with one fingerprint write the same vectors."""
    digest = hashlib.sha256(repr(sorted(model.config.to_diff_dict().items())).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def stack(parts: list[Vectors], form: str) -> Vectors:
    return sp.vstack(parts, format="csr") if form == "sparse" else np.concatenate(parts)


def num_blocks(card: EncodingCard) -> int:
    return -(-card.passages // card.block_size)


def block_path(folder: Path, card: EncodingCard, number: int) -> Path:
    return folder / f"block-{number:05d}.{'npz' if card.form == 'sparse' else 'npy'}"


def save_block(path: Path, block: Vectors) -> None:
    with written_whole(path) as file:
        if isinstance(block, np.ndarray):
            np.save(file, block)
        else:
            sp.save_npz(file, block, compressed=False)


def load_block(path: Path) -> Vectors:
    return sp.load_npz(path).tocsr() if path.suffix == ".npz" else np.load(path, mmap_mode="r")

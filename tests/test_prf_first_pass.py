"""examples/prf: encoding that can be interrupted, and search in dense and sparse indexes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import encoding
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from collection import Passages, load_collection
from datasets import Dataset
from demo_collection import write_demo
from encoding import EncodingCard, encode_corpus, encode_texts, import_sparse_vectors
from first_pass import DenseIndex, SparseIndex, bm25_run, search_run
from reformulators import DenseReformulator, SparseReformulator
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo / "encoder")


@pytest.fixture(scope="module")
def dense(demo):
    return DenseReformulator.from_encoder(str(demo / "encoder"), pooling="mean", normalize=True).eval()


@pytest.fixture(scope="module")
def sparse(demo, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=1.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SparseReformulator.from_encoder(str(folder)).eval()


@pytest.fixture(scope="module")
def passages(demo) -> Passages:
    records = [json.loads(line) for line in (demo / "collection" / "corpus.jsonl").read_text().splitlines()[:40]]
    return Passages(Dataset.from_dict({"id": [r["_id"] for r in records], "text": [r["text"] for r in records]}))


def test_an_interrupted_encoding_continues_with_the_missing_blocks(dense, tokenizer, passages, tmp_path):
    whole = encode_corpus(dense, tokenizer, passages, tmp_path, block_size=16)
    wanted = whole.rows(range(40)).copy()
    kept, lost = tmp_path / "block-00000.npy", tmp_path / "block-00001.npy"
    lost.unlink()
    written = kept.stat().st_mtime_ns
    again = encode_corpus(dense, tokenizer, passages, tmp_path, block_size=16)
    assert kept.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.rows(range(40)), wanted)


SHARED = """
import sys
sys.path.insert(0, sys.argv[1])
from collection import load_collection
from encoding import encode_corpus
from reformulators import DenseReformulator
from transformers import AutoTokenizer

demo, folder = sys.argv[2:]
model = DenseReformulator.from_encoder(f"{demo}/encoder", pooling="mean", normalize=True)
passages = load_collection(f"{demo}/collection:test").passages
encode_corpus(model, AutoTokenizer.from_pretrained(f"{demo}/encoder"), passages, folder, block_size=100)
"""


def test_two_processes_share_the_blocks_of_an_encoding(demo, dense, tokenizer, tmp_path):
    (tmp_path / "shared.py").write_text(SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    folder = str(Path(encoding.__file__).parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*launch, "shared.py", folder, str(demo), "vectors"], check=True, cwd=tmp_path, env=environment, timeout=500
    )
    passages = load_collection(f"{demo}/collection:test").passages
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path / "vectors", block_size=100)
    assert len(list((tmp_path / "vectors").glob("block-*.npy"))) == 6
    rows = [0, 99, 100, 250, 511]
    np.testing.assert_allclose(corpus.rows(rows), encode_texts(dense, tokenizer, passages.texts(rows)), atol=1e-5)


def test_a_vector_does_not_depend_on_the_batch_it_was_encoded_in(dense, tokenizer, passages):
    texts = passages.texts(range(12))
    texts[3] = " ".join(texts)
    together = encode_texts(dense, tokenizer, texts, batch_size=12)
    alone = np.concatenate([encode_texts(dense, tokenizer, [text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_rows_come_in_the_order_asked_for(dense, tokenizer, passages, tmp_path):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path, block_size=7)
    everything = np.concatenate(list(corpus.blocks()))
    rows = [39, 0, 8, 8, 6, 7]
    np.testing.assert_array_equal(corpus.rows(rows), everything[rows])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_length": 9}, "max_length: there 128, here 9"),
        ({"dtype": "float16"}, "dtype: there float32, here float16"),
    ],
)
def test_an_encoding_with_other_settings_is_refused(dense, tokenizer, passages, tmp_path, change, message):
    encode_corpus(dense, tokenizer, passages, tmp_path)
    with pytest.raises(ValueError, match=message):
        encode_corpus(dense, tokenizer, passages, tmp_path, **change)


def test_an_encoding_and_its_index_by_another_encoder_are_refused(demo, dense, tokenizer, passages, tmp_path):
    encode_corpus(dense, tokenizer, passages, tmp_path / "one")
    other = DenseReformulator.from_encoder(str(demo / "encoder"), pooling="mean", normalize=True)
    with torch.no_grad():
        next(other.parameters())[7, 0] += 1e-3
    with pytest.raises(ValueError, match="of another encoder, corpus or setting"):
        encode_corpus(other, tokenizer, passages, tmp_path / "one")
    DenseIndex(encode_corpus(dense, tokenizer, passages, tmp_path / "one"), tmp_path / "index.faiss")
    with pytest.raises(ValueError, match="encoder: there"):
        DenseIndex(encode_corpus(other, tokenizer, passages, tmp_path / "two"), tmp_path / "index.faiss")


def test_an_index_of_another_size_is_refused(dense, tokenizer, passages, tmp_path):
    DenseIndex(encode_corpus(dense, tokenizer, passages, tmp_path / "one"), tmp_path / "index.faiss")
    fewer = Passages(passages.dataset.select(range(10)))
    with pytest.raises(ValueError, match="passages: there 40, here 10"):
        DenseIndex(encode_corpus(dense, tokenizer, fewer, tmp_path / "two"), tmp_path / "index.faiss")


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF2,Flat"])
def test_dense_search_finds_the_best_inner_products(dense, tokenizer, passages, tmp_path, factory):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path, block_size=16)
    queries = encode_texts(dense, tokenizer, passages.texts(range(5)))
    scores = queries @ corpus.rows(range(40)).T
    for _ in ("built", "loaded"):
        rows, found = DenseIndex(corpus, tmp_path / "index.faiss", factory).search(queries, 3)
        np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :3], rtol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(scores, rows, axis=1), found, rtol=1e-5)


def test_sparse_search_finds_the_best_inner_products(sparse, tokenizer, passages, tmp_path):
    corpus = encode_corpus(sparse, tokenizer, passages, tmp_path / "vectors", block_size=16)
    queries = encode_texts(sparse, tokenizer, passages.texts(range(5)), form="sparse")
    scores = (queries @ sp.vstack(list(corpus.blocks())).T).toarray()
    for _ in ("built", "loaded"):
        rows, found = SparseIndex(corpus, tmp_path / "postings").search(queries, 3)
        np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :3], rtol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(scores, rows, axis=1), found, rtol=1e-5)


def test_a_query_without_common_terms_finds_nothing(tmp_path, tokenizer, passages):
    vectors = tmp_path / "published"
    vectors.mkdir()
    word = tokenizer.convert_ids_to_tokens(9)
    lines = [json.dumps({"id": passage, "vector": {word: 1.5}}) for passage in passages.ids]
    (vectors / "part.jsonl").write_text("\n".join(lines))
    corpus = import_sparse_vectors(vectors, tokenizer, passages, tmp_path / "vectors")
    index = SparseIndex(corpus, tmp_path / "postings")
    queries = sp.csr_matrix(([2.0, 1.0], ([0, 1], [9, 8])), shape=(2, len(tokenizer)))
    run = search_run(index, queries, ["hit", "miss"], passages, 2)
    assert run["hit"] == [(passages.ids[0], 3.0), (passages.ids[1], 3.0)]
    assert run["miss"] == []


def test_published_vectors_must_cover_the_corpus(tmp_path, tokenizer, passages):
    (tmp_path / "part.jsonl").write_text(json.dumps({"id": passages.ids[0], "vector": {}}))
    with pytest.raises(ValueError, match="39 of 40 passages have no vector"):
        import_sparse_vectors(tmp_path, tokenizer, passages, tmp_path / "vectors")


def test_bm25_ranks_the_passage_itself_first_and_keeps_its_index(passages, tmp_path):
    queries = {passages.ids[row]: text for row, text in enumerate(passages.texts(range(4)))}
    first = bm25_run(passages, queries, tmp_path / "bm25", 5)
    assert [ranked[0][0] for ranked in first.values()] == passages.ids[:4]
    assert bm25_run(passages, queries, tmp_path / "bm25", 5) == first
    fewer = Passages(passages.dataset.select(range(10)))
    with pytest.raises(ValueError, match="BM25 index of another corpus"):
        bm25_run(fewer, queries, tmp_path / "bm25", 5)


def test_a_card_says_what_differs(tmp_path):
    card = EncodingCard("a", "b", 3, 4, 5, "dense", "float32")
    card.write(tmp_path / "card.json")
    card.check(tmp_path / "card.json")
    with pytest.raises(ValueError, match="corpus: there b, here other"):
        EncodingCard("a", "other", 3, 4, 5, "dense", "float32").check(tmp_path / "card.json")

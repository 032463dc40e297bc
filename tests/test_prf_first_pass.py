"""examples/prf: encoding that can be interrupted, and search in dense and sparse indexes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import encoding
import faiss
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from collection import Passages, load_collection
from datasets import Dataset
from demo_collection import write_demo
from encoding import EncodingCard, encode_corpus, encode_texts, import_sparse_vectors, largest_terms
from first_pass import DenseIndex, SparseIndex, best_passages, bm25_run, empty_index, most_clusters, search_run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
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
def masked_lm(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=1.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sparse(masked_lm):
    return SparseReformulator.from_encoder(masked_lm).eval()


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


@pytest.mark.parametrize("log_saturation", [False, True])
def test_sparse_vectors_are_the_head_by_hand_whatever_the_padding(
    masked_lm, tokenizer, passages, tmp_path, log_saturation
):
    model = SparseReformulator.from_encoder(masked_lm, normalize=False, scale=2.0, log_saturation=log_saturation)
    texts = [
        *passages.texts(range(6)),
        " ".join(passages.texts(range(3))),
    ]  # the last is longer: the others get padding
    some = Passages(Dataset.from_dict({"id": list("abcdefg"), "text": texts}))
    found = encode_corpus(model, tokenizer, some, tmp_path, batch_size=7).rows(range(7))
    head = BertForMaskedLM.from_pretrained(masked_lm).eval()
    for row, text in enumerate(texts):
        with torch.no_grad():
            logits = head(**tokenizer(text, return_tensors="pt")).logits[0].numpy()  # (tokens, vocabulary)
        weights = np.maximum(logits.max(axis=0), 0)
        assert weights[tokenizer.all_special_ids].any()  # there is something to leave out
        weights[tokenizer.all_special_ids] = 0
        wanted = 2 * (np.log(1 + weights) if log_saturation else weights)
        np.testing.assert_allclose(found[row].toarray()[0], wanted, rtol=1e-4, atol=1e-4)
        assert found[row].nnz == (wanted > 0).sum()


def test_an_interrupted_sparse_encoding_continues_with_the_missing_blocks(sparse, tokenizer, passages, tmp_path):
    whole = encode_corpus(sparse, tokenizer, passages, tmp_path, block_size=16).rows(range(40)).toarray()
    kept, lost = tmp_path / "block-00000.npz", tmp_path / "block-00001.npz"
    lost.unlink()
    written = kept.stat().st_mtime_ns
    again = encode_corpus(sparse, tokenizer, passages, tmp_path, block_size=16).rows(range(40))
    assert kept.stat().st_mtime_ns == written
    np.testing.assert_array_equal(again.toarray(), whole)


def test_a_passage_keeps_its_largest_weights(sparse, tokenizer, passages, tmp_path):
    whole = encode_corpus(sparse, tokenizer, passages, tmp_path / "whole").rows(range(40)).toarray()
    cut = encode_corpus(sparse, tokenizer, passages, tmp_path / "cut", terms=5).rows(range(40)).toarray()
    least = -np.sort(-whole, axis=1)[:, 4:5]
    np.testing.assert_array_equal(cut, np.where(whole >= least, whole, 0))
    with pytest.raises(ValueError, match="terms: there 5, here 6"):
        encode_corpus(sparse, tokenizer, passages, tmp_path / "cut", terms=6)


def test_of_equal_weights_the_first_entries_are_kept_and_short_rows_stay():
    vectors = sp.csr_matrix(np.array([[1, 0, 3, 1, 1], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]], dtype=np.float32))
    wanted = [[1, 0, 3, 0, 0], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]]
    np.testing.assert_array_equal(largest_terms(vectors, 2).toarray(), wanted)


SHARED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate import PartialState
from collection import load_collection
from encoding import encode_corpus
from reformulators import DenseReformulator, SparseReformulator
from transformers import AutoTokenizer

demo, masked_lm, folder, cpu = sys.argv[2:]
state = PartialState(cpu=cpu == "cpu")
tokenizer = AutoTokenizer.from_pretrained(f"{demo}/encoder")
passages = load_collection(f"{demo}/collection:test").passages
model = DenseReformulator.from_encoder(f"{demo}/encoder", pooling="mean", normalize=True)
encode_corpus(model, tokenizer, passages, folder + "/dense", block_size=100)
encode_corpus(SparseReformulator.from_encoder(masked_lm), tokenizer, passages, folder + "/sparse", block_size=100)
Path(f"process {state.process_index + 1} of {state.num_processes}").touch()
state.destroy_process_group()
"""


def launch_two(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "shared.py").write_text(SHARED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command = [*launch, "shared.py", str(Path(encoding.__file__).parent), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def test_two_processes_share_the_blocks_of_an_encoding(demo, masked_lm, dense, sparse, tokenizer, tmp_path):
    done = launch_two(tmp_path, str(demo), masked_lm, "vectors", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("process *")) == ["process 1 of 2", "process 2 of 2"]
    passages = load_collection(f"{demo}/collection:test").passages
    rows = [0, 99, 100, 250, 511]
    for name, model in (("dense", dense), ("sparse", sparse)):
        assert len(list((tmp_path / "vectors" / name).glob("block-*.np?"))) == 6
        corpus = encode_corpus(model, tokenizer, passages, tmp_path / "vectors" / name, block_size=100)
        wanted = encode_texts(model, tokenizer, passages.texts(rows), form=name)
        np.testing.assert_allclose(as_array(corpus.rows(rows)), as_array(wanted), atol=1e-5)


def test_two_processes_that_do_not_know_of_each_other_encode_nothing(demo, masked_lm, tmp_path):
    done = launch_two(tmp_path, str(demo), masked_lm, "vectors", "unknown")
    assert done.returncode and "2 processes were launched, but this one knows of 1" in done.stderr
    assert not (tmp_path / "vectors").exists()


def as_array(vectors) -> np.ndarray:
    return vectors if isinstance(vectors, np.ndarray) else vectors.toarray()


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


def test_a_sparse_index_by_another_encoder_is_refused(masked_lm, sparse, tokenizer, passages, tmp_path):
    other = SparseReformulator.from_encoder(masked_lm, log_saturation=True)
    one, two = (encode_corpus(m, tokenizer, passages, tmp_path / n) for m, n in ((sparse, "one"), (other, "two")))
    SparseIndex(one, tmp_path / "postings")
    with pytest.raises(ValueError, match="encoder: there"):
        SparseIndex(two, tmp_path / "postings")
    card = json.loads((tmp_path / "postings" / "index.json").read_text())
    assert (card["form"], card["passages"], card["dimension"]) == ("sparse", 40, len(tokenizer))


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


@pytest.mark.parametrize("factory", ["PCA32,IVF8,Flat", "IVF8,Flat,RFlat"])
def test_an_ivf_index_inside_of_another_is_searched_as_deep(dense, tokenizer, passages, tmp_path, factory):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path)
    queries = encode_texts(dense, tokenizer, passages.texts(range(5)))
    rows, _ = DenseIndex(corpus, tmp_path / "index.faiss", factory, depth=8).search(queries, 40)
    assert (np.sort(rows, axis=1) == np.arange(40)).all()  # all lists are visited; one of eight would hold a few


def test_an_hnsw_index_inside_of_another_is_searched_as_deep(dense, tokenizer, passages, tmp_path):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path)
    index = DenseIndex(corpus, tmp_path / "index.faiss", "PCA32,HNSW8", depth=77).index
    assert faiss.downcast_index(index.index).hnsw.efSearch == 77


def test_an_index_that_faiss_does_not_know_is_refused(dense, tokenizer, passages, tmp_path):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path)
    with pytest.raises(
        ValueError, match=r"--index Bogus is no index that FAISS can make of 64 dimensions .*could not parse"
    ):
        DenseIndex(corpus, tmp_path / "index.faiss", "Bogus")


@pytest.mark.parametrize(
    "factory",
    ["IVF300,Flat", "IVF64,PQ8", "PQ8x4", "OPQ8,PQ8x4", "PCA32,IVF80,Flat", "IVF200_HNSW32,Flat", "HNSW32_PQ8",
     "IVF8,PQ8x4,Refine(PQ8)", "IVF8,RQ2x8", "IVF16,RaBitQ"],
)  # fmt: skip
def test_an_index_needs_as_many_passages_as_its_largest_part_has_clusters(factory):
    needed = most_clusters(faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT))
    vectors = np.random.default_rng(0).normal(size=(needed, 64)).astype(np.float32)
    empty_index(factory, 64, needed).train(vectors)
    with pytest.raises(RuntimeError, match=f"number of clusters \\({needed}\\)"):
        faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT).train(vectors[:-1])
    with pytest.raises(ValueError, match=rf"has {needed} clusters to train, .* \({needed - 1}\)"):
        empty_index(factory, 64, needed - 1)


def test_an_index_that_cannot_be_filled_is_refused_in_one_line(dense, tokenizer, passages, tmp_path):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path)
    with pytest.raises(ValueError, match=r"--index IDMap,Flat .*use add_with_ids"):
        DenseIndex(corpus, tmp_path / "index.faiss", "IDMap,Flat")


def test_an_index_without_its_card_is_refused(dense, tokenizer, passages, tmp_path):
    corpus = encode_corpus(dense, tokenizer, passages, tmp_path)
    DenseIndex(corpus, tmp_path / "index.faiss")
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index.json is missing"):
        DenseIndex(corpus, tmp_path / "index.faiss")


def test_vectors_that_are_no_numbers_are_refused(demo, tokenizer, passages, tmp_path):
    broken = DenseReformulator.from_encoder(str(demo / "encoder"))
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        encode_corpus(broken, tokenizer, passages, tmp_path)


def test_sparse_search_finds_the_best_inner_products(sparse, tokenizer, passages, tmp_path):
    corpus = encode_corpus(sparse, tokenizer, passages, tmp_path / "vectors", block_size=16)
    queries = encode_texts(sparse, tokenizer, passages.texts(range(5)), form="sparse")
    scores = (queries @ sp.vstack(list(corpus.blocks())).T).toarray()
    for _ in ("built", "loaded"):
        rows, found = SparseIndex(corpus, tmp_path / "postings").search(queries, 3)
        np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :3], rtol=1e-5)
        np.testing.assert_allclose(np.take_along_axis(scores, rows, axis=1), found, rtol=1e-5)


WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])  # exact in floats and few, so that there are ties


@given(query=arrays(np.float32, 6, elements=WEIGHTS), corpus=arrays(np.float32, (20, 6), elements=WEIGHTS),
       number=st.integers(1, 25))  # fmt: skip
def test_sparse_search_is_brute_force_with_the_first_of_equal_passages_first(query, corpus, number):
    scores = corpus @ query
    wanted = [row for row in np.argsort(-scores, kind="stable") if scores[row] > 0][:number]
    rows, found = best_passages(sp.csr_matrix(query[None]), sp.csr_matrix(corpus.T), number)
    assert rows.tolist() == wanted
    np.testing.assert_array_equal(found, scores[wanted])


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


def test_published_vectors_are_read_once(tmp_path, tokenizer, passages):
    vectors = tmp_path / "published"
    vectors.mkdir()
    lines = [json.dumps({"id": passage, "vector": {}}) for passage in passages.ids]
    (vectors / "part.jsonl").write_text("\n".join(lines))
    import_sparse_vectors(vectors, tokenizer, passages, tmp_path / "vectors")
    (vectors / "part.jsonl").unlink()
    assert len(import_sparse_vectors(vectors, tokenizer, passages, tmp_path / "vectors")) == 40


@pytest.mark.parametrize(
    "line, message",
    [('{"id": "p"}', "expected an object with _id"), ('{"id": "p", "vector": {"a": NaN}}', "a finite number"),
     ('{"id": "p", "vector": ["a"]}', "a finite number"), ('{"id": "p", "vector"', "not JSON")],
)  # fmt: skip
def test_published_vectors_that_cannot_be_read_are_named_by_their_line(tmp_path, tokenizer, passages, line, message):
    first = json.dumps({"id": passages.ids[0], "vector": {}})
    (tmp_path / "part.jsonl").write_text(f"\ufeff{first}\n{line}\n", encoding="utf-8")  # the mark is no fault
    with pytest.raises(ValueError, match=f"part.jsonl, line 2: .*{message}"):
        import_sparse_vectors(tmp_path, tokenizer, passages, tmp_path / "vectors")


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

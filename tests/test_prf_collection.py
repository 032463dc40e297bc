"""examples/prf: collections in BEIR form, judgements and TREC runs, with what can be wrong in them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from collection import load_collection, own_relevance_level, read_qrels
from trec_runs import read_run, write_run


def write_folder(folder: Path, passages: dict[str, str], queries: dict[str, str], qrels: list[tuple]) -> str:
    folder.mkdir(exist_ok=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        lines = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, judgement)) for judgement in qrels)]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


PASSAGES = {"doc-a": "red fox", "β/7": "blue whale", "empty": "  "}
QUERIES = {"q1": "fox", "q2": "whale", "unjudged": "nothing"}


def test_ids_need_not_be_integers(tmp_path):
    found = load_collection(write_folder(tmp_path / "c", PASSAGES, QUERIES, [("q1", "doc-a", 1), ("q2", "β/7", 2)]))
    assert found.passages.ids == ["doc-a", "β/7"]
    assert found.positives() == {"q1": [0], "q2": [1]}


def test_what_is_left_out_is_counted(tmp_path, caplog):
    qrels = [("q1", "doc-a", 1), ("q1", "lost", 1), ("stranger", "doc-a", 1), ("q2", "empty", 1)]
    with caplog.at_level(logging.WARNING):
        found = load_collection(write_folder(tmp_path / "c", PASSAGES, QUERIES, qrels))
    assert "1 passages have no text and are left out (e.g. empty)" in caplog.text
    assert "1 judged queries are not among the queries; their judgements are left out (e.g. stranger)" in caplog.text
    assert "2 judgements name passages that the corpus lacks" in caplog.text
    assert "1 queries have no judgement and are left out (e.g. unjudged)" in caplog.text
    assert found.qrels["q1"] == {"doc-a": 1, "lost": 1}  # lost ones count in recall, as in trec_eval
    assert found.positives() == {"q1": [0], "q2": []}


def test_a_changed_corpus_is_read_anew(tmp_path):
    name = write_folder(tmp_path / "c", PASSAGES, QUERIES, [("q1", "doc-a", 1)])
    before = load_collection(name).passages
    load_collection.__globals__["folder_passages"].cache_clear()
    write_folder(tmp_path / "c", PASSAGES | {"doc-a": "red fox cub"}, QUERIES, [("q1", "doc-a", 1)])
    after = load_collection(name).passages
    assert after.texts([0]) == ["red fox cub"]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    "line, message",
    [("q1\tdoc-a", "line 2: .* is not query, document, score"), ("q1\tdoc-a\tmuch", "line 2"), ("one two", "line 2")],
)
def test_judgements_of_another_form_are_refused(tmp_path, line, message):
    (tmp_path / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_qrels(tmp_path / "qrels.tsv")


def test_contradicting_judgements_are_refused(tmp_path):
    (tmp_path / "qrels.tsv").write_text("q1\td\t1\nq1\td\t0\n")
    with pytest.raises(ValueError, match="query q1 and document d have two judgements"):
        read_qrels(tmp_path / "qrels.tsv")


def test_trec_judgements_are_read_too(tmp_path):
    (tmp_path / "qrels.txt").write_text("q1 0 d1 2\nq1 0 d2 0\n")
    assert read_qrels(tmp_path / "qrels.txt") == {"q1": {"d1": 2, "d2": 0}}


@pytest.mark.parametrize(
    "line, message",
    [({"_id": "q1", "text": None}, "query q1 has None for a text"), ({"_id": "q2", "text": "?"}, "query q2 has two")],
)
def test_queries_without_a_text_or_with_two_are_refused(tmp_path, line, message):
    name = write_folder(tmp_path / "c", PASSAGES, {"q2": "whale"}, [("q2", "doc-a", 1)])
    with open(tmp_path / "c" / "queries.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        load_collection(name)


def write_lines(folder: Path, name: str, *records: object) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_numbers_and_nulls_in_corpus_and_queries_are_read(tmp_path, caplog):
    name = write_folder(tmp_path / "c", {}, {}, [("7", "1", 1)])
    passages = [{"_id": 1, "title": 1984, "text": "Orwell"}, {"_id": "2", "title": None, "text": 3.5},
                {"_id": "3", "text": None}, {"_id": "4", "title": "title alone", "text": None},
                {"_id": "5", "title": "", "text": float("nan")}]  # fmt: skip
    write_lines(tmp_path / "c", "corpus", *passages)
    write_lines(tmp_path / "c", "queries", {"_id": 7, "text": 1984})
    with caplog.at_level(logging.WARNING):
        found = load_collection(name)
    assert found.queries == {"7": "1984"} and found.positives() == {"7": [0]}
    assert found.passages.texts(range(3)) == ["1984 Orwell", "3.5", "title alone"]
    assert "2 passages have no text and are left out (e.g. 3, 5)" in caplog.text


@pytest.mark.parametrize(
    "file, record, message",
    [
        ("corpus", {"_id": "two words", "text": "x"}, "line 2: the id 'two words' is empty or has white space"),
        ("corpus", {"_id": "", "text": "x"}, "line 2: the id '' is empty"),
        ("corpus", {"_id": None, "text": "x"}, "line 2: expected an object with _id"),
        ("corpus", {"_id": "x", "text": ["a", "b"]}, r"line 2: text is \['a', 'b'\], expected a text"),
        ("corpus", {"_id": "x", "title": {}, "text": "x"}, "line 2: title is {}, expected a text"),
        ("corpus", ["x"], "line 2: expected an object with _id"),
        ("queries", {"_id": "a\tb", "text": "x"}, "line 2: the id .* has white space"),
        ("queries", {"_id": "x", "text": " "}, "line 2: query x has ' ' for a text"),
    ],
)
def test_records_that_cannot_be_read_are_named_by_their_line(tmp_path, file, record, message):
    name = write_folder(tmp_path / "c", {"a": "text"}, {"q": "what?"}, [("q", "a", 1)])
    with open(tmp_path / "c" / f"{file}.jsonl", "a") as lines:
        lines.write(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=rf"{file}.jsonl, {message}") as refusal:
        load_collection(name)
    context = refusal.value.__context__
    assert context is None or context.__cause__ is not refusal.value  # a chain in a circle hangs the interpreter


def test_a_colon_may_be_part_of_a_folders_path(tmp_path):
    folder = tmp_path / "of 10:30" / "c:v1"
    folder.parent.mkdir()
    name = write_folder(folder, {"a": "text"}, {"q": "what?"}, [("q", "a", 1)])
    assert load_collection(name).qrels == {"q": {"a": 1}}
    (folder / "qrels").mkdir()
    (folder / "qrels.tsv").rename(folder / "qrels" / "test.tsv")
    assert load_collection(f"{name}:test").name == "c:v1:test"


@pytest.mark.parametrize(
    "name, level",
    [
        ("msmarco-passage/dev/small", 1),
        ("msmarco-passage/trec-dl-2019/judged", 2),
        ("msmarco-passage/trec-dl-hard", 2),
        *((f"msmarco-passage-v2/trec-dl-{year}", 2) for year in (2021, 2022, 2023)),
        ("msmarco-document/trec-dl-2019", 1),
        ("msmarco-document/trec-dl-2020/judged", 1),
        ("msmarco-document-v2/trec-dl-2022", 1),
        ("beir/scifact/test", 1),
    ],
)
def test_judgements_count_from_the_level_of_the_collections_own_measures(name, level):
    assert own_relevance_level(name) == level


def test_the_relevance_level_can_be_given(tmp_path, caplog):
    name = write_folder(tmp_path / "c", PASSAGES, QUERIES, [("q1", "doc-a", 1), ("q2", "β/7", 2)])
    assert load_collection(name, relevance_level=2).positives() == {"q1": [], "q2": [1]}
    assert "c: 1 queries have no judgement of 2 or more and count as having nothing relevant (e.g. q1)" in caplog.text


def test_repeated_ids_are_refused(tmp_path):
    name = write_folder(tmp_path / "c", PASSAGES, QUERIES, [("q1", "doc-a", 1)])
    corpus = tmp_path / "c" / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + json.dumps({"_id": "doc-a", "text": "again"}) + "\n")
    with pytest.raises(ValueError, match=r"1 repeated ids, e\.g\. doc-a"):
        load_collection(name)


def test_a_name_that_is_nothing_says_what_names_there_are():
    with pytest.raises(ValueError, match=r"neither a folder .* nor a name of ir_datasets"):
        load_collection("no/such/collection")


def test_a_collection_that_cannot_be_downloaded_is_refused_with_the_way_out(monkeypatch):
    import ir_datasets

    def offline():
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(ir_datasets, "load", lambda name: SimpleNamespace(queries_iter=offline))
    with pytest.raises(ValueError, match=r"could not be downloaded \(no route .*without network give a folder"):
        load_collection("beir/scifact/test")


@pytest.mark.parametrize(
    "name",
    ["msmarco-passage/train/judged", "msmarco-passage/dev/small", "msmarco-passage/trec-dl-2019/judged",
     "msmarco-passage/trec-dl-2020/judged", "msmarco-passage/trec-dl-hard", "beir/scifact/test"],
)  # fmt: skip
def test_the_public_collections_have_these_names(name):
    import ir_datasets

    assert name in ir_datasets.registry
    assert ir_datasets.docs_parent_id(name) in ("msmarco-passage", "beir/scifact")


def test_a_run_is_written_as_it_is_read(tmp_path):
    run = {"q1": [("β/7", 2.5), ("doc-a", 1.0)], "q2": [("doc-a", -0.123456789)]}
    write_run(run, tmp_path / "run.trec", "test")
    assert read_run(tmp_path / "run.trec") == run


def test_a_byte_order_mark_hides_no_document_judgement_or_query(tmp_path):
    (tmp_path / "run.trec").write_bytes("q Q0 a 1 0.9 t\nq Q0 b 2 0.5 t\n".encode("utf-8-sig"))
    assert read_run(tmp_path / "run.trec") == {"q": [("a", 0.9), ("b", 0.5)]}
    (tmp_path / "qrels.tsv").write_bytes("q\ta\t1\n".encode("utf-8-sig"))
    assert read_qrels(tmp_path / "qrels.tsv") == {"q": {"a": 1}}
    name = write_folder(tmp_path / "x", {"a": "text"}, {"q": "what?"}, [("q", "a", 1)])
    for file in Path(name).glob("*.*"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_collection(name).qrels == {"q": {"a": 1}}


def test_a_run_out_of_order_is_sorted_and_reported(tmp_path, caplog):
    (tmp_path / "run.trec").write_text("q Q0 b 2 0.5 t\nq Q0 a 1 0.9 t\n")
    assert read_run(tmp_path / "run.trec") == {"q": [("a", 0.9), ("b", 0.5)]}
    assert "1 lines are out of rank order" in caplog.text


@pytest.mark.parametrize(
    "lines, message",
    [
        ("q Q0 a 1 0.9 t\nq Q0 b 1 0.5 t\n", "query q has rank 1 twice"),
        ("q Q0 a 1 0.9 t\nq Q0 a 2 0.5 t\n", "retrieves document a twice"),
        ("q Q0 a 1 0.5 t\nq Q0 b 2 0.9 t\n", "ranks and scores disagree"),
        ("q Q0 a 1 0.5\n", "line 1: 5 fields, expected 6"),
        ("q Q0 a first 0.5 t\n", "line 1: rank 'first'"),
        ("q Q0 a 1 0.5 t\nq Q0 b 2 nan t\n", "line 2: the score is nan"),
    ],
)
def test_a_run_with_two_meanings_is_refused(tmp_path, lines, message):
    (tmp_path / "run.trec").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run.trec")


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.trec does not exist"):
        read_run(tmp_path / "none.trec")


def test_ids_that_a_run_file_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="white space"):
        write_run({"q": [("two words", 1.0)]}, tmp_path / "run.trec", "test")
    assert not (tmp_path / "run.trec").exists()

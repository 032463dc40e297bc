"""examples/demo: the task is real and the same every time, and the demo's parts fit together."""

from collections import Counter

import demo
import letters
import pytest
import torch
from helpers import same_weights


def test_letters_are_the_same_for_the_same_seed_and_others_for_another():
    assert letters.make_letters(20, seed=1).to_list() == letters.make_letters(20, seed=1).to_list()
    assert not set(letters.make_letters(2000, seed=1)["text"]) & set(letters.make_letters(2000, seed=2)["text"])


def test_the_label_is_the_place_of_most_words_and_other_places_distract():
    words_of = [set(words.split()) for words in letters.PLACES.values()]
    distracted = 0
    for row in letters.make_letters(500, seed=3):
        counts = [sum(word in words for word in row["text"].split()) for words in words_of]
        most = counts.pop(row["label"])
        assert most > max(counts)
        distracted += max(counts) == most - 1
    assert distracted > 100


def test_classes_are_balanced():
    counts = Counter(letters.make_letters(4000, seed=4)["label"])
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_the_tokenizer_knows_every_word():
    tokenizer = letters.make_tokenizer()
    rows = tokenizer(list(letters.make_letters(200, seed=5)["text"]))["input_ids"]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
    assert not any(tokenizer.unk_token_id in row for row in rows)


def test_both_models_start_from_the_same_weights():
    assert same_weights(demo.make_model(), demo.make_model())


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "STEPS", 20)
    monkeypatch.setattr(demo, "JUDGED", 100)
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    return tmp_path


def test_the_demo_prints_both_rows_and_draws_the_losses(short, capsys):
    demo.main()
    table = capsys.readouterr().out.split("On new letters")[1].splitlines()
    rows = {name: [float(value) for value in values] for name, *values in map(str.split, table[2:4])}
    assert set(rows) == {"baseline", "comparative"}
    assert all(len(values) == 6 and 0 <= values[4] <= 1 for values in rows.values())
    assert (short / "losses.png").stat().st_size > 10_000


def test_the_task_is_learned_well_above_chance(monkeypatch, short):
    monkeypatch.setattr(demo, "STEPS", 160)
    torch.manual_seed(0)
    model = demo.make_model()
    demo.make_trainer(model, demo.encode(letters.make_letters(160 * demo.BATCH, seed=1)), ablations=0).train()
    judge = demo.make_trainer(model, demo.encode(letters.make_letters(500, seed=2)), ablations=0)
    assert judge.evaluate()["eval_accuracy"] > 0.6

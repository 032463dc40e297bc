"""Files are complete or absent, whoever else writes to the same place."""

import pytest

from cmp_trainer.saving.files import warned_where_unwritable, written_whole


def test_a_file_is_in_its_place_when_it_is_complete(tmp_path):
    with written_whole(tmp_path / "new" / "table.md") as file:
        file.write_text("half")
        assert not (tmp_path / "new" / "table.md").exists()
        file.write_text("whole")
    assert (tmp_path / "new" / "table.md").read_text() == "whole"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.md"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    (tmp_path / "table.md").write_text("before")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "table.md") as file:
        file.write_text("half")
        raise RuntimeError
    assert (tmp_path / "table.md").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_at_once_do_not_meet(tmp_path):
    with written_whole(tmp_path / "a.npy") as first, written_whole(tmp_path / "a.npy") as second:
        assert first != second and first.suffix == second.suffix == ".npy"
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.npy").read_text() == "first"  # whose block ends last
    assert len(list(tmp_path.iterdir())) == 1


def test_only_faults_of_the_disk_are_warnings(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with warned_where_unwritable("the plot"), written_whole(tmp_path / "file" / "plot.png"):
        pass
    assert "the plot could not be written: [Errno" in caplog.text
    with pytest.raises(ValueError), warned_where_unwritable("the plot"):
        raise ValueError

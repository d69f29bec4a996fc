"""OutputDirectory: what it refuses, who may write, what is found again, and how OUT comes to be."""

from __future__ import annotations

import errno
import os

import pytest
from tiny import hashes

from moeconv.checkpoint import output as module
from moeconv.checkpoint.output import Finished, OutputDirectory
from moeconv.checkpoint.target import check_target
from moeconv.errors import OutputError, first_line


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def stage(directory: OutputDirectory, **files: str) -> None:
    for name, text in files.items():
        (directory.staged / name).write_text(text)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [250, 300])
def test_names_too_long_for_the_file_system(tmp_path, length):
    out = tmp_path / ("o" * length)
    with pytest.raises(OutputError, match="File name too long"):
        check_target(out, reads=(), overwrite=False)
        with OutputDirectory(out, key="k"):
            pytest.fail("there is no such directory")


# -- who may write -----------------------------------------------------------------------------------------------


def test_one_whole_run_or_any_number_of_parts(out):
    for first, second, fits in ((0, 0, False), (0, 1, False), (1, 0, False), (1, 1, True)):
        with OutputDirectory(out, key="k", shared=bool(first)):
            other = OutputDirectory(out, key="k", shared=bool(second))
            if fits:
                with other:
                    pass
            else:
                with pytest.raises(OutputError, match="another moeconv run"):
                    other.__enter__()
    with OutputDirectory(out, key="k"):
        pass


def test_a_shard_has_one_writer(out):
    with OutputDirectory(out, key="k", shared=True) as a, OutputDirectory(out, key="k", shared=True) as b:
        with a.shard_lock("s") as mine:
            assert mine
            with b.shard_lock("s") as theirs:
                assert not theirs
            with b.shard_lock("t") as theirs:
                assert theirs
        with b.shard_lock("s") as mine:
            assert mine


def test_the_lock_is_gone_when_the_directory_cannot_be_made(out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "mkdir", _fails_below(out))
        with pytest.raises(OutputError, match="No space left"):
            OutputDirectory(out, key="k").__enter__()
    with OutputDirectory(out, key="k"):
        pass


def _fails_below(out):
    real = module.Path.mkdir

    def mkdir(self, *args, **kwargs):
        if self.name == "done":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    return mkdir


# -- the journal -------------------------------------------------------------------------------------------------


def test_finished_shards_are_found_again_by_their_key_only(out):
    record = Finished("00", 4, 7)
    with OutputDirectory(out, key="k" * 64) as directory:
        stage(directory, a="1234")
        directory.mark_finished("a", record)
    with OutputDirectory(out, key="k" * 64) as directory:
        assert directory.finished("a") == record
        assert directory.finished("b") is None
    with OutputDirectory(out, key="other") as directory:
        assert directory.finished("a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": "00"}', '{"sha256":"0","bytes":4,"crc":1}'])
def test_a_damaged_journal_entry_counts_as_none(out, text):
    with OutputDirectory(out, key="k") as directory:
        stage(directory, a="1234")
        directory.mark_finished("a", Finished("00", 4, 7))
        (directory.work / "done" / "a.json").write_text(text)
        assert directory.finished("a") is None


def test_an_entry_without_its_file_counts_as_none(out, tmp_path):
    with OutputDirectory(out, key="k") as directory:
        stage(directory, a="1234")
        directory.mark_finished("a", Finished("00", 4, 7))
        (directory.staged / "a").write_text("12345")
        assert directory.finished("a") is None
        (directory.staged / "a").unlink()
        assert directory.finished("a") is None
        (tmp_path / "linked").write_text("1234")
        (directory.staged / "a").symlink_to(tmp_path / "linked")
        assert directory.finished("a") is None
        (directory.staged / "a").unlink()
        stage(directory, a="1234")
        assert directory.finished("a")
        directory.forget("a")
        directory.forget("a")
        assert directory.finished("a") is None


# -- commit ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["renameat2", "rename"])
def either_rename(request, monkeypatch):
    """With Linux's renameat2, and without it."""
    if request.param == "rename":
        monkeypatch.setattr(module, "_renameat2", lambda *_: False)


@pytest.mark.usefixtures("either_rename")
def test_commit_moves_everything_and_leaves_nothing_else(tmp_path, out):
    with OutputDirectory(out, key="k") as directory:
        stage(directory, a="1", b="2")
        assert not out.exists()
        directory.commit()
    assert sorted(os.listdir(out)) == ["a", "b"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_rename")
def test_commit_swaps_an_old_directory_only_when_asked(tmp_path, out):
    out.mkdir()
    (out / "old").write_text("old")
    (out / "moeconv_manifest.json").write_text('{"files": {"old": {}}}')
    before = hashes(out)
    with OutputDirectory(out, key="k") as directory:
        stage(directory, a="1")
        with pytest.raises(OutputError, match="appeared while this run was writing"):
            directory.commit()
    assert hashes(out) == before
    with OutputDirectory(out, key="k", overwrite=True) as directory:
        assert os.listdir(directory.staged) == ["a"]
        directory.commit()
    assert os.listdir(out) == ["a"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_rename")
def test_what_came_to_lie_in_the_old_directory_meanwhile_is_not_lost(tmp_path, out):
    out.mkdir()
    with OutputDirectory(out, key="k", overwrite=True) as directory:
        stage(directory, a="1")
        (out / "mine").write_text("mine")
        with pytest.raises(OutputError, match=r"would delete: mine$"):
            directory.commit()
        assert hashes(out).keys() == {"mine"} and os.listdir(directory.staged) == ["a"]
        (out / "mine").unlink()
        directory.commit()
    assert os.listdir(out) == ["a"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_rename")
def test_overwrite_of_what_does_not_exist(tmp_path, out):
    with OutputDirectory(out, key="k", overwrite=True) as directory:
        stage(directory, a="1")
        directory.commit()
    assert os.listdir(out) == ["a"] and os.listdir(tmp_path) == ["out"]


def test_parts_commit_once(out):
    with OutputDirectory(out, key="k", shared=True) as a, OutputDirectory(out, key="k", shared=True) as b:
        stage(a, x="1")
        with a.commit_lock() as mine:
            assert mine
            a.commit()
        with b.commit_lock() as mine:
            assert not mine
    assert os.listdir(out) == ["x"]


def test_discard_leaves_nothing(tmp_path, out):
    for shared in (False, True):
        with OutputDirectory(out, key="k", shared=shared) as directory:
            stage(directory, a="1")
            directory.discard()
        assert os.listdir(tmp_path) == []


def test_discard_leaves_what_other_parts_are_writing(tmp_path, out):
    with OutputDirectory(out, key="k", shared=True) as a, OutputDirectory(out, key="k", shared=True) as b:
        stage(a, x="1")
        b.discard()
        assert (a.staged / "x").read_text() == "1"


def test_discard_leaves_other_work_on_the_same_out(out):
    with OutputDirectory(out, key="one") as directory:
        stage(directory, a="1")
    with OutputDirectory(out, key="two") as directory:
        directory.discard()
    with OutputDirectory(out, key="one") as directory:
        assert os.listdir(directory.staged) == ["a"]


@pytest.mark.parametrize(
    ("text", "line"), [("", "ValueError"), (" \n", "ValueError"), ("one\ntwo", "one"), ("x" * 999, "x" * 300)]
)
def test_the_first_line_of_another_packages_error(text, line):
    assert first_line(ValueError(text)) == line

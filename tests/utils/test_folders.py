import os
import sys

import numpy as np
import pytest

from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.folders import written_whole


def write(folder, text, marker="made.txt"):
    with written_whole(folder, marker) as scratch:
        (scratch / marker).write_text(text)
        (scratch / f"{text}.txt").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(folder):
    with written_whole(folder, "made.txt") as scratch:
        (scratch / "made.txt").write_text("half")
        raise OSError("disk full")


def test_a_new_folder_appears_with_the_folders_above_it(tmp_path):
    write(tmp_path / "a" / "b", "first")
    assert names(tmp_path / "a" / "b") == ["first.txt", "made.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", "first")
    assert names(tmp_path / "here") == ["first.txt", "made.txt"]


def test_an_earlier_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "here", "first")
    write(tmp_path / "here", "second")
    assert names(tmp_path / "here") == ["made.txt", "second.txt"]
    assert names(tmp_path) == ["here"]


def test_a_failure_leaves_the_earlier_folder_as_it_was(tmp_path):
    write(tmp_path / "here", "first")
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(tmp_path / "here")
    assert (tmp_path / "here" / "made.txt").read_text() == "first"
    assert names(tmp_path / "here") == ["first.txt", "made.txt"]
    assert names(tmp_path) == ["here"]


def test_a_failure_leaves_no_new_folder(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(tmp_path / "here")
    assert names(tmp_path) == []


def test_the_earlier_folder_comes_back_when_the_last_move_fails(tmp_path, monkeypatch):
    write(tmp_path / "here", "first")
    move = os.replace

    def fail_on_the_new_one(source, target):
        if source.name == "new":
            raise OSError("no room")
        move(source, target)

    monkeypatch.setattr("adaptexit.utils.folders.os.replace", fail_on_the_new_one)
    with pytest.raises(OSError, match="no room"):
        write(tmp_path / "here", "second")
    assert names(tmp_path / "here") == ["first.txt", "made.txt"]
    assert names(tmp_path) == ["here"]


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"folder must be new, empty or an earlier save \(one with made\.txt\)"):
        write(tmp_path, "first")
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused_and_untouched(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="holds something else"):
        write(tmp_path / "file", "first")
    assert (tmp_path / "file").read_text() == "precious"


def test_outputs_that_fail_to_be_written_leave_the_earlier_ones(tmp_path, monkeypatch):
    quality = np.eye(2)
    outputs = ExitOutputs(scores=np.zeros((2, 2)), quality=quality, costs=[1, 2])
    outputs.save(tmp_path / "outputs")
    monkeypatch.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ExitOutputs(scores=np.ones((2, 2)), quality=quality, costs=[1, 2]).save(tmp_path / "outputs")
    monkeypatch.undo()
    assert not ExitOutputs.load(tmp_path / "outputs").scores.any()


def test_outputs_are_not_written_over_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    outputs = ExitOutputs(scores=np.zeros((2, 2)), quality=np.eye(2), costs=[1, 2])
    with pytest.raises(FileExistsError, match=r"an earlier save \(one with outputs\.json\)"):
        outputs.save(tmp_path)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are those of POSIX")
@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_the_umask_says_who_may_read(tmp_path, umask, file_mode, folder_mode):
    """Whatever the writers of the files do: some make theirs private, some copy a mode."""
    before = os.umask(umask)
    try:
        for _ in range(2):
            with written_whole(tmp_path / "here", "made.txt") as scratch:
                (scratch / "made.txt").write_text("a")
                (scratch / "below").mkdir()
                (scratch / "below" / "private.bin").write_bytes(b"b")
                (scratch / "below" / "private.bin").chmod(0o600)
                (scratch / "open.bin").write_bytes(b"c")
                (scratch / "open.bin").chmod(0o777)
        ExitOutputs(scores=np.zeros((2, 2)), quality=np.eye(2), costs=[1, 2]).save(tmp_path / "outputs")
    finally:
        os.umask(before)
    paths = [path for name in ("here", "outputs") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
    assert len([path for path in paths if path.is_file()]) >= 7
    for path in paths:
        assert path.stat().st_mode & 0o777 == (folder_mode if path.is_dir() else file_mode), path

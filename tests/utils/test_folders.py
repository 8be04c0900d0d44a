import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import adaptexit
from adaptexit.core.outputs import ExitOutputs
from adaptexit.utils.folders import Kind, put_back, written_whole

ROOT = Path(adaptexit.__file__).parents[1]
CONTENTS = re.compile(r"made\.json|(first|second)\.txt|below(/.*)?|open\.bin")
KIND = Kind("made.json", CONTENTS, lambda made: made == "ours")


def write(folder, text):
    with written_whole(folder, KIND) as scratch:
        (scratch / "made.json").write_text('"ours"')
        (scratch / f"{text}.txt").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(folder):
    with written_whole(folder, KIND) as scratch:
        (scratch / "made.json").write_text("half")
        raise OSError("disk full")


def test_a_new_folder_appears_with_the_folders_above_it(tmp_path):
    write(tmp_path / "a" / "b", "first")
    assert names(tmp_path / "a" / "b") == ["first.txt", "made.json"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "here").mkdir()
    write(tmp_path / "here", "first")
    assert names(tmp_path / "here") == ["first.txt", "made.json"]


def test_an_earlier_folder_is_replaced_whole(tmp_path):
    write(tmp_path / "here", "first")
    write(tmp_path / "here", "second")
    assert names(tmp_path / "here") == ["made.json", "second.txt"]
    assert names(tmp_path) == ["here"]


def test_a_failure_leaves_the_earlier_folder_as_it_was(tmp_path):
    write(tmp_path / "here", "first")
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(tmp_path / "here")
    assert (tmp_path / "here" / "first.txt").read_text() == "first"
    assert names(tmp_path / "here") == ["first.txt", "made.json"]
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
    assert names(tmp_path / "here") == ["first.txt", "made.json"]
    assert names(tmp_path) == ["here"]


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"folder must be new, empty or an earlier save \(one with made\.json\)"):
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
            with written_whole(tmp_path / "here", KIND) as scratch:
                (scratch / "made.json").write_text('"ours"')
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


# -- what is in the way ------------------------------------------------------------------------------------------------


def tree(folder):
    """Everything below a folder, with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


IN_THE_WAY = {
    "another file": (lambda here: (here / "thesis.tex").write_text("precious"), "something else: thesis.tex. Nothing"),
    "many files": (lambda here: [(here / f"{i}.tex").touch() for i in range(5)], "0.tex, 1.tex, 2.tex and 2 more"),
    "a repository": (
        lambda here: (here / ".git" / "objects").mkdir(parents=True),
        "else: .git, .git/objects",
    ),
    "a link": (lambda here: (here / "second.txt").symlink_to("/dev/null"), r"second.txt\?"),
    "a pipe": (lambda here: os.mkfifo(here / "second.txt"), r"second.txt\?"),
    "another marker": (lambda here: (here / "made.json").write_text("{}"), "a made.json of another kind"),
    "no JSON": (lambda here: (here / "made.json").write_text("ours"), "a made.json of another kind, or a damaged one"),
    "deep JSON": (lambda here: (here / "made.json").write_text("[" * 9999), "a made.json of another kind"),
    "no marker": (lambda here: (here / "made.json").unlink(), "something else: first.txt"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links are those of POSIX")
@pytest.mark.parametrize("what", IN_THE_WAY)
def test_an_earlier_folder_with_something_else_in_it_is_not_touched(tmp_path, what):
    change, says = IN_THE_WAY[what]
    write(tmp_path / "here", "first")
    change(tmp_path / "here")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=says):
        write(tmp_path / "here", "second")
    assert names(tmp_path) == ["here"]
    assert tree(tmp_path) == before


def test_the_folder_worked_in_is_not_exchanged(tmp_path, monkeypatch):
    write(tmp_path / "here", "first")
    (tmp_path / "here" / "below").mkdir()
    for worked_in in (tmp_path / "here", tmp_path / "here" / "below"):
        monkeypatch.chdir(worked_in)
        with pytest.raises(FileExistsError, match="folder must not be the one worked in, as it is exchanged whole"):
            write(tmp_path / "here" if worked_in.name == "below" else ".", "second")
    monkeypatch.chdir(tmp_path)
    write("here", "second")
    assert names(tmp_path / "here") == ["made.json", "second.txt"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("here")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert names(tmp_path / "here") == sorted([f"{text}.txt", "made.json"])
    assert names(tmp_path) == ["here", "link"]


# -- killed and at the same time ---------------------------------------------------------------------------------------

KILLED = """
import os, re, signal, sys
from itertools import count
from pathlib import Path
from adaptexit.utils.folders import Kind, put_back, written_whole

KIND = Kind("made.json", re.compile("made.json|first.txt|second.txt"), lambda made: made == "ours")
root = Path(sys.argv[1])
target = root / "here"
STEPS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir"}


def names(folder):
    return sorted(os.listdir(folder))


def write(folder, text):
    with written_whole(folder, KIND) as scratch:
        (scratch / "made.json").write_text('"ours"')
        (scratch / f"{text}.txt").touch()


def kill_at(step):
    seen = count()

    def hook(event, arguments):
        if event in STEPS and next(seen) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


outcomes, gaps = [], 0
for step in count():
    write(target, "first")
    assert names(root) == ["here"], names(root)
    child = os.fork()
    if child == 0:
        kill_at(step)
        write(target, "second")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    gaps += not target.exists()
    put_back(target)
    contents = names(target)
    assert contents in (["first.txt", "made.json"], ["made.json", "second.txt"]), contents
    outcomes.append("second.txt" in contents)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
assert outcomes == sorted(outcomes) and len(outcomes) - sum(outcomes) > 10 and sum(outcomes) > 5 and gaps == 1, outcomes
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_step_leaves_the_earlier_folder_or_the_new_one_and_the_next_clears_away(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("n_interrupted", [1, 2])
def test_an_interruption_between_the_renames_loses_nothing(tmp_path, monkeypatch, n_interrupted):
    """Also where putting back is interrupted as well."""
    write(tmp_path / "here", "first")
    moves = []

    def interrupted(source, target, move=os.replace):
        moves.append(target.name)
        if 1 < len(moves) <= 1 + n_interrupted:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr("adaptexit.utils.folders.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "here", "second")
    monkeypatch.undo()
    assert (tmp_path / "here").exists() == (n_interrupted == 1)
    put_back(tmp_path / "here")
    assert names(tmp_path / "here") == ["first.txt", "made.json"]
    write(tmp_path / "here", "second")
    assert names(tmp_path) == ["here"]


def leftover(tmp_path, *parts, name="here"):
    workshop = tmp_path / f".{name}-abcd_123.saving"
    for part in parts:
        write(workshop / part, "first" if part == "old" else "second")
    return workshop


def test_what_was_moved_aside_is_put_back_only_where_the_place_is_free(tmp_path):
    leftover(tmp_path, "old", "new")
    (tmp_path / "here").mkdir()
    put_back(tmp_path / "here")
    assert names(tmp_path / "here") == ["first.txt", "made.json"]
    leftover(tmp_path, "old")
    write(tmp_path / "here", "second")
    assert names(tmp_path) == ["here"]


def test_what_was_replaced_already_does_not_come_back(tmp_path):
    leftover(tmp_path, "old")
    put_back(tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_what_is_no_leftover_of_this_folder_is_let_alone(tmp_path):
    others = [tmp_path / name for name in (".here-abcd_123", ".here-notes.saving", ".there-abcd_123.saving", ".here-x")]
    for other in others:
        (other / "new").mkdir(parents=True)
        (other / "old").mkdir()
    write(tmp_path / "here", "first")
    write(tmp_path / "here", "second")
    assert all(names(other) == ["new", "old"] for other in others)


def test_a_run_at_the_same_time_is_let_alone(tmp_path):
    """Whoever ends last stays; nobody clears away what another still writes."""
    with written_whole(tmp_path / "here", KIND) as scratch:
        (scratch / "made.json").write_text('"ours"')
        write(tmp_path / "here", "second")
        assert len(names(tmp_path)) == 2
        (scratch / "first.txt").write_text("first")
    assert names(tmp_path / "here") == ["first.txt", "made.json"]
    assert names(tmp_path) == ["here"]


def test_many_may_write_one_folder_at_once(tmp_path):
    def write_some(text):
        for _ in range(25):
            write(tmp_path / "here", text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_some, ["first", "second"] * 2))
    assert names(tmp_path / "here") in (["first.txt", "made.json"], ["made.json", "second.txt"])
    assert names(tmp_path) == ["here"]

"""Files: whole or not there, never over another's, nothing left of killed processes, one sentence for a refusal."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stable_diffusion import InputError, files
from stable_diffusion.checkpoints.files import read_weights, write_tensors
from stable_diffusion.files import (
    as_path,
    check_place,
    create,
    is_file,
    read_json,
    replacing,
    replacing_folder,
    slug,
    tidy,
    write_json,
)

if sys.platform != "win32":
    import resource

posix = pytest.mark.skipif(os.name != "posix", reason="processes are forked")


def content(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_process(work: Callable[[], object]) -> int:
    """The exit code of a forked process, or minus the signal that ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.__stderr__, flush=True)
        os._exit(1)


def refusal(work: Callable[[], object]) -> str:
    """The sentence that a forked process is told, for rights and limits that the tests must not lose."""
    reads, writes = os.pipe()

    def told() -> None:
        with pytest.raises(InputError) as caught:
            work()
        os.write(writes, str(caught.value).encode())

    code = in_a_process(told)
    os.close(writes)
    with os.fdopen(reads, encoding="utf-8") as pipe:
        text = pipe.read()
    assert code == 0, text
    return text


def reachable(folder: Path) -> None:
    """Lets everyone into a temporary folder, below whatever folders of pytest's it is."""
    for path in (folder, *folder.parents):
        if Path(tempfile.gettempdir()) in path.parents:
            path.chmod(path.stat().st_mode | 0o755)


def without_rights(work: Callable[[], object]) -> Callable[[], object]:
    def dropped() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        work()

    return dropped


def with_limit(limit: int, most: int, work: Callable[[], object]) -> Callable[[], object]:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(limit, (most, most))
        work()

    return limited


# Names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("icons-128", "icons-128"),
        ("dreamshaper_8.fp16", "dreamshaper_8.fp16"),
        ("../../../x", "x"),
        ("a/../../b", "a-..-..-b"),
        ("/etc/passwd", "etc-passwd"),
        ("C:\\Windows\\x", "C-Windows-x"),
        ("..", "unnamed"),
        ("", "unnamed"),
        (" \0\n", "unnamed"),
        (".hidden", "hidden"),
        ("ends. ", "ends"),
        ("-rf", "rf"),
        ("NUL", "_NUL"),
        ("com1.txt", "_com1.txt"),
        ("console", "console"),
        ("\udcff", "unnamed"),
        ("ü 北京", "ü-北京"),
    ],
)
def test_text_is_one_part_of_a_path(text: str, name: str, tmp_path: Path) -> None:
    assert slug(text) == name
    assert (tmp_path / name).parent == tmp_path
    (tmp_path / name).mkdir()


@pytest.mark.parametrize("letter", ["a", "ü", "北", "𐍈"])
def test_a_name_has_room_for_what_is_added(letter: str, tmp_path: Path) -> None:
    name = slug(letter * 300)
    assert 0 < len(name) <= 60 and len(name.encode()) <= 180
    assert create(tmp_path / f"{name}-18446744073709551615.png", Path.touch).is_file()


# Nothing is overwritten


@posix
@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_four_processes_write_two_hundred_files(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)

    def save(own: int) -> None:
        for number in range(50):
            create(tmp_path / "a.png", lambda path, text=f"{own} {number}": path.write_text(text))

    children = []
    for own in range(4):
        if not (pid := os.fork()):
            with contextlib.suppress(BaseException):
                save(own)
                os._exit(0)
            os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert sorted(content(tmp_path).values()) == sorted(f"{a} {b}" for a in range(4) for b in range(50))


def _no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_new_file_is_an_error_where_there_is_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "a", new=True) as building:
        building.write_text("1")
        (tmp_path / "a").write_text("another's")  # since it was looked at
        with pytest.raises(InputError, match="File exists"), replacing(tmp_path / "a", new=True):
            pass
        building.unlink()
        (tmp_path / "a").unlink()
        building.write_text("2")
    assert content(tmp_path) == {"a": "2"}


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_that_is_replaced_keeps_what_is_not_ours(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    (tmp_path / "elsewhere").mkdir()
    old = {
        "own": "1",
        "part/own": "1",
        "part/mine.txt": "x",
        "README.md": "x",
        ".git/HEAD": "x",
        "gone/own": "1",
    }
    for name, text in old.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(text)
    (tmp_path / "folder/.git/refs").mkdir()
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere")
    with replacing_folder(tmp_path / "folder", lambda name: name.endswith("own")) as building:
        (building / "own").write_text("2")
    assert content(tmp_path / "folder") == {"own": "2", **{name: x for name, x in old.items() if x == "x"}}
    assert names(tmp_path / "folder") == [".git", "README.md", "link", "own", "part"]
    assert (tmp_path / "folder/link").is_symlink() and (tmp_path / "folder/.git/refs").is_dir()
    assert names(tmp_path) == ["elsewhere", "folder"]


def test_a_new_file_never_takes_the_place_of_one_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_text("mine")
    with (
        pytest.raises(InputError, match="there is another file"),
        replacing_folder(tmp_path / "folder") as new,
    ):
        (new / "a").write_text("2")
    assert content(tmp_path) == {"folder/a": "mine"}
    assert names(tmp_path) == ["folder"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "disk/model/own").write_text("1")
    (tmp_path / "model").symlink_to(tmp_path / "disk/model")
    with replacing_folder(tmp_path / "model", lambda name: True) as building:
        (building / "own").write_text("2")
    assert (tmp_path / "model").is_symlink()
    assert content(tmp_path / "disk") == {"model/own": "2"}


def test_the_folder_that_one_is_in_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with replacing_folder(Path()) as building:
        (building / "a").mkdir()
        (building / "a/b").write_text("1")
    assert names(Path()) == ["a"]
    assert content(tmp_path) == {"here/a/b": "1"}


# What is killed


@posix
@pytest.mark.parametrize("moves", range(3))
def test_a_folder_is_there_whenever_the_process_is_killed(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the older one is moved, between, and after the new one is; the next look finishes the work."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own").write_text("1")
    (folder / "mine").write_text("x")
    left, move = moves, Path.replace

    def killed(self: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return move(self, target)

    def write() -> None:
        monkeypatch.setattr(Path, "replace", killed)
        with replacing_folder(folder, lambda name: name == "own") as building:
            (building / "own").write_text("2")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(write) == -signal.SIGKILL
    assert folder.exists() == (moves != 1)
    tidy(folder)
    assert content(tmp_path) == {"model/own": "2" if moves else "1", "model/mine": "x"}
    assert names(tmp_path) == ["model"]


def _abandon(path: Path, writer: Callable[[Path], Any]) -> None:
    def work() -> None:
        with writer(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(work) == -signal.SIGKILL


@posix
@pytest.mark.parametrize(
    "writer", [replacing, replacing_folder, files._workshop], ids=["file", "folder", "workshop"]
)
def test_what_a_killed_process_left_goes_at_the_next_write(writer: Any, tmp_path: Path) -> None:
    start = (lambda path: writer(path, tmp_path)) if writer is files._workshop else writer
    _abandon(tmp_path / "a [1]*.json", start)
    _abandon(tmp_path / "b", start)
    assert len(names(tmp_path)) == 2 and all(name.startswith(".") for name in names(tmp_path))
    write_json(tmp_path / "a [1]*.json", {})
    assert [name[:2] for name in names(tmp_path)] == [".b", "a "]


@posix
def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        with replacing(tmp_path / "a"):
            os.write(writes, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(reads, 1)
    with replacing(tmp_path / "a") as building:
        building.write_text("1")
        (tmp_path / ".a.mine.part").write_text("a user's")
        tidy(tmp_path / "a")
    assert len(names(tmp_path)) == 3
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    tidy(tmp_path / "a")
    assert names(tmp_path) == [".a.mine.part", "a"]


def test_another_computers_process_is_given_a_day(tmp_path: Path) -> None:
    theirs = tmp_path / ".a.another-7-0a1b2c3d-xyz.part"
    theirs.mkdir()
    tidy(tmp_path / "a")
    assert theirs.exists()
    os.utime(theirs, (0, time.time() - 25 * 3600))
    tidy(tmp_path / "a")
    assert not theirs.exists()


def test_the_next_process_of_a_container_may_have_the_same_number(tmp_path: Path) -> None:
    theirs = tmp_path / f".a.{files._computer()}-{os.getpid()}-00000000-xyz.part"
    theirs.mkdir()
    write_json(tmp_path / "a", {})
    assert names(tmp_path) == ["a"]


# What the system refuses


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody but root may see into or write to, with a file in it that nobody may read."""
    reachable(tmp_path)
    folder = tmp_path / "locked"
    (folder / "sub").mkdir(parents=True)
    write_tensors(folder / "sub/a.safetensors", {"a": torch.zeros(3)})
    write_tensors(tmp_path / "b.safetensors", {"a": torch.zeros(3)})
    write_json(tmp_path / "b.json", {})
    for path, mode in ((tmp_path / "b.safetensors", 0), (tmp_path / "b.json", 0), (folder, 0)):
        path.chmod(mode)
    yield folder
    folder.chmod(0o755)


@posix
def test_missing_rights_are_called_that(locked: Path) -> None:
    beside = locked.parent
    for work in (
        lambda: read_weights(beside / "b.safetensors"),
        lambda: read_weights(locked / "sub/a.safetensors"),
        lambda: read_json(beside / "b.json"),
        lambda: read_json(locked / "sub/a.json"),
        lambda: is_file(locked / "sub/a.json"),
        lambda: write_json(locked / "a.json", {}),
        lambda: write_json(locked / "new/a.json", {}),
        lambda: write_tensors(locked / "a.safetensors", {"a": torch.zeros(3)}),
        lambda: create(locked / "a.png", Path.touch),
        lambda: check_place(locked / "a/b/c.png"),
        lambda: check_place(locked / "sub", is_folder=True),
    ):
        sentence = refusal(without_rights(work))
        assert "Permission denied" in sentence, sentence
        assert str(beside) in sentence and ".part" not in sentence


@posix
def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    """A limit on the size of files is an error of the same kind, at the same places."""
    many = {"a": torch.zeros(10_000)}
    for work in (
        lambda: write_json(tmp_path / "a.json", "x" * 10_000),
        lambda: write_tensors(tmp_path / "a.safetensors", many),
        lambda: create(tmp_path / "a.png", lambda path: path.write_bytes(bytes(10_000))),
    ):
        sentence = refusal(with_limit(resource.RLIMIT_FSIZE, 5_000, work))
        assert "File too large" in sentence and f"cannot write {tmp_path}" in sentence, sentence
    sentence = refusal(with_limit(resource.RLIMIT_FSIZE, 0, lambda: check_place(tmp_path / "a.png")))
    assert "File too large" in sentence
    assert names(tmp_path) == []


@posix
def test_too_little_memory_is_called_that(tmp_path: Path) -> None:
    write_tensors(tmp_path / "large.safetensors", {"a": torch.zeros(50_000_000)})
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + 20_000_000
    for verb, work in {
        "open": lambda: read_weights(tmp_path / "large.safetensors"),
        "write": lambda: write_tensors(
            tmp_path / "small.safetensors", {"a": torch.zeros(1).expand(500_000_000)}, torch.float16
        ),
    }.items():
        sentence = refusal(with_limit(resource.RLIMIT_AS, limit, work))
        assert f"cannot {verb} {tmp_path}" in sentence and "there is too little memory" in sentence, sentence


@pytest.mark.parametrize("name", ["𐍈" * 70, "file/x", "file/x/y.png", "folder"])
def test_a_place_is_tried_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"cannot write .*(too long|Not a directory|Is a directory)"):
        check_place(tmp_path / name)
    assert names(tmp_path) == ["file", "folder"]


def test_a_link_is_followed_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "file/folder")
    with pytest.raises(InputError, match=r"cannot write .*lost: Not a directory"):
        check_place(tmp_path / "lost", is_folder=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"cannot write .*loop: Too many"):
        check_place(tmp_path / "loop", is_folder=True)
    with (
        pytest.raises(InputError, match=r"cannot write .*loop: Too many"),
        replacing_folder(tmp_path / "loop"),
    ):
        pass
    assert names(tmp_path) == ["file", "loop", "lost"]


@posix
def test_a_mounted_disk_is_filled_and_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    replace = Path.replace

    def apart(self: Path, target: Path) -> Path:
        if (tmp_path / "disk" in (self, target)) or target.parent == tmp_path / "disk":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, target)

    def rename(old: str | Path, new: str | Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "replace", apart)
    monkeypatch.setattr(os, "rename", rename)
    with replacing_folder(tmp_path / "disk") as building:
        (building / "a").mkdir()
        (building / "a/b").write_text("1")
    assert content(tmp_path) == {"disk/a/b": "1"}
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "disk")
    with pytest.raises(InputError, match=r"cannot write .*disk: .*busy"):
        check_place(tmp_path / "disk", is_folder=True)


def test_a_second_name_has_room_too(tmp_path: Path) -> None:
    path = tmp_path / f"{'🦊' * 62}abc.png"
    made = {create(path, lambda building: building.write_text("1")) for _ in range(12)}
    assert len(made) == 12 == len(names(tmp_path))
    assert all(each.suffix == ".png" for each in made)


@pytest.mark.parametrize("path", [5, None, b"a", "a\0b", "a\ud800"])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises(InputError, match="a path must be a text or a Path"):
        as_path(path)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    for name in ("a.png", "new/deeper/a.png", "ü 北京/🦊.png"):
        check_place(tmp_path / name)
    check_place(tmp_path, is_folder=True)
    assert names(tmp_path) == []
    with pytest.raises(InputError, match=r"MB free and a\.png needs 1,000,000,000 MB"):
        check_place(tmp_path / "a.png", size=10**15)


def test_the_system_without_a_number_is_a_sentence_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write .*a: encoder error; choose another place"):
        create(tmp_path / "a", lambda path: (_ for _ in ()).throw(OSError("encoder error")))
    with pytest.raises(RuntimeError, match="of another kind"), replacing(tmp_path / "a"):
        raise RuntimeError("of another kind")
    assert names(tmp_path) == []


@posix
def test_a_process_that_works_while_it_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from stable_diffusion.files import replacing
with replacing(Path({str(tmp_path / "a")!r})):
    print(flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
    assert names(tmp_path) == []

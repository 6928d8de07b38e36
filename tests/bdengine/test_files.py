"""Files are whole or absent: after kills, refused system calls and full disks."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdengine import files
from bdengine.errors import UserError
from bdengine.files import read_json, replace_folder, write_atomic, write_json

KILLS = """
import os, signal, sys, time
from pathlib import Path
import torch
from bdengine import files
from bdengine.checkpoint import WEIGHTS, load_state, read_json, read_safetensors, save_pipeline, save_state
from bdengine.networks import unet

torch.set_num_threads(1)
here = Path(sys.argv[1])
net = unet(8, 1, (8, 16), groups=4)

def save_file(value):
    save_state(here / "file", {"a": torch.full((20_000,), value)}, {"value": value})

def load_file():
    tensors, meta = load_state(here / "file")
    return {*tensors["a"].tolist(), meta["value"]}

def save_folder(value):
    for p in net.parameters():
        p.data.fill_(value)
    save_pipeline(here / "folder", net, {}, extra={"value": value})

def load_folder():
    tensors, _ = read_safetensors(here / "folder/unet" / WEIGHTS)
    extra = read_json(here / "folder/bdengine.json")
    return {extra["value"], *torch.cat([t.flatten() for t in tensors.values()]).unique().tolist()}

def killed(work, after=None):
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

def save_until_call(save, number):
    calls = iter(range(number))
    def counted(real):
        def call(*args):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        return call
    for name in ("fsync", "replace", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    files._exchange = counted(files._exchange)
    save(2.0)

def save_for_ever(save):
    while True:
        save(2.0)
        save(3.0)

for save, load in ((save_file, load_file), (save_folder, load_folder)):
    save(1.0)
    number, seen = 0, []
    while killed(lambda: save_until_call(save, number)):
        seen.append(load())
        number += 1
    assert {1.0} in seen and {2.0} in seen and all(len(values) == 1 for values in seen), seen
    for kill in range(6):
        assert killed(lambda: save_for_ever(save), after=0.01 + 0.007 * kill)
        assert len(load()) == 1
"""


def test_a_kill_leaves_the_old_or_the_new_whole(tmp_path: Path) -> None:
    """Killed at every system call of a checkpoint's save in turn, then at arbitrary moments."""
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with an old file ``file`` and an old folder ``folder``."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/part").write_text("old")
    (tmp_path / "file").write_text("old")
    return tmp_path


OLD = {"file": "old", "folder/part": "old"}


def put(path: Path, text: str) -> None:
    if path.name == "file":
        write_atomic(path, text)
        return
    with replace_folder(path, replaceable={"part"}) as folder:
        (folder / "part").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Lets no file grow past ``size`` bytes: a write that fails half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("what", "call"),
    [("folder", "mkdir"), ("folder", "fsync"), ("folder", "rename"), ("file", "fsync"), ("file", "replace")],
)
def test_a_refused_system_call_leaves_the_old(old: Path, monkeypatch: pytest.MonkeyPatch, what: str, call: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *_: False)
        patch.setattr(files.os, call, no_space)
        with pytest.raises(UserError, match=f"cannot write {old / what}: No space left on device; expected a writable"):
            put(old / what, "new")
    assert contents(old) == OLD


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_full_disk_leaves_the_old(old: Path, what: str) -> None:
    with (
        disk_of(4096),
        pytest.raises(UserError, match=f"cannot write {old / what}: File too large; expected a writable"),
    ):
        put(old / what, "new" * 4096)
    assert contents(old) == OLD


def test_a_swap_that_fails_half_way_puts_the_old_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, works = os.rename, iter([True, False, True])
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "rename", lambda *names: rename(*names) if next(works) else no_space())
    with pytest.raises(UserError, match="No space left"):
        put(old / "folder", "new")
    assert contents(old) == OLD


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_replacing_follows_a_link_and_leaves_only_the_new(
    old: Path, monkeypatch: pytest.MonkeyPatch, what: str, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    (old / "link").mkdir()
    (old / "link" / what).symlink_to(old / what)
    put(old / "link" / what, "new")
    assert (old / "link" / what).is_symlink()
    (old / "link" / what).unlink()
    assert contents(old) == {name: "new" if name.startswith(what) else "old" for name in OLD}


def test_a_folder_is_replaced_only_if_nothing_else_is_lost(old: Path) -> None:
    def replace(name: str) -> None:
        with replace_folder(old / name):
            raise AssertionError("the block ran")

    with pytest.raises(UserError, match="holds part, which replacing it would delete; expected nothing there"):
        replace("folder")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        replace("file")
    assert contents(old) == OLD


def test_a_folder_whose_block_fails_vanishes(tmp_path: Path) -> None:
    def half() -> None:
        with replace_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert os.listdir(tmp_path) == []


def test_parents_are_made_and_permissions_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    put(tmp_path / "deep/folder", "new")
    write_json(tmp_path / "deep/ours.json", {"a": 1})
    assert (tmp_path / "deep/ours.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "deep/folder").stat().st_mode == (tmp_path / "deep").stat().st_mode
    assert (tmp_path / "deep/ours.json").read_text() == '{\n  "a": 1\n}\n'
    assert read_json(tmp_path / "deep/ours.json") == {"a": 1}


def test_what_json_cannot_hold_is_refused_before_writing(old: Path) -> None:
    with pytest.raises(TypeError):
        write_json(old / "file", {"a": object()})
    assert contents(old) == OLD

"""A checkpoint's write that is cut, or finds no room: one can be loaded, or the run says so.

Lightning 2.6 failed in three ways, which are the mutants here; each has to be caught. (a) Through
$TMPDIR on another file system it wrote over the last good file in place, and a full disk left half
of it. (b) Into a directory that could not be written it said nothing. (c) It never called fsync.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_safetensors

from activations_cache import io
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import TopK
from sae.train import checkpoint
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.fit import train

PRIMITIVES = ("open_file", "write", "fsync", "rename", "mkdir", "unlink")
NEW = 5
"""Step of the checkpoint whose write is disturbed; steps 3 and 4 lie there."""


class Cut(BaseException):
    """The process ends here; nothing of it runs any more."""


def state(n: int) -> dict[str, torch.Tensor]:
    return {"a/x": torch.full((307,), float(n)), "a/n": torch.tensor(n)}


def ours(root: Path, n: int) -> None:
    checkpoint.save(root, n, state(n), "id")


def in_place(root: Path, n: int) -> None:
    """(a) Staged elsewhere, then copied over the only one there is."""
    data = to_safetensors(state(n))
    digest = checkpoint.hashlib.sha256(data).hexdigest()
    manifest = json.dumps({"identity": "id", "n_steps": n, "sha256": digest}).encode()
    only = root / "step-00000001"
    for directory in (root, only):
        io.mkdir(directory)
    staged = Path(os.environ["TMPDIR"]) / "staged"
    staged.write_bytes(data)
    for name, content in ((checkpoint.STATE, staged.read_bytes()), (checkpoint.MANIFEST, manifest)):
        descriptor = io.open_file(only / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            io.write(descriptor, memoryview(content))
            io.fsync(descriptor)
        finally:
            os.close(descriptor)


def silent(root: Path, n: int) -> None:
    """(b) What goes wrong is nobody's business."""
    with contextlib.suppress(OSError):
        ours(root, n)


def unsynced(root: Path, n: int) -> None:
    """(c) Written, renamed, and perhaps on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "fsync", lambda descriptor: None)
        ours(root, n)


def loaded(root: Path) -> int:
    """The step that can be loaded, its content checked; 0 without one."""
    result = checkpoint.load_newest(root, "id")
    if result is None:
        return 0
    assert all(torch.equal(t, state(result[0])[name]) for name, t in result[1].items())
    return result[0]


def disturbed(save, root: Path, k: int, instead) -> bool:
    """Save steps 3 and 4, then NEW with `instead(name, args)` at the k-th primitive and after it.

    Returns whether there was such a call.
    """
    for n in (NEW - 2, NEW - 1):
        save(root, n)
    calls = itertools.count(1)
    reached = []

    def wrapped(name, original):
        def call(*args, **named):
            if next(calls) >= k:
                reached.append(name)
                instead(name, args)
            return original(*args, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in PRIMITIVES:
            patch.setattr(io, name, wrapped(name, getattr(io, name)))
        patch.setattr(checkpoint.shutil, "rmtree", wrapped("rmtree", shutil.rmtree))
        with contextlib.suppress(Cut):
            save(root, NEW)
    return bool(reached)


def survives_cuts(save, root: Path) -> bool:
    """Cut at every call, a write after half of its bytes: an old or the new one can be loaded."""

    def cut(name, args):
        if name == "write":
            os.write(args[0], args[1][: len(args[1]) // 2])
        raise Cut

    for k in itertools.count(1):
        if not disturbed(save, root / str(k), k, cut):
            return k > 5
        if loaded(root / str(k)) < NEW - 1:
            return False
    return False


def survives(save, root: Path, names: tuple[str, ...], number: int) -> bool:
    """With an error from the k-th call on: it is raised and an old one is there, or all is well."""

    def fail(name, args):
        if name in names:
            raise OSError(number, os.strerror(number))

    for k in itertools.count(1):
        raised = reached = False
        try:
            reached = disturbed(save, root / str(k), k, fail)
        except OSError:
            raised = reached = True
        if loaded(root / str(k)) < (NEW - 1 if raised else NEW):
            return False
        if not reached:
            return k > 5
    return False


def survives_a_full_disk(save, root: Path) -> bool:
    return survives(save, root, ("open_file", "write", "fsync", "mkdir"), errno.ENOSPC)


def survives_a_read_only_directory(save, root: Path) -> bool:
    return survives(save, root, ("open_file", "rename", "mkdir", "unlink"), errno.EROFS)


def survives_power_loss(save, root: Path) -> bool:
    """What was written and not synced is gone when the power is, right after the save."""
    written: set[str] = set()

    def path_of(descriptor):
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    write, fsync, rename = io.write, io.fsync, io.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "write", lambda d, data: (written.add(str(path_of(d))), write(d, data)))
        patch.setattr(io, "fsync", lambda d: (written.discard(str(path_of(d))), fsync(d)))

        def renamed(source, target):
            if str(source) in written:
                written.symmetric_difference_update({str(source), str(target)})
            rename(source, target)

        patch.setattr(io, "rename", renamed)
        for n in (NEW - 1, NEW):
            save(root, n)
    for path in map(Path, written):
        if path.exists():
            path.write_bytes(b"")
    return loaded(root) >= NEW - 1


def survives_without_a_temporary_directory(save, root: Path) -> bool:
    """$TMPDIR is another, unusable file system: nothing of a checkpoint goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(root / "no such directory"))
        try:
            save(root, NEW)
        except OSError:
            return False
    return loaded(root) == NEW


GOALS = {
    "cuts": survives_cuts,
    "full": survives_a_full_disk,
    "read-only": survives_a_read_only_directory,
    "power": survives_power_loss,
    "tmpdir": survives_without_a_temporary_directory,
}
MUTANTS = {
    in_place: {"cuts", "full", "read-only", "tmpdir"},
    silent: {"full", "read-only"},
    unsynced: {"power"},
}


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.mark.parametrize("goal", GOALS)
def test_a_checkpoint_can_be_loaded_or_the_failure_is_told(tmp_path, goal, figure):
    root = tmp_path / "root"
    root.mkdir()
    assert GOALS[goal](ours, root)
    figure("T2", f"a write disturbed at each call ({goal}): a checkpoint is whole, or it is told")


@pytest.mark.parametrize(("mutant", "caught"), [(m, sorted(c)) for m, c in MUTANTS.items()])
def test_each_failure_of_lightning_would_be_caught(tmp_path, mutant, caught):
    for goal, holds in GOALS.items():
        root = tmp_path / goal
        root.mkdir()
        assert holds(mutant, root) == (goal not in caught), goal


def test_a_run_that_cannot_save_ends_with_an_error(tmp_path, monkeypatch):
    cache = write_synthetic(tmp_path / "cache", synthetic_plan({"a:out": 7}, n_examples=31))
    config = TrainConfig(
        saes={"a": DictionaryConfig(d_sae=23, activation=TopK(k=3))}, batch=53, precision="fp32"
    )
    open_file = io.open_file

    def refused(path, flags):
        if "checkpoints" in str(path) and flags & os.O_WRONLY:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return open_file(path, flags)

    monkeypatch.setattr(io, "open_file", refused)
    with pytest.raises(OSError, match="Read-only file system"):
        train(cache, config, tmp_path / "run")
    assert not (tmp_path / "run" / "a").exists()

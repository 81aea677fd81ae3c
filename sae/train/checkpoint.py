"""Checkpoints: a new directory each, its manifest last, the newest that verifies wins.

What follows each step: progress, a checkpoint when it is time, the end when a signal says so. The
step waits while the state is copied; a thread writes the copy beside the steps that follow.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from activations_cache import io
from monosema.checks import MonosemaError, Progress
from sae.train import cost
from sae.train.config import TrainConfig
from sae.train.ranks import Ranks
from sae.train.signals import Signals, Stopped

MANIFEST = "manifest.json"
STATE = "state.safetensors"
KEPT = 2
READ_AT_ONCE = 16 << 20

logger = logging.getLogger(__name__)


def save(root: Path, n_steps: int, state: dict[str, Tensor], identity: str) -> Path:
    """Write `root/step-N`, verify it, and keep beside it the newest one before it.

    Checkpoints of other identities are neither read nor removed; where one has the name already,
    this one has a part of its own identity in its name.

    Args:
        root: Directory of this run's checkpoints.
        n_steps: Steps done; names the directory.
        state: Flat named tensors.
        identity: Digest of what is trained on what; a checkpoint of another one is never read.
    """
    path, hashed = _place(root, n_steps, identity), hashlib.sha256()
    io.write_files({path / STATE: _file(state, hashed.update)})
    manifest = {"identity": identity, "n_steps": n_steps, "sha256": hashed.hexdigest()}
    manifest["crc32c"] = _checksum(manifest)
    io.write_files({path / MANIFEST: json.dumps(manifest).encode()})
    if _verified(path, identity) is None:
        raise OSError(f"{path} must read back as it was written, got other bytes; check the disk")
    before = [other for other in _own(root, identity) if other < path]
    for other in _own(root, identity):
        if other != path and other not in before[1 - KEPT :]:
            # The manifest goes first, so a half-removed checkpoint is none.
            (other / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(other)
    for other in root.glob("step-*"):
        if not (other / MANIFEST).exists():  # its writing, or its removal, was killed
            shutil.rmtree(other)
    return path


def _file(state: Mapping[str, Tensor], see: Callable[[Any], None]) -> io.Parts:
    """The bytes that safetensors would write, tensor by tensor: it holds them all a second time.

    Args:
        state: Flat named tensors.
        see: Called with each part before it is written.
    """
    # How it orders tensors and names their formats, it says of empty ones as well.
    empty = to_safetensors({name: torch.empty(0, dtype=t.dtype) for name, t in state.items()})
    entries, size = json.loads(empty[8:]), 0
    for name, entry in entries.items():
        begin, size = size, size + state[name].nbytes
        entry |= {"shape": list(state[name].shape), "data_offsets": [begin, size]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = struct.pack("<Q", len(header)) + header

    def parts() -> Iterator[io.Buffer]:
        here = (state[name].detach().cpu().contiguous().reshape(-1) for name in entries)
        for part in itertools.chain([header], (t.view(torch.uint8).numpy() for t in here)):
            see(part)
            yield part

    return io.Parts(len(header) + size, parts())


def _place(root: Path, n_steps: int, identity: str) -> Path:
    path = root / f"step-{n_steps:08d}"
    if _identity(path) in (None, identity):
        return path
    return path.with_name(f"{path.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}")


def _own(root: Path, identity: str) -> list[Path]:
    """The checkpoints of an identity, ascending.

    Those beyond the newest one were not whole, or the run would have gone on from there.
    """
    return [path for path in sorted(root.glob("step-*")) if _identity(path) == identity]


def _identity(path: Path) -> str | None:
    """Whose checkpoint it is; None where no whole manifest says so."""
    try:
        return _manifest(path)["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; those of older versions have no checksum of their own.

    Raises:
        ValueError: If it is damaged.
    """
    manifest = json.loads((path / MANIFEST).read_bytes())
    checksum = manifest.pop("crc32c", None)
    is_whole = checksum == _checksum(manifest) if checksum else True
    if not is_whole or manifest.keys() != {"identity", "n_steps", "sha256"}:
        raise MonosemaError(f"{path / MANIFEST} must match its own checksum, got a damaged file")
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> str:
    return io.crc32c(json.dumps(manifest, sort_keys=True).encode())


def load_newest(root: Path, identity: str) -> tuple[int, dict[str, Tensor]] | None:
    """Steps and state of the newest checkpoint of this identity that verifies, or None."""
    for path in sorted(root.glob("step-*"), reverse=True):
        if _identity(path) not in (None, identity):
            continue
        n_steps = _verified(path, identity)
        if n_steps is not None:
            return n_steps, from_safetensors((path / STATE).read_bytes())
        logger.warning("%s is not a whole checkpoint of this run; trying an older one", path)
    return None


def _verified(path: Path, identity: str) -> int | None:
    """Steps of a checkpoint of this identity that has the bytes that were written, or None."""
    try:
        manifest = _manifest(path)
        hashed = hashlib.sha256()
        with (path / STATE).open("rb") as file:  # no map: a disk's error must be an OSError
            while part := file.read(READ_AT_ONCE):
                hashed.update(part)
        if manifest["identity"] != identity or manifest["sha256"] != hashed.hexdigest():
            return None
        return int(manifest["n_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


ROOM = 0.75
"""Of the memory that is free, a copy of the state takes so much at most."""
ALIGNED = 64
"""Bytes at a multiple of which each tensor of the copy begins."""


class StateCopy(NamedTuple):
    """The state as it was after a step."""

    state: dict[str, Tensor]
    """In the host's memory."""
    whole: Callable[[], float]
    """Waits until all of it is there; the seconds for which the device did nothing else."""


class Snapshot:
    """Room in the host's memory for one copy of the state, kept for the next one."""

    def __init__(self) -> None:
        """Take no memory yet."""
        self._room = torch.empty(0, dtype=torch.uint8)
        self._has_said = False

    def reserve(self, state: Mapping[str, Tensor]) -> None:
        """Take the memory before it is needed: to touch it first takes longer than to copy."""
        begins, on_gpu = _places(state)
        if self._has_room(begins[-1], pinned=on_gpu):
            self._room.zero_()

    def take(self, state: Mapping[str, Tensor]) -> StateCopy | None:
        """Copy the state, or nothing where there is no room, which is said once.

        From a GPU it goes to pinned memory in the step's own stream: the host waits for nothing,
        and the next step, which changes what is copied, begins behind it.
        """
        begins, on_gpu = _places(state)
        if not self._has_room(begins[-1], pinned=on_gpu):
            return None
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * on_gpu)]
        for event in events[:1]:
            event.record()
        copy = {}
        for (name, t), begin in zip(state.items(), begins, strict=False):
            place = self._room[begin : begin + t.nbytes].view(t.dtype).view(t.shape)
            copy[name] = place.copy_(t.detach(), non_blocking=True)
        for event in events[1:]:
            event.record()

        def whole() -> float:
            if not events:
                return 0.0
            events[1].synchronize()
            return events[0].elapsed_time(events[1]) / 1e3

        return StateCopy(copy, whole)

    def _has_room(self, n_bytes: int, *, pinned: bool) -> bool:
        if n_bytes <= len(self._room):
            return True
        self._room = self._room.new_empty(0)  # what was given back counts as free
        needed, free = cost.pinned(n_bytes) if pinned else n_bytes, cost.free_on_cpu()
        if needed <= ROOM * free:
            with contextlib.suppress(RuntimeError):  # the system gives, or pins, less than is free
                self._room = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned)
                return True
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "the steps wait while checkpoints are written: a copy of %.1f GiB does not fit "
                "into %.0f %% of the host's %.1f GiB of free memory",
                needed / 2**30,
                100 * ROOM,
                free / 2**30,
            )
        return False


def _places(state: Mapping[str, Tensor]) -> tuple[list[int], bool]:
    """Where each tensor of a copy begins, and its end; and whether it comes from a GPU."""
    sizes = (-(-t.nbytes // ALIGNED) * ALIGNED for t in state.values())
    begins = list(itertools.accumulate(sizes, initial=0))
    return begins, any(t.is_cuda for t in state.values())


LATE = 1
"""It is time for a checkpoint: below the numbers of the signals that stop a run."""
SHARE = 0.01
"""Of a run's time, steps wait for checkpoints so much at most; else these come less often."""


class Saver:
    """Called after each step with what gives the state of the run.

    The first process writes, and its clock counts; a signal to any of them stops all. One write is
    on its way at most: a checkpoint that is due before it has ended follows at the step after, or
    a slow disk would hold up the steps, and two copies would take the host's memory.
    """

    def __init__(
        self,
        root: Path,
        identity: str,
        config: TrainConfig,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        """Take where to write, what is trained, and how often."""
        self.root, self.identity, self.config = root, identity, config
        self.ranks, self.progress = ranks, progress
        self.signals = Signals()
        self.began = self.saved_at = time.monotonic()
        self.waited = 0.0
        """Seconds that steps waited for checkpoints."""
        self.lines: tuple[str, ...] = ()
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write: Future[float] | None = None
        self._reserving: Future[None] | None = None
        self._n_begun, self._has_said = 0, False

    def __call__(
        self, n_steps: int, total_steps: int, state: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Report, and save or stop if any process asks for it.

        Raises:
            Stopped: If a signal came; the checkpoint of this step is written.
            OSError: If the checkpoint before could not be written.
        """
        if self.ranks.is_first:
            done, total = n_steps * self.config.batch, total_steps * self.config.batch
            self.progress(done, total, "\n".join(("rows", *self.lines)))
        if self._write is not None and self._write.done():
            self.settle()
        if self._is_half_way() and n_steps < total_steps:
            self._reserving = self._thread.submit(self._snapshot.reserve, state())
        wish = LATE if self.ranks.is_first and n_steps < total_steps and self._is_due() else 0
        wish = self.ranks.largest(self.signals.received or wish)
        if wish > LATE:
            self.save(n_steps, state())
            raise Stopped(wish, n_steps)
        if wish:
            self._begin(n_steps, state)

    def _is_half_way(self) -> bool:
        """Whether it is time to make room for the first copy of the state."""
        # what several processes hold in parts is joined into memory of its own
        if self._reserving is not None or not self.ranks.is_first or self.ranks.latents.size > 1:
            return False
        every = self.config.checkpoint_seconds
        return every / 2 <= time.monotonic() - self.began < every

    def _is_due(self) -> bool:
        """Whether there should be a checkpoint: the one place that decides how often."""
        now = time.monotonic()
        if self._write is not None or now - self.saved_at < self.config.checkpoint_seconds:
            return False
        after = self.waited * (1 + 1 / max(self._n_begun, 1))  # if the next one takes as long
        if after <= SHARE * (now - self.began):
            return True
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "checkpoints come less often than train.checkpoint_seconds=%g says: steps waited "
                "%.1f s for them, more than %.0f %% of the time",
                self.config.checkpoint_seconds,
                self.waited,
                100 * SHARE,
            )
        return False

    def _begin(self, n_steps: int, state: Callable[[], dict[str, Tensor]]) -> None:
        """Copy the state and let the thread write it; without room for a copy, write it here."""
        began, found = time.monotonic(), state()
        if self.ranks.is_first:
            if self._reserving is not None:
                self._reserving.result()
            joined = StateCopy(found, lambda: 0.0) if self.ranks.latents.size > 1 else None
            copy = joined or self._snapshot.take(found)
            if copy is None:
                save(self.root, n_steps, found, self.identity)
            else:
                self._write = self._thread.submit(self._written, n_steps, copy)
        self.saved_at, self._n_begun = began, self._n_begun + 1
        self.waited += time.monotonic() - began

    def _written(self, n_steps: int, copy: StateCopy) -> float:
        held_up = copy.whole()
        save(self.root, n_steps, copy.state, self.identity)
        return held_up

    def settle(self) -> None:
        """Wait for the write that is on its way, if there is one.

        Raises:
            OSError: If it failed.
        """
        write, self._write = self._write, None
        if write is not None:
            self.waited += write.result()

    def save(self, n_steps: int, state: dict[str, Tensor]) -> None:
        """Write a checkpoint at once; it and all before it are there when this returns."""
        if self.ranks.is_first:
            self._settle_or_say()
            save(self.root, n_steps, state, self.identity)
        self.ranks.largest(n_steps)
        self.saved_at = time.monotonic()

    def close(self) -> None:
        """End the thread, once it has written, and give the memory back."""
        self._settle_or_say()
        self._thread.shutdown()
        self._snapshot = Snapshot()

    def _settle_or_say(self) -> None:
        """Wait for the write; an error of it must not hide another, nor keep a later one back."""
        try:
            self.settle()
        except OSError as error:
            logger.warning("a checkpoint was not written: %s", error)

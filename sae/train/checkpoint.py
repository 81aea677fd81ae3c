"""Checkpoints: a new directory each, its manifest last, the newest that verifies wins.

What follows each step: progress, a checkpoint when it is time, the end when a signal says so.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from activations_cache import io
from monosema.checks import MonosemaError, Progress
from sae.train.config import TrainConfig
from sae.train.ranks import Ranks
from sae.train.signals import Signals, Stopped

MANIFEST = "manifest.json"
STATE = "state.safetensors"
KEPT = 2

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
    path = _place(root, n_steps, identity)
    data = to_safetensors({name: t.detach().cpu().contiguous() for name, t in state.items()})
    digest = hashlib.sha256(data).hexdigest()
    manifest = {"identity": identity, "n_steps": n_steps, "sha256": digest}
    io.write_files({path / STATE: data})
    manifest["crc32c"] = _checksum(manifest)
    io.write_files({path / MANIFEST: json.dumps(manifest).encode()})
    if _read(path, identity) is None:
        raise OSError(f"{path} must read back as it was written, got other bytes; check the disk")
    before = [other for other in _own(root, identity) if other < path]
    for other in _own(root, identity):
        if other != path and other not in before[1 - KEPT :]:
            # The manifest goes first, so a half-removed checkpoint is none.
            (other / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(other)
    return path


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
        found = _read(path, identity)
        if found is not None:
            return found
        logger.warning("%s is not a whole checkpoint of this run; trying an older one", path)
    return None


def _read(path: Path, identity: str) -> tuple[int, dict[str, Tensor]] | None:
    try:
        manifest = _manifest(path)
        data = (path / STATE).read_bytes()
        whole = hashlib.sha256(data).hexdigest() == manifest["sha256"]
        if manifest["identity"] != identity or not whole:
            return None
        return int(manifest["n_steps"]), from_safetensors(data)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


LATE = 1
"""It is time for a checkpoint: below the numbers of the signals that stop a run."""


class Saver:
    """Called after each step with what gives the state of the run.

    The first process writes, and its clock counts; a signal to any of them stops all.
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
        self.saved_at = time.monotonic()
        self.lines: tuple[str, ...] = ()

    def __call__(
        self, n_steps: int, total_steps: int, state: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Report, and save or stop if any process asks for it.

        Raises:
            Stopped: If a signal came; the checkpoint of this step is written.
        """
        if self.ranks.is_first:
            done, total = n_steps * self.config.batch, total_steps * self.config.batch
            self.progress(done, total, "\n".join(("rows", *self.lines)))
        late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        wish = LATE if late and self.ranks.is_first and n_steps < total_steps else 0
        wish = self.ranks.largest(self.signals.received or wish)
        if wish:
            self.save(n_steps, state())
        if wish > LATE:
            raise Stopped(wish, n_steps)

    def save(self, n_steps: int, state: dict[str, Tensor]) -> None:
        """Write a checkpoint; the others wait until it is there."""
        if self.ranks.is_first:
            save(self.root, n_steps, state, self.identity)
        self.ranks.largest(n_steps)
        self.saved_at = time.monotonic()

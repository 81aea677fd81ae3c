"""Train steps side by side on rows that can be made again from any number on, with checkpoints."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sae.train import checkpoint
from sae.train.step import TrainStep


class Saved(NamedTuple):
    """Where they lie, of what they are, and how often one is written."""

    root: Path
    identity: str
    """Says what is trained on what; a checkpoint of another identity is never read."""
    seconds: float


def train(
    steps: Mapping[str, TrainStep],
    batches_from: Callable[[int], Iterable[Tensor]],
    checkpoints: Saved | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Let all steps see each batch once; go on from the newest checkpoint that is whole.

    Args:
        steps: By name; new ones.
        batches_from: The batches from this number on; the same number gives the same bits.
        checkpoints: None writes none.
        progress: Called with the number of batches that were seen.
    """
    done = 0 if checkpoints is None else _resumed(steps, checkpoints)
    saved_at = time.monotonic()
    for number, x in enumerate(batches_from(done), start=done + 1):
        for step in steps.values():
            step(x)
        if checkpoints is not None and time.monotonic() - saved_at >= checkpoints.seconds:
            checkpoint.save(checkpoints.root, number, _state(steps), checkpoints.identity)
            saved_at = time.monotonic()
        if progress is not None:
            progress(number)


def _resumed(steps: Mapping[str, TrainStep], checkpoints: Saved) -> int:
    newest = checkpoint.load_newest(checkpoints.root, checkpoints.identity)
    if newest is None:
        return 0
    done, state = newest
    for name, step in steps.items():
        start = f"{name}/"
        step.load_state_dict({
            key.removeprefix(start): t for key, t in state.items() if key.startswith(start)
        })
    return done


def _state(steps: Mapping[str, TrainStep]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, step in steps.items()
        for key, tensor in step.state_dict().items()
    }

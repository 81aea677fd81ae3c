"""How other projects hand out shuffled batches of the same rows, where they are installed.

SAELens reads its own cache (Arrow, float32) through its own store and mixing buffer.
dictionary_learning has no cache: its buffer is filled here from a memory map in place of a model,
so that what is timed is the buffer alone, with rows that cost nothing to make.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Epoch = Callable[[], int]
CONTEXT = 256
BUFFER = 65536


def sae_lens_epoch(single: np.ndarray, batch: int, folder: Path) -> Epoch:
    """SAELens: a cache written as its runner writes it, read by its ActivationsStore."""
    from datasets import Array2D, Dataset, Features, Sequence, Value, concatenate_datasets
    from sae_lens.training.activations_store import ActivationsStore

    n_contexts, width = len(single) // CONTEXT, single.shape[1]
    features = Features({
        "hook": Array2D(shape=(CONTEXT, width), dtype="float32"),
        "token_ids": Sequence(Value(dtype="int32"), length=CONTEXT),
    })
    parts = []
    for first in range(0, n_contexts, 64):
        n = min(64, n_contexts - first)
        rows = floats(single, first * CONTEXT, (first + n) * CONTEXT)
        columns = {
            "hook": rows.view(n, CONTEXT, width).numpy(),
            "token_ids": np.zeros((n, CONTEXT), np.int32),
        }
        parts.append(Dataset.from_dict(columns, features=features))
    concatenate_datasets(parts).save_to_disk(folder)

    def run() -> int:
        store = ActivationsStore(
            model=None, dataset=None, streaming=False, hook_name="hook", hook_head_index=None,
            context_size=CONTEXT, d_in=width, n_batches_in_buffer=BUFFER // CONTEXT,
            total_training_tokens=len(single), store_batch_size_prompts=16,
            train_batch_size_tokens=batch, prepend_bos=False, normalize_activations="none",
            device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder),
        )  # fmt: skip
        n_batches = n_contexts * CONTEXT // batch - BUFFER // batch  # less than one epoch
        for _ in range(n_batches):
            next(store)
        return n_batches * batch

    return run


def dictionary_learning_epoch(single: np.ndarray, batch: int, folder: Path) -> Epoch:
    """The ActivationBuffer of dictionary_learning, its refresh fed by the map."""
    from dictionary_learning.buffer import ActivationBuffer

    del folder

    class Fed(ActivationBuffer):
        """Its refresh as published, with rows of the map where the model's rows stand."""

        def __init__(self, source: Iterator[Tensor], **options: Any) -> None:
            super().__init__(data=iter(()), submodule=None, **options)
            self.source = source

        def refresh(self) -> None:
            self.activations = self.activations[~self.read]
            n_given = len(self.activations)
            fresh = torch.empty(self.activation_buffer_size, self.d_submodule)
            fresh[:n_given] = self.activations
            self.activations = fresh
            while n_given < self.activation_buffer_size:
                rows = next(self.source)[: self.activation_buffer_size - n_given]
                self.activations[n_given : n_given + len(rows)] = rows
                n_given += len(rows)
            self.read = torch.zeros(len(self.activations), dtype=torch.bool)

    class Model:
        """What its constructor asks of a model."""

        dtype = torch.float32

    def run() -> int:
        pieces = (
            floats(single, first, first + 16 * CONTEXT)
            for first in range(0, len(single), 16 * CONTEXT)
        )
        buffer = Fed(
            pieces, model=Model(), d_submodule=single.shape[1], n_ctxs=BUFFER // CONTEXT,
            ctx_len=CONTEXT, out_batch_size=batch,
        )  # fmt: skip
        n_rows = 0
        try:
            while True:
                n_rows += len(next(buffer))
        except StopIteration:
            return n_rows

    return run


EPOCHS = {"sae_lens": sae_lens_epoch, "dictionary_learning": dictionary_learning_epoch}
"""By the name of the module that must be importable."""


def peer_epochs(single: np.ndarray, batch: int, folder: Path) -> dict[str, Epoch]:
    """Make the epochs of the peers that are installed.

    Args:
        single: the rows as bfloat16 bits, shape (rows, width).
        batch: rows of a batch.
        folder: where a peer may write its own cache.

    Returns:
        By name, a function that hands out an epoch and returns the number of rows.
    """
    return {
        name: make(single, batch, folder / name)
        for name, make in EPOCHS.items()
        if importlib.util.find_spec(name) is not None
    }


def floats(single: np.ndarray, first: int, last: int) -> Tensor:
    """Rows of the map as float32."""
    return torch.from_numpy(single[first:last].view(np.int16).copy()).view(torch.bfloat16).float()

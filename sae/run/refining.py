"""The refined read-out of a dictionary as a job, and a linear encoder that learns from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from activations_cache import ActivationCache
from activations_cache.checks import Progress, silent
from activations_cache.config import TRAINING_SPLITS
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.pretrained import monosema_format
from sae.read_out import ReadOut
from sae.run.context import (
    CacheOrPath,
    DictionaryOrPath,
    FittedDictionary,
    Section,
    fitted,
    opened,
)
from sae.run.read_outs import ROWS, STEPS, Figures, distilled, figures, sample

ROWS_TO_DISTIL = 65_536
"""Rows that a linear encoder learns from."""


class Refined(NamedTuple):
    """A dictionary with its refined read-out."""

    dictionary: SparseAutoencoder
    """The same as before; `reading("refined")` reads by the new read-out."""
    read_out: ReadOut
    path: Path | None
    """The file; None for a dictionary that was passed as it is."""
    figures: dict[str, Figures]
    """On rows that it was not set on: held-out ones where there are any."""

    @property
    def section(self) -> Section:
        """A row for each way of reading."""
        note = f"{self.read_out.made_from['rule']}; {self.path or 'not written'}"
        return _section(self.figures, note)


def _section(figures: Mapping[str, Figures], note: str) -> Section:
    rows = tuple((name, f"{one.fvu:.4f}", f"{one.l0:.2f}") for name, one in figures.items())
    return Section("read-outs", ResultTable(("read-out", "FVU", "L0"), rows, note))


def refine(
    dictionary: DictionaryOrPath,
    cache: CacheOrPath,
    *,
    hook_point: str | None = None,
    rows: int = ROWS,
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> Refined:
    """Set the refined read-out of a dictionary on training rows, and write it beside it.

    Args:
        dictionary: The dictionary; one that is passed by its path gets a file.
        cache: What it was trained on.
        hook_point: Which stream; that of the dictionary when absent.
        rows: Training rows that are read.
        seed: Decides which.
        force: Take a cache of another model or place too.
        progress: Called after each chunk.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the dictionary does not fit the cache, or does not predict what it reads.
    """
    cache = opened(cache)
    one = fitted(dictionary, cache, hook_point, force=force)
    path = one.refined(cache, rows, seed, progress)
    read_out = one.dictionary.require_read_out()
    tested = _tested(one, cache, rows, seed)
    return Refined(one.dictionary, read_out, path, figures(one.dictionary, tested))


def _tested(
    one: FittedDictionary, cache: ActivationCache, n: int, seed: int
) -> Float[Tensor, "row d_in"]:
    """Held-out rows, or training rows where none are held out."""
    splits = ("hold",) if len(cache.rows(("hold",))) else TRAINING_SPLITS
    return sample(one.rows_of(cache), one.hook_point, splits, n, seed)


class Distilled(NamedTuple):
    """A dictionary whose linear encoder learned from refined latents."""

    dictionary: SparseAutoencoder
    """An ordinary one, of JumpReLU."""
    path: Path | None
    """Its directory."""
    figures: dict[str, Figures]
    """On held-out rows: the dictionary by both ways of reading, and this one."""

    @property
    def section(self) -> Section:
        """A row for each way of reading."""
        return _section(self.figures, f"{self.path or 'not written'}")


def distil(  # noqa: PLR0913
    dictionary: DictionaryOrPath,
    cache: CacheOrPath,
    out: str | Path | None = None,
    *,
    hook_point: str | None = None,
    rows: int = ROWS_TO_DISTIL,
    steps: int = STEPS,
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> Distilled:
    """Fit a linear encoder to a dictionary's refined latents; the decoder stays.

    The result is an ordinary dictionary, which other libraries read after `sae convert`.

    Args:
        dictionary: The dictionary; a refined read-out that was never set is set first.
        cache: What it was trained on.
        out: Directory of the result.
        hook_point: Which stream; that of the dictionary when absent.
        rows: Training rows to learn from.
        steps: Steps of Adam.
        seed: Decides which rows, and in which order.
        force: Take a cache of another model or place too.
        progress: Called after each step.

    Raises:
        TypeError: If an argument is of another class.
        ValueError: If the dictionary does not fit the cache, or does not predict what it reads.
    """
    cache = opened(cache)
    one = fitted(dictionary, cache, hook_point, force=force, read_out="refined")
    x = sample(one.rows_of(cache), one.hook_point, TRAINING_SPLITS, rows, seed)
    student = distilled(one.dictionary, x, steps=steps, seed=seed, progress=progress)
    made_from = {"from": one.name, "rows": len(x), "steps": steps, "seed": seed}
    recipe = one.provenance.get("recipe")
    marked = {"recipe": {**recipe, "distilled": True}} if recipe else {}
    student.provenance = {**one.provenance, **marked, "distilled": made_from}
    path = None if out is None else monosema_format.save(student, out)
    tested = _tested(one, cache, ROWS, seed)
    found = figures(one.dictionary, tested)
    return Distilled(student, path, found | {"distilled": figures(student, tested)["linear"]})

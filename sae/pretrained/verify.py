"""Hold a released dictionary against its published figures, in each way that it may be read.

A wrong reading is silent: it gives rows that look like a reconstruction. It shows in L0 and FVU on
the activations that the dictionary was made for, and beside a decoder whose rows are permuted.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.metrics import FVU, L0Histogram
from sae.pretrained.foreign import DictionaryFormatError

L0_WITHIN = 0.3
"""Published L0 differ by the text they were measured on; wrong readings are off by far more."""
FVU_WITHIN = 0.3
CONTROL = 2.0
"""A permuted decoder must be this many times worse, or the figures say nothing of the decoder."""
BATCH = 512
L0_KEYS = ("l0", "average_l0")
"""Where releases state their L0 in a config or a path."""


class Published(NamedTuple):
    """What a release states of itself; None where it does not."""

    l0: float | None = None
    fvu: float | None = None


class ReadingFigures(NamedTuple):
    """One way of reading, on rows of the model."""

    reading: str
    """How the files were read."""
    l0: float
    """Mean number of latents that fire in a row."""
    fvu: float
    """Fraction of variance unexplained."""
    fvu_permuted: float
    """The same with the decoder's rows permuted: what chance gives."""
    n_rows: int
    """Rows that were seen."""


Pair = tuple[Float[Tensor, "_ d_in"], Float[Tensor, "_ d_out"]]
"""Rows that are read, and those to predict; the last pair of several may have fewer."""


def published(site: dict[str, str], given: str | None) -> Published:
    """Take figures that were given, such as "l0=50,fvu=0.2", or what files and catalogue state.

    Raises:
        DictionaryFormatError: If neither says anything, or something else than positive numbers.
    """
    stated = next((site[key] for key in L0_KEYS if key in site), None)
    known = {"l0": stated, "fvu": site.get("fvu")}
    text = given or ",".join(f"{name}={value}" for name, value in known.items() if value)
    parts = [part.partition("=") for part in text.split(",") if part]
    results = {name: _number(value) for name, _, value in parts}
    if not results or not results.keys() <= set(Published._fields) or min(results.values()) <= 0:
        raise DictionaryFormatError(
            "the published figures must be positive numbers such as l0=50,fvu=0.2, from its files "
            f"or by --published, got {text!r}"
        )
    return Published(**results)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def measure(reading: str, dictionary: SparseAutoencoder, pairs: Iterable[Pair]) -> ReadingFigures:
    """Measure one reading on rows.

    Args:
        reading: Its name.
        dictionary: What it gave.
        pairs: Rows that are read and rows to predict, in the model's units.

    Raises:
        DictionaryFormatError: If there are no rows, or if they have not its width.
    """
    pairs = list(pairs)
    _check_widths(dictionary, pairs)
    l0, fvu, control = L0Histogram(), FVU(), FVU()
    order = torch.randperm(dictionary.config.d_sae, generator=torch.Generator().manual_seed(0))
    n_rows = 0
    with torch.no_grad():
        for x, y in pairs:
            acts = dictionary.encode(x)
            l0.update(acts.values)
            fvu.update(y, dictionary.decode(acts, x))
            control.update(y, dictionary.decode(acts._replace(indices=order[acts.indices]), x))
            n_rows += len(x)
    return ReadingFigures(reading, l0.mean, fvu.compute(), control.compute(), n_rows)


def meets(result: ReadingFigures, stated: Published) -> bool:
    """Whether a reading gives the published figures and a permuted decoder does not."""
    l0 = stated.l0 is None or abs(result.l0 - stated.l0) <= L0_WITHIN * stated.l0
    fvu = stated.fvu is None or result.fvu <= (1 + FVU_WITHIN) * stated.fvu
    return l0 and fvu and result.fvu_permuted >= CONTROL * result.fvu


def _check_widths(dictionary: SparseAutoencoder, pairs: list[Pair]) -> None:
    width = (dictionary.config.d_in, dictionary.config.width_out)
    got = (pairs[0][0].shape[1], pairs[0][1].shape[1]) if pairs else (0, 0)
    if got != width:
        raise DictionaryFormatError(
            f"the rows to read and to predict must be {width} wide, got {got}; name the hook "
            "points that the dictionary is for"
        )

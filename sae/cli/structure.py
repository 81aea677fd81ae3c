"""Figures of a dictionary's make-up: description length and meta-score, beside chance."""

from collections.abc import Mapping

import torch

from activations_cache import ActivationCache
from activations_cache.checks import Progress
from sae.autoencoder import SparseAutoencoder
from sae.browser import ResultTable
from sae.evaluate.run import held_out_rows
from sae.evaluate.structure.description import (
    BATCH,
    DescriptionLength,
    description_length,
    meta_score,
)

COLUMNS = ("dictionary", "bits", "FVU", "meta explained", "chance")

MOST_ROWS = 4096
MOST_ACTIVATIONS = 2**25
"""Entries of a dense matrix of activations, which the description length takes."""

LOSS = 0.01
"""FVU that the rounding of activations may cost."""

N_STEPS = 24
"""Octaves below the largest activation that are tried at most."""

K_META = 4


def structure_table(
    dictionaries: Mapping[str, SparseAutoencoder],
    cache: ActivationCache,
    hook_point: str,
    report: Progress,
) -> ResultTable | None:
    """A row for each dictionary of this hook point alone; None without one."""
    own = {n: d for n, d in dictionaries.items() if d.config.sites(hook_point) == _at(hook_point)}
    if not own:
        return None
    rows = []
    for done, (name, dictionary) in enumerate(own.items(), start=1):
        n_rows = min(MOST_ROWS, max(2, MOST_ACTIVATIONS // dictionary.config.d_sae))
        held = held_out_rows(cache)
        x = cache[hook_point][held[:: max(1, len(held) // n_rows)][:n_rows]]
        length = shortest(dictionary, x)
        rows.append((name, f"{length.bits:.1f}", f"{length.fvu:.4f}", *_meta(dictionary)))
        report(done, len(own), "dictionaries")
    note = (
        f"bits: entropy per row of the activations, rounded so that FVU rises by at most {LOSS}; "
        "compare at equal FVU; meta explained: variance of the decoder's directions that a "
        f"dictionary of a quarter as many, {K_META} at a time, explains; chance: of random ones"
    )
    return ResultTable(COLUMNS, tuple(rows), note)


def _at(hook_point: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (hook_point,), (hook_point,)


@torch.no_grad()
def shortest(dictionary: SparseAutoencoder, x: torch.Tensor) -> DescriptionLength:
    """The description with the coarsest step, by octaves, that costs at most LOSS of FVU."""
    step = float(dictionary.encode_dense(x).max())
    if step <= 0:
        return description_length(dictionary, x, 1.0)
    finest = description_length(dictionary, x, step * 2.0**-N_STEPS)
    for octave in range(1, N_STEPS):
        found = description_length(dictionary, x, step * 2.0**-octave)
        if found.fvu <= finest.fvu + LOSS:
            return found
    return finest


def _meta(dictionary: SparseAutoencoder) -> tuple[str, str]:
    if dictionary.config.d_sae < BATCH:
        return "-", "-"  # too few directions to learn from
    found = meta_score(dictionary.W_dec, k=K_META)
    return f"{found.explained:.3f}", f"{found.chance:.3f}"

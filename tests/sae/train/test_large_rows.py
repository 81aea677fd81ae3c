"""Rows of 100 times the norm: what every recipe makes of the others."""

import numpy as np
import pytest
import torch

import sae
from activations_cache.importing import import_array
from benchmarks.ground_truth_recipes import others, recipe
from sae.train.config import TrainConfig
from sae.train.fit import train

D_MODEL, N_FEATURES, D_SAE, L0 = 48, 160, 256, 5
BATCH = 512
SEED = 0
RECIPES = [("default", "default"), *others()]


def drawn(n_rows: int, generator: torch.Generator) -> torch.Tensor:
    """Sums of about five of 160 directions."""
    rows = torch.randn(N_FEATURES, D_MODEL, generator=torch.Generator().manual_seed(SEED))
    directions = torch.nn.functional.normalize(rows, dim=1)
    fires = torch.rand(n_rows, N_FEATURES, generator=generator) < L0 / N_FEATURES
    return (fires * (0.5 + torch.rand(n_rows, N_FEATURES, generator=generator))) @ directions


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A cache of such rows, its twin with 3 in 1,000 rows 100 times as large, and held-out rows."""
    generator = torch.Generator().manual_seed(SEED)
    plain, held_out = drawn(60_000, generator), drawn(4_000, generator)
    direction = torch.nn.functional.normalize(torch.randn(D_MODEL, generator=generator), dim=0)
    large = plain.clone()
    hit = torch.rand(len(plain), generator=generator) < 0.003
    large[hit] += 100 * plain.norm(dim=1).median() * direction
    folder, caches = tmp_path_factory.mktemp("worlds"), []
    for name, x in (("plain", plain), ("large", large)):
        np.save(folder / f"{name}.npy", x.numpy())
        caches.append(import_array(folder / f"{name}.npy", folder / name, dtype="float32"))
    return *caches, held_out


@pytest.mark.long
@pytest.mark.parametrize(("file", "name"), RECIPES)
def test_large_rows_change_the_fvu_of_the_others_by_5_percent_at_most(
    worlds, file, name, tmp_path, figure
):
    entry = recipe(file, name, D_SAE, L0, BATCH)
    config = TrainConfig(saes={"x": entry}, batch=BATCH, epochs=4, precision="fp32")
    fvu = []
    for number, cache in enumerate(worlds[:2]):
        dictionary = sae.load(train(cache, config, tmp_path / str(number))["x"])
        fvu.append(float(_fvu(dictionary, worlds[2])))
    figure("A1", f"{file} {name}: FVU {fvu[0]:.4f}, with 0.3 % large rows {fvu[1]:.4f}")
    assert fvu[1] <= 1.05 * fvu[0]


@torch.no_grad()
def _fvu(dictionary, x):
    return (x - dictionary(x)).square().sum() / (x - x.mean(dim=0)).square().sum()

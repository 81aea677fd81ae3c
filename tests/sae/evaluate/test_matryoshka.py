"""Nested prefixes on a planted hierarchy: every prefix reconstructs, and parents come first."""

import pytest
import torch

from sae.architecture import BatchTopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.evaluate.structure import cosines
from sae.metrics import fvu
from sae.train.config import Adam, DictionaryConfig
from sae.train.loss_config import FixedPrefixes
from sae.train.step import TrainStep

PARENTS, CHILDREN, D, BATCH, STEPS = 3, 4, 23, 256, 300


def rows(n: int, seed: int) -> torch.Tensor:
    """Parents at random, and with most of them one of their children: parent + 0.6 child."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, D)
    for parent in range(PARENTS):
        child = PARENTS + parent * CHILDREN + torch.randint(CHILDREN, (n,), generator=generator)
        fires, shown = torch.rand(2, n, 1, generator=generator) < torch.tensor([[[0.3]], [[0.8]]])
        size = 1 + 0.2 * torch.rand(n, 1, generator=generator)
        x += fires * size * (directions()[parent] + 0.6 * shown * directions()[child])
    return x


def directions() -> torch.Tensor:
    drawn = torch.randn(D, D, generator=torch.Generator().manual_seed(9))
    return torch.linalg.qr(drawn).Q[: PARENTS + PARENTS * CHILDREN]


@pytest.fixture(scope="module")
def trained() -> SparseAutoencoder:
    config = DictionaryConfig(
        d_sae=17, activation=BatchTopK(k=2), matryoshka=FixedPrefixes(ends=(PARENTS, 9)),
        optimizer=Adam(lr=1e-2),
    )  # fmt: skip
    autoencoder = SparseAutoencoder(config.architecture(D, 1.0))
    initialise(autoencoder, torch.Generator().manual_seed(1))
    step = TrainStep(autoencoder, config, total_steps=STEPS)
    for seed in range(STEPS):
        step(rows(BATCH, seed))
    return autoencoder.requires_grad_(False)


def test_longer_prefixes_reconstruct_better(trained):
    x = rows(1009, STEPS)
    acts = trained.encode_dense(x)
    results = [fvu(x, trained.decode(acts * (torch.arange(17) < end))) for end in (PARENTS, 9, 17)]
    assert results == sorted(results, reverse=True)
    assert results[0] < 0.35
    assert results[2] < 0.1


def test_parents_stand_in_the_first_prefix(trained):
    cosine = cosines(directions()[:PARENTS], trained.W_dec)
    assert bool((cosine.argmax(dim=1) < PARENTS).all())
    assert bool((cosine[:, :PARENTS].amax(dim=1) > 0.9).all())
    children = cosines(directions()[PARENTS:], trained.W_dec).max(dim=1)
    result = children.indices[children.values > 0.7]
    assert len(result) > len(children.values) // 2
    assert bool((result >= PARENTS).all())

"""First weights that look at rows, with known answers."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from activations_cache.config import TRAINING_SPLITS
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L1, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.hook_points import hook_points_of
from sae.train.initialise import geometric_median, new_autoencoder, refine_
from sae.train.optim_config import DataPoints, Tied

ENTRY = DictionaryConfig(d_sae=23, activation=TopK(k=3))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7, "b.1:out": 5}, n_examples=31, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


def made(cache, entry, seed=0):
    where = hook_points_of({"x": entry}, cache.hook_points)["x"]
    return new_autoencoder(cache, where, entry, seed).requires_grad_(False)


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([[0.0], [1.0], [100.0]], [1.0]),  # in one dimension: the median
        ([[0.0, 0], [2, 0], [0, 2], [2, 2]], [1.0, 1.0]),  # of a square: its middle
        ([[0.0, 0], [0, 0], [0, 0], [9, 1]], [0.0, 0.0]),  # most of them lie on one point
        ([[3.0, 4.0], [3.0, 4.0]], [3.0, 4.0]),  # and so does the first guess
        ([[-1.0, 0], [1, 0], [0, 0], [0, 0], [0, 5e3]], [0.0, 0.0]),  # an outlier hardly counts
    ],
)
def test_the_geometric_median_is_the_known_one(points, median):
    found = geometric_median(torch.tensor(points))
    torch.testing.assert_close(found, torch.tensor(median), atol=2e-3, rtol=0)


def test_the_sum_of_distances_is_least_at_the_median():
    points = torch.randn(101, 5, generator=torch.Generator().manual_seed(0)).exp()
    found = geometric_median(points)
    best = (points - found).norm(dim=1).sum()
    for shift in 0.01 * torch.eye(5):
        for sign in (-1, 1):
            assert (points - found - sign * shift).norm(dim=1).sum() > best


def test_directions_are_those_of_rows_less_the_bias_and_the_encoder_is_their_transpose(cache):
    init = DataPoints(bias="median", n_rows=19, norms=(), whiten=False)
    entry = dataclasses.replace(ENTRY, inputs=("a.1:out",), init=init, decoder_norm=0.5)
    found = made(cache, entry)
    x = cache["a.1:out"][cache.rows(TRAINING_SPLITS)]
    directions = normalize(found.scaled(x) - found.b_dec, dim=1)
    largest = (normalize(found.dec_rows, dim=1) @ directions.T).max(dim=1)
    assert float(largest.values.min()) > 1 - 1e-5
    assert len(largest.indices.unique()) == 23
    torch.testing.assert_close(found.enc_rows, found.dec_rows)
    torch.testing.assert_close(found.dec_rows.norm(dim=1), torch.full((23,), 0.5))
    again, other = made(cache, entry), made(cache, entry, seed=1)
    assert torch.equal(again.dec_rows, found.dec_rows)
    assert not torch.equal(other.dec_rows, found.dec_rows)


def test_each_direction_is_taken_once_and_other_latents_stay_random():
    """Of 19 rows one is the bias, two are not finite, and four have another one's direction."""
    entry = dataclasses.replace(ENTRY, init=DataPoints(norms=(), whiten=False))
    sae = SparseAutoencoder(entry.architecture(7)).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0), mean=torch.ones(7))
    random = sae.dec_rows.clone()
    rows = 1 + torch.randn(19, 7, generator=torch.Generator().manual_seed(1))
    rows[3], rows[5, 1], rows[6] = 1.0, torch.nan, torch.inf
    rows[8] = rows[9] = rows[11] = rows[0]
    rows[18] = 1 + 2 * (rows[17] - 1)
    refine_(sae, entry, lambda n: (rows[:n], rows[:n]))
    kept = [row for row in range(18) if row not in {3, 5, 6, 8, 9, 11}]
    torch.testing.assert_close(sae.dec_rows[:12], normalize(rows[kept] - 1, dim=1))
    assert torch.equal(sae.dec_rows[12:], random[12:])


def test_a_median_is_that_of_the_rows_to_be_looked_at():
    entry = dataclasses.replace(ENTRY, init=DataPoints(bias="median", n_rows=5))
    sae = SparseAutoencoder(entry.architecture(7)).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0))
    rows = torch.randn(23, 7, generator=torch.Generator().manual_seed(1))
    refine_(sae, entry, lambda n: (rows[:n], rows[:n]))
    torch.testing.assert_close(sae.b_dec, geometric_median(rows[:5]))


def test_whitened_directions_undo_what_mixed_the_rows():
    """Rows M z of independent z, M symmetric: the directions are those of z."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30011, 7, generator=generator)
    axes = torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q
    mixed = z @ (axes * torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.9])) @ axes.T
    entry = dataclasses.replace(ENTRY, d_sae=30011, init=DataPoints(norms=()))
    sae = SparseAutoencoder(entry.architecture(7)).requires_grad_(False)
    initialise(sae, generator)
    refine_(sae, entry, lambda n: (mixed[:n], mixed[:n]))
    right = (sae.dec_rows * normalize(z, dim=1)).sum(dim=1)
    assert float(right.mean()) > 0.99
    assert float((normalize(mixed, dim=1) * normalize(z, dim=1)).sum(dim=1).mean()) < 0.95


@pytest.mark.parametrize("n", [0, 1, 2, 5, 19])
def test_few_and_equal_rows_whiten_to_finite_directions(n):
    entry = dataclasses.replace(ENTRY, init=DataPoints(norms=()))
    sae = SparseAutoencoder(entry.architecture(7)).requires_grad_(False)
    initialise(sae, torch.Generator().manual_seed(0))
    rows = torch.randn(n, 7, generator=torch.Generator().manual_seed(1))
    refine_(sae, entry, lambda _: (rows, rows))
    assert bool(sae.dec_rows.isfinite().all())
    torch.testing.assert_close(sae.dec_rows.norm(dim=1), torch.ones(23))


def test_of_a_transcoder_the_decoder_has_the_predicted_rows(cache):
    entry = dataclasses.replace(
        ENTRY,
        inputs=("a.1:out",),
        outputs=("b.1:out",),
        b_in="none",
        init=DataPoints(norms=(), whiten=False),
    )
    found = made(cache, entry)
    rows = cache.rows(TRAINING_SPLITS)
    u = normalize(found.scaled(cache["a.1:out"][rows]), dim=1)
    v = normalize(found.scaled_out(cache["b.1:out"][rows]) - found.b_dec, dim=1)
    places = [
        (normalize(w, dim=1) @ t.T).max(dim=1)
        for w, t in ((found.enc_rows, u), (found.dec_rows, v))
    ]
    assert all(float(place.values.min()) > 1 - 1e-5 for place in places)


def test_of_a_transcoder_each_side_is_whitened_by_its_own_rows():
    entry = dataclasses.replace(ENTRY, b_in="own", init=DataPoints(norms=()))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 7, generator=generator).exp(), torch.randn(23, 5, generator=generator)
    places = {"inputs": ("a.1:out",), "outputs": ("b.1:out",)}
    both = SparseAutoencoder(entry.architecture(7, d_out=5, output_scale=1.0))
    initialise(both, generator)
    refine_(both, dataclasses.replace(entry, **places), lambda _: (x, y))
    for weights, rows in ((both.enc_rows, x), (both.dec_rows, y)):
        alone = SparseAutoencoder(entry.architecture(rows.shape[1]))
        initialise(alone, generator)
        refine_(alone, entry, lambda _, rows=rows: (rows, rows))
        torch.testing.assert_close(normalize(weights, dim=1), alone.dec_rows)


@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
def test_the_norm_of_least_error_is_found(scale):
    """ReLU with 2 d latents +-e_i: at norm n of both it gives n^2 u, and u at n = 1."""
    entry = DictionaryConfig(
        d_sae=14,
        activation=ReLU(),
        l1=L1(),
        unit_norm=False,
        b_in="none",
        init=Tied(norms=(0.3, 1.0, 3.0)),
    )
    sae = SparseAutoencoder(entry.architecture(7))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        rows = scale * torch.cat([torch.eye(7), -torch.eye(7)])
        sae.enc_rows.copy_(rows)
        sae.dec_rows.copy_(rows)
    x = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    refine_(sae, entry, lambda n: (x[:n], x[:n]))
    torch.testing.assert_close(sae.dec_rows.norm(dim=1), torch.ones(14))
    torch.testing.assert_close(sae(x), x)


def test_with_unit_rows_the_encoder_alone_has_the_norm(cache):
    entry = dataclasses.replace(ENTRY, inputs=("a.1:out",), init=Tied(norms=(1e-3, 0.3, 50.0)))
    found = made(cache, entry)
    torch.testing.assert_close(found.enc_rows.norm(dim=1), torch.full((23,), 0.3))


def test_a_recipe_names_it_and_trains_to_the_same_bits_again(cache, tmp_path):
    init = DataPoints(bias="median", norms=(0.1, 0.5))
    saes = {"a": dataclasses.replace(ENTRY, inputs=("a.1:out",), init=init)}
    config = TrainConfig(saes=saes, batch=53, precision="fp32")
    one, two = (train(cache, config, tmp_path / n)["a"] / "sae.safetensors" for n in "ab")
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (lambda: {"init": Tied(norms=(0.0,))}, "norms must be a positive number, got 0.0"),
        (lambda: {"init": Tied(norms=(1.0, 1.0))}, "norms must name each once, got (1.0, 1.0)"),
        (lambda: {"init": DataPoints(n_rows=0)}, "n_rows must be at least 1, got 0"),
        (
            lambda: {"init": Tied(bias="median"), "input_norm": "rms"},
            "init.bias must be 'mean' beside input_norm, got 'median'",
        ),
        (
            lambda: {"init": DataPoints(), "frozen": "decoder"},
            "init.kind must be 'tied' beside frozen: it stays random, got 'data_points'",
        ),
        (
            lambda: {"init": DataPoints(), "init_from": "x"},
            "init must be absent beside init_from, got DataPoints(",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        dataclasses.replace(ENTRY, **fields())
    assert str(refused.value).startswith(message)

import pytest
import torch

from sae.evaluate.reconstruction import firing_statistics, measure_reconstruction, summary
from sae.metrics import Firing, fvu, fvu_uncentred


def test_known_dictionaries_have_known_figures(cache, hook_point, identity, constant):
    rows = cache.rows(("hold",))
    x = cache[hook_point][rows]
    measured = measure_reconstruction(
        {"identity": identity, "mean": constant(x.mean(0)), "zero": constant(torch.zeros(8))},
        cache, hook_point, rows,
    )  # fmt: skip
    measured = {name: of_one.reconstruction for name, of_one in measured.items()}
    assert measured["identity"].fvu == pytest.approx(0, abs=1e-12)
    assert measured["identity"].cosine == pytest.approx(1)
    assert measured["identity"].norm_ratio == pytest.approx(1)
    assert measured["identity"].l0 == 8
    assert measured["mean"].fvu == pytest.approx(1, rel=1e-6)
    assert measured["zero"].fvu_uncentred == pytest.approx(1)
    assert measured["zero"].norm_ratio == 0
    assert measured["zero"].l0 == 0
    assert {m.n_rows for m in measured.values()} == {8 * 12}


def test_the_worst_dimensions_are_named(cache, hook_point, random_dictionary):
    rows = cache.rows(("score",))
    result = measure_reconstruction({"a": random_dictionary}, cache, hook_point, rows)["a"]
    x = cache[hook_point][rows]
    x_hat = random_dictionary(x)
    of_each = {str(i): fvu(x[:, i : i + 1], x_hat[:, i : i + 1]) for i in range(8)}
    worst = result.reconstruction.worst_dimensions
    assert list(worst) == sorted(of_each, key=lambda i: -of_each[i])
    assert worst == pytest.approx(of_each, rel=1e-6)


def test_the_figures_are_those_of_the_metrics(cache, hook_point, random_dictionary):
    rows = cache.rows(("score",))
    measured = measure_reconstruction({"a": random_dictionary}, cache, hook_point, rows)["a"]
    measured = measured.reconstruction
    x = cache[hook_point][rows]
    x_hat = random_dictionary(x)
    assert measured.fvu == pytest.approx(fvu(x, x_hat))
    assert measured.fvu_uncentred == pytest.approx(fvu_uncentred(x, x_hat))
    counts = (random_dictionary.encode_dense(x) != 0).sum(1)
    assert measured.l0 == pytest.approx(float(counts.double().mean()))
    assert measured.l0_quantiles["0.5"] == int(counts.sort().values[(len(counts) + 1) // 2 - 1])
    assert measured.l0_quantiles["1.0"] == int(counts.max())


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_rows_are_read_once_and_chunks_do_not_matter(
    cache, hook_point, random_dictionary, identity, chunk
):
    rows, seen = cache.rows(), []
    both = {"a": random_dictionary, "b": identity}
    measured = measure_reconstruction(
        both, cache, hook_point, rows, rows_per_chunk=chunk,
        progress=lambda done, total, unit: seen.append((done, total, unit)),
    )  # fmt: skip
    assert len(seen) == -(-len(rows) // chunk)
    assert seen[-1] == (len(rows), len(rows), "rows")
    alone = measure_reconstruction({"a": random_dictionary}, cache, hook_point, rows)
    result, expected = measured["a"].reconstruction, alone["a"].reconstruction
    assert result.fvu == pytest.approx(expected.fvu, rel=1e-6)
    assert result.l0_quantiles == expected.l0_quantiles


def test_firing_statistics_are_counts_of_the_dense_activations(
    cache, hook_point, random_dictionary, identity
):
    rows = cache.rows()
    firing = firing_statistics(
        {"a": random_dictionary, "b": identity}, cache, hook_point, rows, rows_per_chunk=11
    )
    measured = measure_reconstruction({"a": random_dictionary}, cache, hook_point, rows)
    assert torch.equal(measured["a"].firing.n_fired, firing["a"].n_fired)
    x = cache[hook_point][rows]
    for name, dictionary in (("a", random_dictionary), ("b", identity)):
        dense = dictionary.encode_dense(x)
        assert torch.equal(firing[name].n_fired, (dense != 0).sum(0))
        torch.testing.assert_close(firing[name].max_activation, dense.amax(0))
        assert firing[name].n_rows == len(rows)


def test_a_dictionary_of_another_width_is_refused(cache, hook_point, random_dictionary):
    narrow = type(random_dictionary)(type(random_dictionary.config)(d_in=5, d_sae=32))
    with pytest.raises(
        ValueError, match=r"dictionary 'narrow' must have d_in = d_out = 8, .* got 5"
    ):
        measure_reconstruction({"narrow": narrow}, cache, hook_point, cache.rows())
    with pytest.raises(ValueError, match="'narrow'"):
        firing_statistics({"narrow": narrow}, cache, hook_point, cache.rows())


def test_the_summary_sorts_densities_into_decades():
    firing = Firing(7)
    firing.n_rows = 1000
    firing.n_fired = torch.tensor([0, 1, 9, 10, 99, 100, 1000])
    result = summary(firing)
    assert result.density_edges == (0.001, 0.01, 0.1, 1.0)
    assert result.density_histogram == (2, 2, 2)
    assert (result.n_dead, result.d_sae) == (1, 7)
    assert result.dead_density_bound == 0.003


@pytest.mark.parametrize("n_rows", [0, 1, 7, 11])
def test_the_summary_counts_every_living_latent_once(n_rows):
    firing = Firing(3)
    firing.n_rows = n_rows
    firing.n_fired = torch.tensor([0, min(1, n_rows), n_rows])
    assert sum(summary(firing).density_histogram) == int((firing.n_fired > 0).sum())

import math

import pytest
import safetensors
import torch

from sae.autoencoder import Latents
from sae.metrics import FVU, Agreement, Firing, L0Histogram, ce_recovered, fvu, fvu_uncentred


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def far_from_zero() -> torch.Tensor:
    """Rows with exactly unit variance per dimension and a mean of squared norm 7.94 d."""
    x = rows(1009, 257)
    x = (x - x.mean(0)) / x.std(0, unbiased=False)
    mean = rows(1, 257, seed=1)
    return x + mean * (7.94 * 257 / mean.square().sum()).sqrt()


@pytest.mark.parametrize(
    ("predict", "explained"),
    [
        pytest.param(lambda x: x.mean(0).expand_as(x), 0.0, id="always the mean"),
        pytest.param(torch.zeros_like, -7.94, id="always zero"),
        pytest.param(lambda x: x, 1.0, id="perfect"),
        pytest.param(lambda x: x + 2, -3.0, id="pure bias"),
        pytest.param(lambda x: 0.5 * x, -1.235, id="half of x"),
        pytest.param(lambda x: x.mean(0) + 0.5 * (x - x.mean(0)), 0.75, id="half of the spread"),
    ],
)
def test_fvu_gives_the_known_answers(far_from_zero, predict, explained):
    assert 1 - fvu(far_from_zero, predict(far_from_zero)) == pytest.approx(explained, abs=1e-9)


def test_fvu_uncentred_is_one_for_zero_and_is_another_figure(far_from_zero):
    assert fvu_uncentred(far_from_zero, torch.zeros_like(far_from_zero)) == pytest.approx(1)
    mean = far_from_zero.mean(0).expand_as(far_from_zero)
    assert fvu_uncentred(far_from_zero, mean) == pytest.approx(1 / 8.94)
    assert fvu_uncentred(far_from_zero, 0.5 * far_from_zero) == pytest.approx(0.25)


@pytest.mark.parametrize("k", [0, 1, 5, 13])
def test_fvu_of_k_principal_components_is_the_share_of_the_tail(k):
    x = rows(503, 13) * torch.arange(1, 14) + 100
    mean = x.mean(0)
    _, sizes, axes = torch.linalg.svd(x - mean, full_matrices=False)
    x_hat = mean + (x - mean) @ axes[:k].T @ axes[:k]
    tail = float(sizes[k:].square().sum() / sizes.square().sum())
    assert fvu(x, x_hat) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 101, 503])
def test_streamed_metrics_do_not_depend_on_the_batch_size(batch):
    x, x_hat = rows(503, 11).float() + 30, rows(503, 11, seed=2).float() + 30
    metric, agreement = FVU(), Agreement()
    for a, b in zip(x.split(batch), x_hat.split(batch), strict=True):
        metric.update(a, b)
        agreement.update(a, b)
    a, b = x.double(), x_hat.double()
    expected = (a - b).square().sum() / (a - a.mean(0)).square().sum()
    assert metric.compute() == pytest.approx(float(expected), rel=1e-9)
    uncentred = (a - b).square().sum() / a.square().sum()
    assert metric.compute_uncentred() == pytest.approx(float(uncentred), rel=1e-9)
    cosine = torch.cosine_similarity(a, b).mean()
    assert agreement.cosine == pytest.approx(float(cosine), rel=1e-9)
    assert agreement.norm_ratio == pytest.approx(float((b.norm(dim=1) / a.norm(dim=1)).mean()))


def test_fvu_keeps_its_digits_where_the_mean_dwarfs_the_spread():
    x = (rows(997, 3) + (2.0**20 + 64)).float()
    metric = FVU()
    for part in x.split(89):
        metric.update(part, part + 0.5)
    exact = x.double()
    expected = 0.25 * x.numel() / (exact - exact.mean(0)).square().sum()
    assert metric.compute() == pytest.approx(float(expected), rel=1e-9)


def test_two_shards_merged_equal_one_pass():
    x, x_hat = rows(211, 5), rows(211, 5, seed=3)
    values = (rows(211, 7, seed=4) > 0.5).double()
    latents = Latents(values.float(), torch.arange(7).expand(211, 7))
    whole = FVU(), Agreement(), L0Histogram(), Firing(7)
    left, right = (
        (FVU(), Agreement(), L0Histogram(), Firing(7)),
        (FVU(), Agreement(), L0Histogram(), Firing(7)),
    )
    for metrics, span in (
        (whole, slice(None)), (left, slice(0, 83)), (right, slice(83, None))
    ):  # fmt: skip
        metrics[0].update(x[span], x_hat[span])
        metrics[1].update(x[span], x_hat[span])
        metrics[2].update(values[span].float())
        metrics[3].update(Latents(latents.values[span], latents.indices[span]))
    left[0].merge(right[0])
    left[1].merge(right[1])
    left[2].merge(right[2])
    left[3].merge(right[3])
    assert left[0].compute() == pytest.approx(whole[0].compute(), rel=1e-12)
    assert left[1].relative_bias == pytest.approx(whole[1].relative_bias, rel=1e-12)
    assert torch.equal(left[2].rows_per_count, whole[2].rows_per_count)
    assert torch.equal(left[3].n_fired, whole[3].n_fired)
    assert torch.equal(left[3].max_activation, whole[3].max_activation)
    assert left[0].n_rows == left[1].n_rows == left[3].n_rows == 211


def test_fvu_of_each_dimension_is_that_of_its_column():
    x, x_hat = rows(101, 5), rows(101, 5, seed=2)
    x[:, 3] = 2.0
    metric = FVU()
    for part in range(0, 101, 17):
        metric.update(x[part : part + 17], x_hat[part : part + 17])
    result = metric.per_dimension()
    for i in (0, 1, 2, 4):
        assert result[i] == pytest.approx(fvu(x[:, i : i + 1], x_hat[:, i : i + 1]), rel=1e-9)
    assert not result[3].isfinite()


@pytest.mark.parametrize(
    ("predict", "of_peers"),
    [
        pytest.param(
            lambda x: x.mean(0).expand_as(x), (0.884, 0.112, 0.888, 0.888, 0.0), id="mean"
        ),
        pytest.param(torch.zeros_like, (-0.036, 1.0, 0.0, -0.001, 0.0), id="zero"),
        pytest.param(lambda x: x, (1.0, 0.0, 1.0, 1.0, 1.0), id="perfect"),
        pytest.param(lambda x: x + 2, (0.536, 0.0, 0.552, 0.552, 1.0), id="bias"),
        pytest.param(lambda x: 0.5 * x, (0.741, 0.25, 0.75, 0.75, 0.75), id="half"),
        pytest.param(
            lambda x: x.mean(0) + 0.5 * (x - x.mean(0)),
            (0.971, 0.028, 0.972, 0.972, 0.75),
            id="half of the spread",
        ),
    ],
)
def test_what_other_projects_call_variance_explained(far_from_zero, predict, of_peers):
    """Their formulas on the rows above: SAELens, MSAE, 1 - MSAE's NMSE, overcomplete, dict. l."""
    x, x_hat = far_from_zero, predict(far_from_zero)
    error, square = (x - x_hat).square().sum(1), x.square()
    saelens = 1 - error.mean() / (square.sum(1).mean() - square.mean().square())
    within = (x - x.mean(1, keepdim=True)).square().sum(1)
    residual = (x - x_hat) - (x - x_hat).mean(1, keepdim=True)
    msae = (residual.square().sum(1) / within).mean()
    nmse = 1 - (error / square.sum(1)).mean()
    overcomplete = 1 - error.sum() / (x - x.mean()).square().sum()
    dictionary_learning = 1 - (x - x_hat).var(0).sum() / x.var(0).sum()
    results = [float(v) for v in (saelens, msae, nmse, overcomplete, dictionary_learning)]
    assert results == pytest.approx(of_peers, abs=0.012)


def test_merging_with_nothing_changes_nothing():
    metric = FVU()
    metric.merge(FVU())
    assert metric.n_rows == 0
    assert math.isnan(metric.compute())
    metric.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[1.0, 2.0], [2.0, 2.0]]))
    metric.merge(FVU())
    metric.update(torch.zeros(0, 2), torch.zeros(0, 2))
    assert metric.compute() == pytest.approx(0.5)


def test_fvu_of_rows_that_do_not_vary_is_nan():
    assert math.isnan(fvu(torch.ones(3, 2), torch.zeros(3, 2)))


def test_agreement_of_a_shrunk_reconstruction():
    agreement = Agreement()
    x = rows(31, 5)
    x[0] = 0
    agreement.update(x, 0.5 * x)
    assert agreement.n_rows == 30
    assert agreement.cosine == pytest.approx(1)
    assert agreement.norm_ratio == pytest.approx(0.5)
    assert agreement.relative_bias == pytest.approx(0.5)


def test_agreement_of_a_zero_reconstruction_is_zero():
    agreement = Agreement()
    agreement.update(rows(7, 5), torch.zeros(7, 5))
    assert agreement.cosine == 0
    assert agreement.norm_ratio == 0


def test_l0_mean_and_quantiles():
    l0 = L0Histogram()
    l0.update(torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    l0.update(torch.tensor([[0.0], [5.0]]))
    assert l0.rows_per_count.tolist() == [1, 2, 1]
    assert l0.mean == 1.0
    assert [l0.quantile(q) for q in (0.0, 0.25, 0.26, 0.75, 0.76, 1.0)] == [0, 0, 1, 1, 2, 2]


def test_activations_below_0_fire_as_well():
    values = torch.tensor([[-1.0, 0.0, 2.0], [-0.0, -3.0, -1e-30]])
    l0, firing = L0Histogram(), Firing(3)
    l0.update(values)
    firing.update(Latents(values, torch.tensor([[0, 1, 2], [0, 1, 2]])))
    assert l0.rows_per_count.tolist() == [0, 0, 2]
    assert firing.n_fired.tolist() == [1, 1, 2]


def test_l0_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match=r"share must lie in 0\.\.1, got 1\.5"):
        L0Histogram().quantile(1.5)
    with pytest.raises(ValueError, match="got 0 rows"):
        L0Histogram().quantile(0.5)
    assert math.isnan(L0Histogram().mean)


def test_firing_ignores_padding_and_knows_the_dead():
    firing = Firing(5)
    firing.update(
        Latents(
            torch.tensor([[0.5, 2.0, 0.0], [0.25, 0.0, 0.0]]),
            torch.tensor([[1, 4, 0], [1, 0, 0]]),
        )
    )
    assert firing.n_rows == 2
    assert firing.n_fired.tolist() == [0, 2, 0, 0, 1]
    assert firing.density.tolist() == [0.0, 1.0, 0.0, 0.0, 0.5]
    assert firing.max_activation.tolist() == [0.0, 0.5, 0.0, 0.0, 2.0]
    assert firing.n_dead == 3
    assert firing.dead_fraction == pytest.approx(0.6)
    assert firing.dead_density_bound == 1.5


@pytest.fixture
def firing() -> Firing:
    firing = Firing(5)
    firing.update(Latents(torch.tensor([[0.5, 2.0], [0.25, 0.0]]), torch.tensor([[1, 4], [3, 0]])))
    return firing


def test_firing_survives_the_disk(firing, tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(b"weights")
    path = firing.save(tmp_path)
    assert path == tmp_path / "stats.safetensors"
    again = Firing.read(tmp_path)
    assert again.n_rows == 2
    assert torch.equal(again.n_fired, firing.n_fired)
    assert torch.equal(again.max_activation, torch.tensor([0, 0.5, 0, 0.25, 2]))
    with safetensors.safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("density"), firing.density)


def test_statistics_of_other_weights_are_refused(firing, tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(b"weights")
    firing.save(tmp_path)
    (tmp_path / "sae.safetensors").write_bytes(b"weights of another run")
    with pytest.raises(
        ValueError, match=r"must be made for the weights of the dictionary .*sae evaluate"
    ):
        Firing.read(tmp_path)


def test_missing_and_damaged_statistics_say_what_to_do(firing, tmp_path):
    (tmp_path / "sae.safetensors").write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"stats\.safetensors must exist.*sae evaluate"):
        Firing.read(tmp_path)
    path = firing.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"must have \d+ bytes, got \d+.*sae evaluate"):
        Firing.read(tmp_path)


@pytest.mark.parametrize(
    ("spliced", "recovered"), [(4.0, 1.0), (9.0, 0.0), (10.0, -0.2), (4.5, 0.9)]
)
def test_ce_recovered(spliced, recovered):
    assert ce_recovered(4.0, spliced, 9.0) == pytest.approx(recovered)


def test_ce_recovered_of_tensors_is_that_of_their_entries():
    spliced, ablated = torch.tensor([4.0, 9.0, 4.5, 4.0]), torch.tensor([9.0, 9.0, 9.0, 4.0])
    result = ce_recovered(torch.full((4,), 4.0), spliced, ablated)
    assert result.tolist() == pytest.approx([1.0, 0.0, 0.9, math.nan], nan_ok=True)


def test_ce_recovered_is_nan_where_the_ablation_changes_nothing():
    assert math.isnan(ce_recovered(4.0, 4.0, 4.0))

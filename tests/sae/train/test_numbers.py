"""Formats of numbers: what has 32 bits, what repeats, what neither overflows nor stops counting."""

import pytest
import torch

from activations_cache.batches import count_batches
from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import TopK
from sae.autoencoder import Latents, SparseAutoencoder, initialise
from sae.metrics import FVU, Agreement, Firing, L0Histogram, fvu
from sae.train.config import Adam, AuxK, DictionaryConfig, TrainConfig
from sae.train.fit import train
from sae.train.step import TrainStep

KINDS = ("topk", "batchtopk", "relu", "jumprelu", "gated")
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_formats(step):
    """What of a step's state has fewer than 32 bits."""
    return {name for name, value in step.state_dict().items() if value.dtype.itemsize < 4}


@every_kind
def test_weights_moments_thresholds_and_counters_have_32_bits(kind, entry, planted, step_of):
    config = entry(kind)
    autoencoder = step_of(config).autoencoder
    step = TrainStep(autoencoder, config, 9, precision="bf16")
    assert step.bf16
    for x in planted(3):
        step(x)
        assert not small_formats(step)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_not_trained(kind, dtype, entry, planted, step_of):
    step = step_of(entry(kind))
    low = SparseAutoencoder(step.form).to(dtype)
    initialise(low, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"must be float32 to be trained, got .*; call \.float\("):
        TrainStep(low, step.config, 9)
    step.autoencoder.to(dtype)
    with pytest.raises(ValueError, match="must be float32 to be trained, got"):
        step(planted(1)[0])


def test_a_checkpoint_of_16_bits_is_refused(entry, step_of):
    step = step_of(entry("topk"))
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in step.state_dict().items()}
    with pytest.raises(ValueError, match="a checkpoint must hold"):
        step.load_state_dict(state)


def assert_trainings_repeat(n, entry, planted, step_of, device):
    """Train each kind `n` times on the same rows, and compare all bits of what is left."""
    data = [x.to(device) for x in planted(6)]
    for kind in KINDS:
        config, first = entry(kind), None
        for _ in range(n):
            step = TrainStep(step_of(config).autoencoder.to(device), config, 60)
            for x in data:
                step(x)
            state = {name: value.clone() for name, value in step.state_dict().items()}
            first = first or state
            assert all(torch.equal(first[name], value) for name, value in state.items())


def test_twenty_trainings_give_the_same_bits(entry, planted, step_of, figure):
    assert_trainings_repeat(20, entry, planted, step_of, "cpu")
    figure("N8", f"CPU: 20 of 20 trainings of {len(KINDS)} kinds have the same bits")


@pytest.mark.gpu
def test_ten_trainings_on_a_gpu_give_the_same_bits(entry, planted, step_of, figure):
    assert_trainings_repeat(10, entry, planted, step_of, "cuda")
    figure("N8", f"CUDA: 10 of 10 trainings of {len(KINDS)} kinds have the same bits")


def test_the_number_of_threads_is_recorded(tmp_path):
    cache = write_synthetic(tmp_path / "cache", synthetic_plan({"a:out": 7}, n_examples=31))
    config = TrainConfig(
        saes={"a": DictionaryConfig(d_sae=23, activation=TopK(k=3))}, batch=53, precision="fp32"
    )
    path = train(cache, config, tmp_path / "run")["a"]
    assert '"threads": 1' in (path / "provenance.json").read_text()


@every_kind
@pytest.mark.parametrize("exponent", [-66, -40, 40, 66])
def test_rows_of_any_size_train_alike(kind, exponent, entry, planted):
    """The model's units are a power of 2: nothing is rounded otherwise, from 1e-20 to 1e20."""
    losses = []
    for scale in (1.0, 2.0**exponent):
        autoencoder = SparseAutoencoder(entry(kind).architecture(13, 0.5 / scale))
        initialise(autoencoder, torch.Generator().manual_seed(0))
        step = TrainStep(autoencoder, entry(kind), 9)
        losses.append([torch.stack(step(x * scale)).tolist() for x in planted(4)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("exponent", [-66, -40, 0, 40, 62])
def test_figures_of_rows_of_any_size_are_those_of_their_scale(exponent, figure):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(211, 61, generator=g) + 3
    x_hat = x + 0.3 * torch.randn(211, 61, generator=g)
    expected, scaled = Agreement(), Agreement()
    expected.update(x, x_hat)
    factor = 2.0**exponent
    scaled.update(x * factor, x_hat * factor)
    assert fvu(x * factor, x_hat * factor) == pytest.approx(fvu(x, x_hat), rel=1e-12)
    for name in ("cosine", "norm_ratio", "relative_bias"):
        assert getattr(scaled, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    figure("N9", f"FVU, cosine, norms at 2^{exponent}: relative error below 1e-12")


def test_sums_of_rows_of_16_bits_do_not_overflow():
    """300 squared, 4,096 times: infinite in float16, though the norm is 19,200."""
    x = torch.full((64, 4096), 300.0, dtype=torch.float16)
    x[::2] = -300.0
    x_hat = x * 0.5
    agreement, spread = Agreement(), FVU()
    agreement.update(x, x_hat)
    spread.update(x, x_hat)
    assert agreement.norm_ratio == pytest.approx(0.5)
    assert spread.compute() == pytest.approx(0.25)
    assert (x * x).sum(dim=1).isinf().all()


@pytest.mark.parametrize("n", [2**24, 2**31, 2**40])
def test_counters_do_not_stop(n, tmp_path, entry, planted, step_of, figure):
    firing, l0, spread = Firing(3), L0Histogram(), FVU()
    values, indices = torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 2]])
    firing.n_rows, firing.n_fired = n, torch.tensor([n, 0, n])
    firing.update(Latents(values, indices))
    assert (firing.n_rows, firing.n_fired.tolist()) == (n + 1, [n + 1, 0, n + 1])
    firing.save(tmp_path, "0" * 64)
    again = Firing.read(tmp_path, "0" * 64)
    assert (again.n_rows, again.n_fired.tolist()) == (n + 1, [n + 1, 0, n + 1])
    l0.update(values)
    l0.rows_per_count[2] = n
    l0.update(values)
    assert l0.rows_per_count.tolist() == [0, 0, n + 1]
    spread.update(values.expand(2, 2), values.expand(2, 2))
    spread.n_rows = n
    spread.update(values, values)
    assert spread.n_rows == n + 1
    assert count_batches(n, batch=3, epochs=3) == n
    step = step_of(entry("topk", auxk=None))
    step.silent_rows[:] = n
    step.n_steps = n
    step(planted(1)[0])
    assert {*step.silent_rows.tolist()} <= {0, n + 101}
    assert n + 101 in step.silent_rows.tolist()
    assert int(step.state_dict()["n_steps"]) == n + 1
    figure("N10", f"rows, firings, L0, steps and silent rows go on at {n:,}")


def test_what_moves_in_16_bits_is_lost_and_in_32_is_not(planted):
    """Why: at a small rate most of Adam's steps are below the spacing of bfloat16."""
    config = DictionaryConfig(
        d_sae=53, activation=TopK(k=3), auxk=AuxK(), optimizer=Adam(lr=1e-5, warmup=0.0)
    )
    autoencoder = SparseAutoencoder(config.architecture(13, 0.5))
    initialise(autoencoder, torch.Generator().manual_seed(0))
    before = autoencoder.enc_rows.detach().clone()
    step = TrainStep(autoencoder, config, 50)
    for x in planted(50):
        step(x)
    fires = step.silent_rows < 50 * 101
    after = autoencoder.enc_rows.detach()
    assert (before != after)[fires].float().mean() > 0.99
    assert (before.bfloat16() != after.bfloat16())[fires].float().mean() < 0.9

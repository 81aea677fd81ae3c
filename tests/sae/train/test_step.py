import dataclasses
import math

import pytest
import torch

from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train import step as step_module
from sae.train.config import L0, L1, Adam, AuxK, DictionaryConfig
from sae.train.loss_config import FixedPrefixes, KAnneal, MultiTopK, PAnneal, RandomPrefixes
from sae.train.optim_config import Muon, ScheduleFree
from sae.train.step import TrainStep, follow_, threshold_rate

D_IN, D_SAE, BATCH, STEPS = 13, 53, 101, 60


def topk(**fields) -> DictionaryConfig:
    return DictionaryConfig(
        d_sae=D_SAE,
        activation=TopK(k=3),
        **{"auxk": AuxK(), "dead_after_tokens": 4 * BATCH, "optimizer": Adam(lr=1e-2), **fields},
    )


def groupmax(**fields) -> DictionaryConfig:
    plain = topk(matryoshka=FixedPrefixes(ends=(5, 17)), **fields)
    return dataclasses.replace(plain, d_sae=54, activation=GroupMax(k=3))


def relu(**fields) -> DictionaryConfig:
    defaults = {
        "l1": L1(coefficient=0.3),
        "unit_norm": False,
        "decoder_norm": 0.1,
        "optimizer": Adam(lr=1e-2),
    }
    return DictionaryConfig(d_sae=D_SAE, activation=ReLU(), **{**defaults, **fields})


def batchtopk(**fields) -> DictionaryConfig:
    return dataclasses.replace(topk(**fields), activation=BatchTopK(k=3))


def jumprelu(**fields) -> DictionaryConfig:
    defaults = {
        "l0": L0(coefficient=3.0, target=3.0, threshold_lr=3e-2),
        "optimizer": Adam(lr=1e-2),
    }
    return DictionaryConfig(
        d_sae=D_SAE,
        activation=JumpReLU(threshold=0.1, bandwidth=0.3),
        **{**defaults, **fields},
    )


def annealed_p(**fields) -> DictionaryConfig:
    penalty = PAnneal(coefficient=0.1, p=0.5, n=5)
    return dataclasses.replace(relu(**fields), l1=None, p_anneal=penalty)


def gated(**fields) -> DictionaryConfig:
    penalty = {"l1": L1(coefficient=0.3), "optimizer": Adam(lr=1e-2)}
    return DictionaryConfig(d_sae=D_SAE, activation=Gated(), **{**penalty, **fields})


def normed(**fields) -> DictionaryConfig:
    """Everything at once that a TopK dictionary may have."""
    more = {
        "b_in": "own",
        "input_norm": "rms",
        "gate_by_decoder_norm": True,
        "unit_norm": False,
        "matryoshka": RandomPrefixes(n=4),
        "multi_topk": MultiTopK(),
        "k_anneal": KAnneal(start=7, until=0.3),
    }
    return topk(**{**more, **fields})


ALL = {
    "annealed_p": annealed_p,
    "gated": gated,
    "groupmax": groupmax,
    "normed": normed,
    "topk": topk,
    "relu": relu,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
}
every_kind = pytest.mark.parametrize("config", [make() for make in ALL.values()], ids=list(ALL))


def step_of(config: DictionaryConfig, seed: int = 0, total: int = STEPS) -> TrainStep:
    made = SparseAutoencoder(config.architecture(D_IN, 0.5))
    initialise(made, torch.Generator().manual_seed(seed), decoder_norm=config.decoder_norm)
    return TrainStep(made, config, total)


def batches(n: int) -> list[torch.Tensor]:
    """Sparse mixes of 29 planted directions, far from the origin."""
    generator = torch.Generator().manual_seed(7)
    atoms = torch.randn(29, D_IN, generator=generator)
    out = []
    for _ in range(n):
        fires = torch.rand(BATCH, 29, generator=generator) < 0.07
        sizes = torch.rand(BATCH, 29, generator=generator) + 0.5
        out.append((fires * sizes) @ atoms + 3.0)
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_kind
def test_training_reconstructs_planted_rows(config):
    step = step_of(config)
    metrics = [step(x) for x in batches(STEPS)]
    assert float(metrics[0].fvu) > 0.6
    assert float(metrics[-1].fvu) < 0.5 * float(metrics[0].fvu)
    assert all(bool(m.finite) for m in metrics)


@every_kind
def test_a_resumed_run_is_bit_equal(config):
    data = batches(20)
    whole = step_of(config, total=20)
    curve = [float(whole(x).loss) for x in data]
    first = step_of(config, total=20)
    for x in data[:9]:
        first(x)
    second = step_of(config, seed=99, total=20)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    assert [float(second(x).loss) for x in data[9:]] == curve[9:]
    assert same(second.state_dict(), whole.state_dict())
    assert second.n_steps == 20


@pytest.mark.parametrize(
    "lost", ["silent_rows", "n_steps", "adam.enc_rows.exp_avg", "adam.dec_rows.exp_avg_sq"]
)
def test_the_resume_test_sees_a_state_that_is_lost(lost):
    config = topk(dead_after_tokens=2 * BATCH)
    data = batches(20)
    whole = step_of(config, total=20)
    for x in data:
        whole(x)
    first = step_of(config, total=20)
    for x in data[:9]:
        first(x)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    state[lost].zero_()
    second = step_of(config, total=20)
    second.load_state_dict(state)
    for x in data[9:]:
        second(x)
    assert not same(second.state_dict(), whole.state_dict())


def test_unit_norm_keeps_rows_at_1_and_l1_lets_them_go():
    with_norm, without = step_of(topk()), step_of(relu())
    for x in batches(5):
        with_norm(x)
        without(x)
    torch.testing.assert_close(with_norm.autoencoder.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert float((without.autoencoder.W_dec.norm(dim=1) - 0.1).abs().max()) > 1e-3


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_frozen_decoder_never_moves_and_the_rest_learns(make):
    step = step_of(make(frozen="decoder"))
    decoder = step.autoencoder.dec_rows.detach().clone()
    encoder = step.autoencoder.enc_rows.detach().clone()
    for x in batches(5):
        step(x)
    assert torch.equal(step.autoencoder.dec_rows, decoder)
    assert not torch.equal(step.autoencoder.enc_rows, encoder)


@pytest.mark.parametrize("optimizer", [Adam(), Muon(), ScheduleFree()], ids=lambda o: o.kind)
def test_no_optimiser_brings_frozen_rows_to_a_norm(optimizer):
    step = step_of(topk(frozen="decoder", optimizer=optimizer))
    with torch.no_grad():
        step.autoencoder.dec_rows.mul_(1.25)
    decoder = step.autoencoder.dec_rows.detach().clone()
    for x in batches(3):
        step(x)
    assert torch.equal(step.autoencoder.dec_rows, decoder)


def test_dead_latents_are_counted_by_rows_and_auxk_moves_their_encoders():
    config = topk(dead_after_tokens=BATCH)
    data = batches(3)
    step = step_of(config)
    with torch.no_grad():
        step.autoencoder.b_enc[17] = -50.0
    before = step.autoencoder.enc_rows[17].detach().clone()
    first = step(data[0])
    assert int(step.silent_rows[17]) == BATCH
    assert float(first.dead) > 0
    assert torch.equal(step.autoencoder.enc_rows[17].detach(), before)
    with torch.no_grad():
        step.autoencoder.b_enc[17] = 0.0
        step.silent_rows[17] = BATCH
    without = step_of(topk(dead_after_tokens=BATCH, auxk=None))
    without.load_state_dict({k: v.clone() for k, v in step.state_dict().items()})
    step(data[1])
    without(data[1])
    moved = (step.autoencoder.W_enc - without.autoencoder.W_enc).abs()
    assert float(moved.max()) > 1e-4


def test_rows_that_are_not_finite_change_nothing_but_the_count():
    step = step_of(topk())
    data = batches(2)
    step(data[0])
    before = {k: v.clone() for k, v in step.state_dict().items()}
    bad = data[1].clone()
    bad[3, 5] = float("nan")
    assert not bool(step(bad).finite)
    after = step.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"n_steps"}


def test_l1_objective_is_the_stated_one():
    config = relu(l1=L1(coefficient=0.7, ramp=0.0), optimizer=Adam(lr=1e-2, clip=None))
    step = step_of(config)
    x = batches(1)[0]
    u = x * 0.5
    made = step.autoencoder
    acts = torch.relu((u - made.b_dec) @ made.enc_rows.T + made.b_enc)
    error = (u - acts @ made.dec_rows - made.b_dec).square().sum(1).mean()
    expected = error + 0.7 * (acts * made.dec_rows.norm(dim=1)).sum(1).mean()
    got = step(x)
    torch.testing.assert_close(got.loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_each_dictionary_is_what_it_would_be_alone():
    data = batches(4)
    alone = step_of(topk())
    for x in data:
        alone(x)
    beside, other = step_of(topk()), step_of(relu(), seed=1)
    for x in data:
        other(x)
        beside(x)
    assert same(alone.state_dict(), beside.state_dict())


def test_wrong_states_and_lengths_are_refused():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        step_of(topk(), total=0)
    step = step_of(topk())
    state = step.state_dict()
    del state["param.b_enc"]
    with pytest.raises(ValueError, match="a checkpoint must hold"):
        step.load_state_dict(state)


def test_bf16_products_train_nearly_as_fp32():
    data = batches(STEPS)
    made = []
    for precision in ("fp32", "bf16"):
        config = topk()
        autoencoder = SparseAutoencoder(config.architecture(D_IN, 0.5))
        initialise(autoencoder, torch.Generator().manual_seed(0))
        step = TrainStep(autoencoder, config, STEPS, precision=precision)
        made.append([float(step(x).fvu) for x in data][-1])
        assert all(p.dtype == torch.float32 for p in autoencoder.parameters())
    assert made[0] != made[1]
    assert abs(made[0] - made[1]) < 0.05


def test_batchtopk_learns_the_threshold_that_gives_its_k():
    step = step_of(batchtopk(), total=150)
    for x in batches(150):
        step(x)
    n_firing = [(step.autoencoder.encode(x).values > 0).sum(dim=1).float() for x in batches(5)]
    assert float(torch.cat(n_firing).mean()) == pytest.approx(3, rel=0.1)
    assert float(step.autoencoder.threshold) > 0


def test_the_threshold_follows_at_the_stated_rate(monkeypatch):
    assert [threshold_rate(n) for n in (1, 20, 60, 1000, 2000, 10**6)] == [
        1, 1, 1 / 3, 1 / 50, 1 / 100, 1 / 100,
    ]  # fmt: skip
    seen, running, original = [], [], step_module.follow_

    def follow_(threshold, found, rate, taken):
        seen.append(float(found))
        original(threshold, found, rate, taken)
        running.append(float(threshold))

    monkeypatch.setattr(step_module, "follow_", follow_)
    step = step_of(batchtopk(), total=60)
    for x in batches(6):
        step(x)
    assert len(set(seen)) == 6
    mean = seen[0]
    for found, now in zip(seen, running, strict=True):
        mean += (found - mean) / 3
        assert now == pytest.approx(mean, rel=1e-5)


def test_a_batch_in_which_nothing_fires_leaves_the_threshold():
    threshold = torch.tensor(2.0)
    follow_(threshold, torch.tensor(math.inf), 0.5)
    assert float(threshold) == 2.0
    follow_(threshold, torch.tensor(4.0), 0.25)
    assert float(threshold) == 2.5


@pytest.mark.parametrize("clip", [0.02, 0.5, 1e6])
def test_gradients_are_clipped_to_the_norm_that_is_stated(clip):
    """Adam's first mean is a tenth of the gradient that it was given."""
    step = step_of(relu(optimizer=Adam(lr=1e-2, clip=clip)))
    before = float(step(batches(1)[0]).grad_norm)
    means = [v for name, v in step.state_dict().items() if name.endswith(".exp_avg")]
    assert len(means) == 4
    norm = 10 * float(torch.cat([mean.flatten() for mean in means]).norm())
    assert norm == pytest.approx(min(clip, before), rel=1e-4)
    assert before > 0.5


def test_a_step_that_is_not_taken_leaves_the_threshold():
    step = step_of(batchtopk())
    step(batches(1)[0])
    before = step.autoencoder.threshold.clone()
    step(batches(2)[1] * float("inf"))
    assert torch.equal(step.autoencoder.threshold, before)


@pytest.mark.parametrize("target", [2.0, 5.0])
def test_jumprelu_finds_the_l0_that_is_asked_for(target):
    config = jumprelu(l0=L0(coefficient=10.0, target=target, threshold_lr=3e-2))
    step = step_of(config, total=200)
    metrics = [step(x) for x in batches(200)]
    found = torch.stack([m.l0 for m in metrics[-20:]]).mean()
    assert float(found) == pytest.approx(target, rel=0.15)
    assert (step.autoencoder.threshold != 0.1).float().mean() > 0.5


def test_thresholds_have_their_own_learning_rate():
    rates = {}
    for own in (1e-4, 1e-1):
        step = step_of(jumprelu(l0=L0(coefficient=3.0, target=3.0, threshold_lr=own)))
        for x in batches(5):
            step(x)
        rates[own] = (step.autoencoder.threshold - 0.1).abs().max()
    assert rates[1e-1] > 100 * rates[1e-4] > 0


SHUT = {
    "jumprelu": ("threshold", 50.0, -1),
    "relu": ("b_enc", -50.0, 1),
    "gated": ("b_gate", -50.0, 1),
}


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-2), Muon(), ScheduleFree()])
@pytest.mark.parametrize("kind", SHUT)
def test_dead_latents_open_by_the_rate_of_what_shuts_them(kind, optimizer):
    name, shut, sense = SHUT[kind]
    optimizer = dataclasses.replace(optimizer, warmup=0.0)
    config = ALL[kind](auxk=AuxK(), dead_after_tokens=2 * BATCH, optimizer=optimizer)
    step, spared = step_of(config), step_of(dataclasses.replace(config, auxk=None))
    for one in (step, spared):
        with torch.no_grad():  # beyond every h: no gradient moves it
            one.autoencoder.get_parameter(name)[:9] = shut
    seen = []
    for x in (*batches(3), batches(1)[0] * float("inf"), *batches(2)):
        living = float((step.silent_rows < 2 * BATCH).float().mean())
        step(x)
        spared(x)
        numbers = step.autoencoder.get_parameter(name)
        groups = step.optimizer.param_groups
        group = next(g for g in groups if any(one is numbers for one in g["params"]))
        assert bool((numbers[:9] == numbers[0]).all())
        seen.append((numbers[0].item(), float(group["lr"]) * living**2))
    (at_1, _), (at_2, _), (at_3, rate_3), (at_4, _), (at_5, rate_5), (at_6, rate_6) = seen
    assert at_1 == at_2 == shut
    assert at_3 == at_4 == pytest.approx(shut + sense * rate_3, abs=1e-5)
    assert at_5 == pytest.approx(at_4 + sense * rate_5, abs=1e-5)
    assert at_6 == pytest.approx(at_5 + sense * rate_6, abs=1e-5)
    assert sense * (step.whole().get_parameter(name)[0].item() - shut) > 0
    assert bool((spared.autoencoder.get_parameter(name)[:9] == shut).all())

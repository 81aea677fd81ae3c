import pytest
import torch

from sae.train.forward.common import Rows
from sae.train.optim_config import Resample
from sae.train.ranks import ALONE
from sae.train.weights import candidates_of, is_resampling_due, resample_

DEAD, BATCH = 17, 101
KINDS = ["topk", "batchtopk", "relu", "jumprelu", "gated"]


def kill(step, *latents: int) -> None:
    """Latents that never fire, as if they had been silent for long."""
    made = step.autoencoder
    for latent in latents:
        with torch.no_grad():
            (made.b_enc if made.b_enc is not None else made.b_gate)[latent] = -1e4
        step.silent_rows[latent] = 10**9


def test_it_is_done_n_times_and_for_the_last_time_at_until():
    settings = Resample(n=4, until=0.5)
    assert [n for n in range(201) if is_resampling_due(settings, n, 200)] == [25, 50, 75, 100]
    assert [n for n in range(4) if is_resampling_due(Resample(n=9, until=1.0), n, 3)] == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_dead_latent_gets_the_direction_of_a_row_and_lives(kind, entry, step_of, planted):
    config = entry(kind, resample=Resample(n=1, until=0.1), dead_after_tokens=10**6, auxk=None)
    step = step_of(config, total=100)
    data = planted(30)
    for x in data[:9]:
        step(x)
    kill(step, DEAD)
    step(data[9])
    made = step.autoencoder
    u = made.scaled(data[9])
    rows = torch.nn.functional.normalize(u - made.b_dec.detach(), dim=1)
    direction = torch.nn.functional.normalize(made.W_dec[DEAD], dim=0)
    assert float((rows @ direction).max()) == pytest.approx(1, abs=1e-5)
    read = torch.nn.functional.normalize(made.W_enc[:, DEAD], dim=0)
    torch.testing.assert_close(read, direction)
    alive = torch.arange(53) != DEAD
    mean = float(made.W_enc.detach().norm(dim=0)[alive].mean())
    assert float(made.W_enc.detach()[:, DEAD].norm()) == pytest.approx(0.2 * mean, rel=1e-5)
    mean = float(made.W_dec.norm(dim=1)[alive].mean())
    assert float(made.W_dec[DEAD].norm()) == pytest.approx(mean, rel=1e-5)
    biases = [made.b_enc] if made.b_enc is not None else [made.b_gate, made.b_mag, made.r_mag]
    assert all(float(bias.detach()[DEAD]) == 0 for bias in biases)
    if kind == "jumprelu":
        assert float(made.threshold.detach()[DEAD]) == pytest.approx(0.1)
    assert int(step.silent_rows[DEAD]) == 0
    for name in ("enc_rows", "dec_rows"):
        state = step.optimizer.state[made.get_parameter(name)]
        assert float(state["exp_avg"][DEAD].abs().max()) == 0
        assert float(state["exp_avg_sq"][DEAD].abs().max()) == 0
        assert float(state["exp_avg"][3].abs().max()) > 0
    for x in data[10:]:
        step(x)
    assert int(step.silent_rows[DEAD]) < 20 * BATCH


def test_nothing_happens_at_other_steps_and_to_living_latents(entry, step_of, planted):
    data = planted(3)
    with_it, without = (
        step_of(entry("topk", resample=resample, auxk=None, dead_after_tokens=10**6))
        for resample in (Resample(n=1, until=0.05), None)
    )
    for x in data[:2]:
        with_it(x)
        without(x)
    kill(with_it, DEAD)
    kill(without, DEAD)
    with_it(data[2])
    without(data[2])
    a, b = with_it.autoencoder, without.autoencoder
    alive = torch.arange(53) != DEAD
    assert torch.equal(a.enc_rows[alive], b.enc_rows[alive])
    assert torch.equal(a.dec_rows[alive], b.dec_rows[alive])
    assert not torch.equal(a.enc_rows[DEAD], b.enc_rows[DEAD])


def test_rows_are_drawn_in_proportion_to_the_squared_loss(entry, step_of):
    step = step_of(entry("topk", auxk=None))
    made = step.autoencoder
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    u = torch.zeros(3, 13)
    u[0, 0], u[1, 1], u[2, 2] = 1.0, 2**0.5, 0.0  # losses 1, 2, 0: shares 1/5, 4/5, 0
    dead = torch.arange(53) == DEAD
    seen = torch.zeros(3)
    for n_steps in range(600):
        resample_(made, dead, candidates_of(made, Rows(u, u), ALONE), Resample(seed=5), n_steps)
        seen[made.W_dec[DEAD].argmax()] += 1
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
            made.dec_rows[:, 12] = 1e-3  # so that the living have a norm
    assert seen[2] == 0
    assert float(seen[1] / seen.sum()) == pytest.approx(0.8, abs=0.05)


def test_more_dead_latents_than_rows_wait_and_no_row_serves_twice(entry, step_of):
    step = step_of(entry("topk", auxk=None))
    u = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(53) >= 20
    latents = resample_(
        step.autoencoder, dead, candidates_of(step.autoencoder, Rows(u, u), ALONE), Resample(), 1
    )
    assert latents.tolist() == list(range(20, 27))
    rows = step.autoencoder.W_dec[latents]
    assert float((rows @ rows.T).fill_diagonal_(0).max()) < 1 - 1e-4


def test_it_repeats_and_goes_on_from_a_checkpoint(entry, step_of, planted, resumed):
    config = entry("topk", resample=Resample(n=3), dead_after_tokens=BATCH, auxk=None)
    data = planted(20)
    whole = step_of(config, total=20)
    curve = [float(whole(x).loss) for x in data]
    other = step_of(
        entry("topk", resample=Resample(n=3, seed=1), dead_after_tokens=BATCH, auxk=None), total=20
    )
    assert [float(other(x).loss) for x in data] != curve
    first = step_of(config, total=20)
    for x in data[:6]:
        first(x)
    second = resumed(step_of(config, seed=3, total=20), first)
    assert [float(second(x).loss) for x in data[6:]] == curve[6:]

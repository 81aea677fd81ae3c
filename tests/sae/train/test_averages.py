import pytest
import torch

from sae.train.optim_config import Adam, Resample


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated"])
def test_the_result_has_the_mean_of_the_weights(kind, entry, step_of, planted):
    step = step_of(entry(kind, ema=0.5))
    made = step.autoencoder
    means = {n: p.detach().double().clone() for n, p in made.named_parameters()}
    for n, x in enumerate(planted(8)):
        step(x)
        decay = min(0.5, (1 + n) / (10 + n))
        means = {n: decay * m + (1 - decay) * made.get_parameter(n) for n, m in means.items()}
    result = step.whole()
    if step.config.unit_norm:
        means["dec_rows"] /= means["dec_rows"].norm(dim=1, keepdim=True)
    for name, mean in means.items():
        found = result.get_parameter(name).double()
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
    assert not torch.equal(result.enc_rows, made.enc_rows)


def test_without_it_the_result_is_what_was_trained(entry, step_of):
    step = step_of(entry("topk"))
    assert step.whole() is step.autoencoder


def test_it_does_not_change_training_and_goes_on_from_a_checkpoint(
    entry, step_of, planted, resumed
):
    data = planted(12)
    plain, whole = step_of(entry("topk")), step_of(entry("topk", ema=0.9))
    for x in data:
        plain(x)
        whole(x)
    assert torch.equal(plain.autoencoder.enc_rows, whole.autoencoder.enc_rows)
    first = step_of(entry("topk", ema=0.9))
    for x in data[:5]:
        first(x)
    second = resumed(step_of(entry("topk", ema=0.9), seed=3), first)
    for x in data[5:]:
        second(x)
    assert torch.equal(second.whole().enc_rows, whole.whole().enc_rows)
    assert torch.equal(second.whole().dec_rows, whole.whole().dec_rows)


def test_it_smooths(entry, step_of, planted):
    """At a rate that never falls the mean is better than any single moment of the weights."""
    adam = Adam(lr=0.2, decay=0.0)
    step = step_of(entry("topk", ema=0.95, optimizer=adam, auxk=None), total=120)
    *data, last = planted(121)
    for x in data:
        step(x)
    error = {
        name: float((made(last).detach() - last).square().sum())
        for name, made in (("mean", step.whole()), ("newest", step.autoencoder))
    }
    assert error["mean"] < 0.8 * error["newest"]


def test_resampled_latents_begin_their_mean_again(entry, step_of, planted):
    resample = Resample(n=1, until=0.1)
    step = step_of(entry("topk", ema=0.99, resample=resample, auxk=None), total=30)
    step.silent_rows[5] = 10**9
    with torch.no_grad():
        step.autoencoder.b_enc[5] = -1e4
    for x in planted(3):
        step(x)
    assert torch.equal(step.whole().enc_rows[5], step.autoencoder.enc_rows[5])
    assert not torch.equal(step.whole().enc_rows[6], step.autoencoder.enc_rows[6])

import pytest
import torch

from sae.train.optim_config import Adam, Muon, Resample, ScheduleFree

OTHERS = {
    "bfloat16": Adam(lr=1e-2, states="bfloat16"),
    "int8": Adam(lr=1e-2, states="int8"),
    "muon": Muon(lr=3e-2),
    "schedule_free": ScheduleFree(lr=4e-2),
}
every_other = pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
KINDS = ["topk", "relu", "jumprelu"]


def error(step, x: torch.Tensor) -> float:
    whole = step.whole()
    left = whole(x).detach() - x
    return float(left.square().sum() / (x - x.mean(dim=0)).square().sum())


@pytest.mark.parametrize("kind", KINDS)
@every_other
def test_it_comes_within_a_quarter_of_adams_error(settings, kind, entry, step_of, planted):
    *data, last = planted(121)
    reached = {}
    for name, optimizer in (("adam", Adam(lr=1e-2)), ("other", settings)):
        step = step_of(entry(kind, optimizer=optimizer), total=120)
        for x in data:
            step(x)
        reached[name] = error(step, last)
    assert reached["other"] < 1.25 * reached["adam"]


@pytest.mark.parametrize("kind", KINDS)
@every_other
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(
    settings, kind, entry, step_of, planted, resumed
):
    data = planted(12)
    config = entry(kind, optimizer=settings, resample=Resample(n=2), dead_after_tokens=202)
    whole = step_of(config, total=12)
    for x in data:
        whole(x)
    first = step_of(config, total=12)
    for x in data[:5]:
        first(x)
    second = resumed(step_of(config, seed=3, total=12), first)
    for x in data[5:]:
        second(x)
    state = second.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in whole.state_dict().items())


@every_other
def test_unit_rows_stay_unit_and_a_frozen_decoder_stays(settings, entry, step_of, planted):
    step = step_of(entry("topk", optimizer=settings))
    frozen = step_of(entry("topk", optimizer=settings, frozen="decoder"))
    before = frozen.autoencoder.W_dec.clone()
    for x in planted(5):
        step(x)
        frozen(x)
    torch.testing.assert_close(step.autoencoder.W_dec.norm(dim=1), torch.ones(53))
    torch.testing.assert_close(step.whole().W_dec.norm(dim=1), torch.ones(53))
    assert torch.equal(frozen.autoencoder.W_dec, before)


@pytest.mark.parametrize(
    ("states", "size"), [("float32", 8.0), ("bfloat16", 4.0), ("int8", 2 + 8 / 13)]
)
def test_bytes_of_the_states(states, size, entry, step_of, planted):
    step = step_of(entry("relu", optimizer=Adam(states=states)))
    step(planted(1)[0])
    state = step.optimizer.state[step.autoencoder.enc_rows]
    found = sum(t.numel() * t.element_size() for t in state.values() if t.dim())
    assert found == pytest.approx(size * 53 * 13)


def test_a_resampled_latent_begins_without_a_past(entry, step_of, planted):
    for settings in OTHERS.values():
        resample = Resample(n=1, until=0.1)
        step = step_of(entry("topk", optimizer=settings, resample=resample, auxk=None), total=30)
        step.silent_rows[5] = 10**9
        with torch.no_grad():
            step.autoencoder.b_enc[5] = -1e4
        for x in planted(3):
            step(x)
        state = step.optimizer.state[step.autoencoder.enc_rows]
        own = step.autoencoder.enc_rows[5]
        for name, value in state.items():
            if name in ("x", "z"):
                assert torch.equal(value[5], own)
            elif value.dim():
                assert float(value[5].float().abs().max()) == 0

"""What is logged beside each step's figures, with known answers, and the same for all ranks."""

import logging
import math

import pytest
import torch

from sae.architecture import JumpReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import L0
from sae.train.diagnostics import Watch
from sae.train.forward.common import Forward, Rows
from sae.train.ranks import ALONE, connect
from sae.train.step import TrainStep
from sae.train.throughput import PATIENCE, Meter


def test_densities_are_shares_of_the_rows_since_the_last_reading(step_of, entry):
    watch = Watch(step_of(entry("topk")).autoencoder, ALONE)
    counts, none = torch.arange(53), torch.zeros(())
    rows = Rows(torch.zeros(101, 13), torch.zeros(101, 13))
    for _ in range(2):
        watch.see(Forward(none, none, counts, none, torch.zeros(101, 13)), rows, 104)
    found = watch.read()
    places = {"q10": 5, "q50": 26, "q90": 47, "q99": 51}  # of 0..52, nearest
    assert {k: found[f"density_{k}"] * 104 for k in places} == pytest.approx(places)
    assert watch.read()["density_q99"] == 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_shrinkage_is_how_much_too_short_what_the_latents_add_is(step_of, entry, planted, scale):
    made = step_of(entry("topk")).autoencoder
    with torch.no_grad():
        made.b_dec.fill_(3.0)
    rows = Rows(*[made.scaled(planted(1)[0])] * 2)
    y = made.b_dec + scale * (rows.v - made.b_dec)
    watch, none = Watch(made, ALONE), torch.zeros(())
    watch.is_due = True
    watch.see(Forward(none, none, torch.zeros(53, dtype=torch.int64), none, y), rows, 101)
    assert watch.read()["shrinkage"] == pytest.approx(scale)
    assert math.isnan(watch.read()["shrinkage"])  # not due


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated", "batchtopk"])
def test_gradient_norms_are_those_before_clipping(kind, step_of, entry, planted):
    optimizer = entry(kind).optimizer
    step = step_of(entry(kind, optimizer=type(optimizer)(lr=1e-2, clip=1e-3)))
    step.watch = Watch(step.autoencoder, ALONE)
    step.watch.is_due = True
    norm = float(step(planted(1)[0]).grad_norm)
    found = step.watch.read()
    parts = [v for name, v in found.items() if name.startswith("grad_norm_")]
    assert len(parts) == len(step.learned)
    assert math.hypot(*parts) == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-2
    assert ("threshold" in found) == (kind == "batchtopk")
    assert ("threshold_q50" in found) == (kind == "jumprelu")


def test_a_watched_step_learns_the_same(step_of, entry, planted):
    plain, watched = step_of(entry("topk")), step_of(entry("topk"))
    watched.watch = Watch(watched.autoencoder, ALONE)
    for x in planted(5):
        plain(x)
        watched.watch.is_due = True
        watched(x)
    ours, theirs = watched.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("shards", [1, 2])
def test_figures_are_those_of_all_ranks(shards, entry, planted, in_ranks):
    """JumpReLU on 101 rows of which one rank has 50, or with half of the latents on each."""
    config = entry("jumprelu", d_sae=54)

    def work(n=shards):
        ranks = connect(n)
        made = SparseAutoencoder(config.architecture(13, 0.5))
        initialise(made, torch.Generator().manual_seed(0))
        step = TrainStep(made, config, 9, ranks=ranks)
        meter = Meter({"a": step}, 101, 3, ranks)
        for n, x in enumerate(planted(3)):
            is_due = meter.before(n + 1, 9)
            with meter.timed("a"):
                metrics = {"a": step(x[ranks.rows.share(101)])}
        assert is_due
        found = meter.read(metrics, 3, 9)
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in found.items() if "a/" in k}

    one = work(1)
    assert {"a/shrinkage", "a/density_q90", "a/threshold_q50", "a/threshold_stuck"} <= one.keys()
    for found in in_ranks(2, work):
        assert found.keys() == one.keys()
        for name in one.keys() - {"a/rows_per_second"}:
            torch.testing.assert_close(found[name], one[name], rtol=2e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("bandwidth", [1e-9, 0.3])
def test_thresholds_that_get_no_gradient_are_told_once(bandwidth, step_of, entry, planted, caplog):
    activation = JumpReLU(threshold=0.1, bandwidth=bandwidth)
    step = step_of(entry("jumprelu", activation=activation))
    meter = Meter({"narrow": step}, 101, 2, ALONE)
    with caplog.at_level(logging.WARNING):
        for n, x in enumerate(planted(2 * PATIENCE + 4)):
            is_due = meter.before(n + 1, 99)
            with meter.timed("narrow"):
                metrics = {"narrow": step(x)}
            if is_due:
                found = meter.read(metrics, n + 1, 99)
    if bandwidth == 0.3:
        assert found["narrow/threshold_stuck"] < 0.5
        assert not caplog.messages
        return
    assert found["narrow/threshold_stuck"] == 1
    [said] = caplog.messages
    assert said == (
        "saes.narrow: 100 % of the thresholds got no gradient over 6 steps, because no "
        "pre-activation came within half of activation.bandwidth=1e-09 of them; raise "
        "activation.bandwidth"
    )


D_SAE = 53
JUMP = {"activation": JumpReLU(threshold=0.1, bandwidth=0.3)}


@pytest.mark.parametrize(
    ("kind", "terms", "said"),
    [
        ("topk", {"activation": TopK(k=D_SAE - 3)}, f"{D_SAE - 3} of activation.k"),
        ("topk", {"activation": TopK(k=3)}, None),
        ("jumprelu", {**JUMP, "l0": L0(target=float(D_SAE), coefficient=0.0)}, "53 of l0.target"),
        ("jumprelu", {**JUMP, "l0": L0(target=1.0, coefficient=0.0)}, "1 of l0.target"),
        ("jumprelu", {**JUMP, "l0": L0(coefficient=0.0)}, None),
    ],
)
def test_an_l0_that_is_not_reached_is_told_once_while_training(
    kind, terms, said, step_of, entry, planted, caplog
):
    step = step_of(entry(kind, **terms))
    meter = Meter({"a": step}, 101, 2, ALONE)
    with caplog.at_level(logging.WARNING):
        for n, x in enumerate(planted(20)):
            is_due = meter.before(n + 1, 20)
            with meter.timed("a"):
                metrics = {"a": step(x)}
            if is_due:
                found = meter.read(metrics, n + 1, 20)
            if said and "k" in said.split(".")[-1] and n == 8:
                assert len(caplog.messages) == 1  # long before the end
    if said is None:
        assert not caplog.messages
        return
    [message] = caplog.messages
    assert said in message
    assert message.startswith("saes.a: L0 is ")
    assert message.endswith("ask for as many latents as rows hold, or train longer")
    assert found["a/l0"] > 0


def test_pace_and_time_left_are_those_of_the_clock(step_of, entry, planted, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sae.train.throughput.time.perf_counter", lambda: now[0])
    step = step_of(entry("topk"))
    meter = Meter({"a": step}, 101, 2, ALONE)
    meter.start()
    for n, x in enumerate(planted(2)):
        with meter.timed():
            now[0] += 1.0
        meter.before(n + 1, 12)
        with meter.timed("a"):
            metrics = {"a": step(x)}
            now[0] += 3.0
    found = meter.read(metrics, 2, 12)
    assert found["rows"] == 202
    assert found["rows_per_second"] == pytest.approx(202 / 8)
    assert found["a/rows_per_second"] == pytest.approx(202 / 6)
    assert found["loader_wait"] == pytest.approx(0.25)
    assert found["eta_seconds"] == pytest.approx(10 * 4)
    assert meter.lines[0].startswith("a: FVU ")

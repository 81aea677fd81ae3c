"""The learning rate `auto`: one formula, in the dictionary's units."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sae.architecture import Gated, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.config import ConfigError, load
from sae.run.config import RunConfig
from sae.train.config import L0, L1, Adam, Control, DictionaryConfig
from sae.train.optim_config import automatic_rate
from sae.train.step import TrainStep

D_IN, D_SAE, BATCH, STEPS = 13, 409, 101, 5
CONFIG = Path(__file__).parents[3] / "configs" / "default.yaml"


def test_it_falls_with_the_root_of_latents_over_rows_and_half_as_steeply_where_they_are_many():
    assert automatic_rate(144, D_IN, 100, STEPS) == pytest.approx(0.01 / 1.2)
    assert automatic_rate(225, D_IN, 100, STEPS) == pytest.approx(0.01 / 1.5)
    assert automatic_rate(3600, D_IN, 100, STEPS) == pytest.approx(0.01 / 3)
    assert automatic_rate(3600, D_IN, 1600, STEPS) == pytest.approx(0.01 / 1.5)
    assert automatic_rate(100, D_IN, 400, STEPS) == 0.01


def test_it_falls_with_the_root_of_the_rows_width_from_a_hundred_on():
    assert automatic_rate(100, 97, 400, STEPS) == 0.01
    assert automatic_rate(100, 400, 400, STEPS) == pytest.approx(0.005)
    assert automatic_rate(225, 400, 100, STEPS) == pytest.approx(0.005 / 1.5)


@pytest.mark.parametrize(
    ("d_sae", "d_in", "factor"), [(225, 97, 1 / 1.5), (225, 400, 1 / 2), (225, 121, 1 / 1.5)]
)
def test_where_the_l0_falls_from_many_the_smaller_factor_counts(d_sae, d_in, factor):
    of = (d_sae, d_in, 100)
    assert automatic_rate(*of, 8000, starts_dense=True) == pytest.approx(0.005 * factor)


@pytest.mark.parametrize("n_steps", [1000, STEPS])
@pytest.mark.parametrize(("kind", "shuts"), [(ReLU(), "b_enc"), (Gated(), "b_gate")])
def test_biases_that_follow_a_falling_l0_are_single_numbers(kind, shuts, n_steps):
    adam = Adam(lr="auto", warmup=0.0)
    config = DictionaryConfig(
        d_sae=909, activation=kind, l1=L1(), unit_norm=False, control=Control(target=3.0),
        optimizer=adam,
    )  # fmt: skip
    made = SparseAutoencoder(config.architecture(401))
    initialise(made, torch.Generator().manual_seed(1))
    step = TrainStep(made, config, n_steps)
    step.set_rates(100)
    names = {id(p): name for name, p in made.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in step.optimizer.param_groups for p in g["params"]}
    rest = automatic_rate(909, 401, 100, n_steps, starts_dense=True)
    assert rates == {
        **dict.fromkeys(("enc_rows", "dec_rows", "b_dec"), rest),
        **dict.fromkeys(kind.facts.parameters, 0.01),
        shuts: pytest.approx(min(2 / n_steps, 0.01) * (401 / 3) ** 0.5),
    }
    fixed = dataclasses.replace(config, optimizer=dataclasses.replace(adam, lr=3e-3))
    step = TrainStep(made, fixed, STEPS)
    step.set_rates(100)
    assert [group["lr"] for group in step.optimizer.param_groups] == [3e-3]


def test_it_falls_with_the_root_of_the_steps_from_two_thousand_on():
    assert automatic_rate(100, 97, 400, 2000) == 0.01
    assert automatic_rate(100, 97, 400, 8000) == pytest.approx(0.005)
    assert automatic_rate(225, 400, 100, 200_000) == pytest.approx(0.0005 / 1.5)


def trained(rows: list[torch.Tensor], lr: float | str, scale: float = 0.5) -> SparseAutoencoder:
    adam = dataclasses.replace(Adam(), lr=lr)
    config = DictionaryConfig(d_sae=D_SAE, activation=TopK(k=3), optimizer=adam)
    made = SparseAutoencoder(config.architecture(D_IN, scale))
    initialise(made, torch.Generator().manual_seed(0))
    step = TrainStep(made, config, STEPS)
    for x in rows:
        step(x)
    return made


def test_a_step_takes_it_from_the_width_and_the_rows(planted):
    rows = planted(STEPS)
    auto = trained(rows, "auto")
    assert torch.equal(
        auto.dec_rows, trained(rows, automatic_rate(D_SAE, D_IN, BATCH, STEPS)).dec_rows
    )
    assert not torch.equal(auto.dec_rows, trained(rows, 0.01).dec_rows)


def test_a_step_takes_it_from_the_width_of_its_rows():
    config = DictionaryConfig(d_sae=17, activation=TopK(k=3), optimizer=Adam(lr="auto"))
    made = SparseAutoencoder(config.architecture(401))
    initialise(made, torch.Generator().manual_seed(1))
    step = TrainStep(made, config, STEPS)
    step(torch.randn(BATCH, 401))
    (group,) = step.optimizer.param_groups
    rate = automatic_rate(17, 401, BATCH, STEPS)
    assert group["lr"] == rate == pytest.approx(0.1 / 401**0.5)


def aimed(n_steps: int, own: float | None = None, target: float | None = 3.0) -> TrainStep:
    config = DictionaryConfig(
        d_sae=909,
        activation=JumpReLU(),
        l0=L0(target=target, threshold_lr=own),
        optimizer=Adam(lr="auto", warmup=0.0),
    )
    made = SparseAutoencoder(config.architecture(401))
    initialise(made, torch.Generator().manual_seed(1))
    return TrainStep(made, config, n_steps)


@pytest.mark.parametrize(
    ("n_steps", "target", "expected"),
    [
        (100_000, 3.0, 0.01 * 0.02**0.5),
        (2500, 3.0, 0.0008 * (401 / 3) ** 0.5),
        (1000, 3.0, 0.002 * (401 / 3) ** 0.5),
        (200, 3.0, 0.01 * (401 / 3) ** 0.5),
        (20, 3.0, 0.01 * (401 / 3) ** 0.5),
        (20, 401.0, 0.01),
        (20, None, 0.01),
    ],
)
def test_in_a_short_run_thresholds_go_twice_as_far_as_what_fires(n_steps, target, expected):
    step = aimed(n_steps, target=target)
    step.set_rates(100)
    _, thresholds = step.optimizer.param_groups
    assert thresholds["lr"] == pytest.approx(expected)
    assert thresholds["params"] == [step.autoencoder.get_parameter("threshold")]


@pytest.mark.parametrize(("own", "expected"), [(None, 0.01 * (401 / 3) ** 0.5), (3e-3, 3e-3)])
def test_thresholds_are_single_numbers_that_no_width_slows_down(own, expected):
    step = aimed(STEPS, own)
    before = step.autoencoder.get_parameter("threshold").detach().clone()
    step(torch.randn(BATCH, 401, generator=torch.Generator().manual_seed(2)))
    rest, thresholds = step.optimizer.param_groups
    assert rest["lr"] == pytest.approx(0.1 / 401**0.5 / 2**0.5 / 1.5)
    assert thresholds["lr"] == expected
    moved = (step.autoencoder.get_parameter("threshold").detach() - before).abs().max()
    assert float(moved) == pytest.approx(expected, rel=1e-3)


def test_the_scale_of_the_rows_does_not_matter(planted):
    rows = planted(STEPS)
    times_8 = trained([8 * x for x in rows], "auto", scale=0.5 / 8)
    assert torch.equal(trained(rows, "auto").dec_rows, times_8.dec_rows)


@pytest.mark.parametrize(
    ("value", "message"),
    [("fast", "lr must be a number or 'auto', got 'fast'"), ("-1", "lr must be a positive number")],
)
def test_other_words_and_numbers_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, CONFIG, [f"train.saes.default.optimizer.lr={value}"])

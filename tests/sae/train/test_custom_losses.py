"""Losses of the user's own: objects given to TrainStep, and classes that a config names."""

from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from sae import losses
from sae.architecture import BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.config import ConfigError, load
from sae.losses import StepTensors
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.cost import estimate
from sae.train.loss_config import L0, L1, AuxK
from sae.train.loss_term import OwnLoss
from sae.train.optim_config import Adam
from sae.train.ranks import Axis, Ranks
from sae.train.step import TrainStep

D_IN, D_SAE, BATCH = 7, 23, 31

KINDS = {
    "topk": DictionaryConfig(d_sae=D_SAE, activation=TopK(k=3), auxk=AuxK()),
    "batchtopk": DictionaryConfig(d_sae=D_SAE, activation=BatchTopK(k=3)),
    "groupmax": DictionaryConfig(d_sae=21, activation=GroupMax(k=3)),
    "relu": DictionaryConfig(d_sae=D_SAE, activation=ReLU(), l1=L1(), unit_norm=False),
    "jumprelu": DictionaryConfig(d_sae=D_SAE, activation=JumpReLU(), l0=L0()),
    "gated": DictionaryConfig(d_sae=D_SAE, activation=Gated(), l1=L1()),
}


@dataclass
class Energy:
    """The mean square of what the dictionary gives, by each of the three things to look at."""

    needs: str = "dense"
    weight: float = 1.0

    def __call__(self, step: StepTensors) -> Float[Tensor, ""]:
        """All three give a number of the same rows."""
        if self.needs == "output":
            return self.weight * (step.y - step.v).square().sum(dim=1).mean()
        acts = step.dense if self.needs == "dense" else step.latents.values
        return self.weight * acts.square().sum(dim=1).mean()


class Rowwise(Energy):
    """Forgets the mean."""

    def __call__(self, step: StepTensors) -> Float[Tensor, " batch"]:
        """One number a row."""
        return step.dense.sum(dim=1)


@pytest.fixture
def module(monkeypatch):
    """An importable module of the user's."""
    made = ModuleType("losses_of_mine")
    made.__dict__.update(Energy=Energy, Rowwise=Rowwise, Plain=lambda: print)
    monkeypatch.setitem(__import__("sys").modules, "losses_of_mine", made)
    return made


def step_of(config: DictionaryConfig, given: tuple[Energy, ...] = ()) -> TrainStep:
    made = SparseAutoencoder(config.architecture(D_IN))
    initialise(made, torch.Generator().manual_seed(3))
    return TrainStep(made, config, 11, losses=given)


def rows() -> Float[Tensor, "batch d_in"]:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("needs", ["output", "latents", "dense"])
def test_its_value_is_added_and_its_gradient_arrives(kind, needs):
    plain, with_loss = step_of(KINDS[kind]), step_of(KINDS[kind], (Energy(needs, 0.5),))
    start, can_encode = with_loss.autoencoder, kind != "batchtopk"
    error = float(losses.squared_error(rows(), start(rows())).detach()) if can_encode else 0
    acts = start.encode_dense(rows()).detach() if can_encode else torch.zeros(1, 1)
    expected = error if needs == "output" else float(acts.square().sum(dim=1).mean())
    before, after = plain(rows()), with_loss(rows())
    added = float(after.loss - before.loss)
    if can_encode:  # batchtopk has no threshold before the first step
        assert added == pytest.approx(0.5 * expected, rel=1e-4)
    assert added > 0
    assert float(after.grad_norm) != float(before.grad_norm)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_names_the_same_loss(kind, module):
    named = OwnLoss(loss="losses_of_mine:Energy", coefficient=0.5, settings={"needs": "latents"})
    by_name = step_of(replace(KINDS[kind], losses=(named,)))
    by_object = step_of(KINDS[kind], (Energy("latents", 0.5),))
    for _ in range(3):
        assert torch.equal(by_name(rows()).loss, by_object(rows()).loss)
    assert torch.equal(by_name.autoencoder.enc_rows, by_object.autoencoder.enc_rows)


def test_it_can_win_over_the_reconstruction():
    config = replace(KINDS["topk"], optimizer=Adam(lr=0.05))
    plain, quiet = step_of(config), step_of(config, (Energy("dense", 50.0),))
    for _ in range(10):
        plain(rows())
        quiet(rows())
    sizes = [
        float(step.autoencoder.encode(rows()).values.detach().norm()) for step in (plain, quiet)
    ]
    assert sizes[1] < sizes[0] / 2


def test_parts_of_a_batch_add_up_to_the_whole():
    parts = step_of(replace(KINDS["topk"], accumulate=4), (Energy("dense"),))
    whole = step_of(KINDS["topk"], (Energy("dense"),))
    assert float(parts(rows()).loss) == pytest.approx(float(whole(rows()).loss), rel=1e-5)
    assert torch.allclose(parts.autoencoder.enc_rows, whole.autoencoder.enc_rows, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"loss": "losses_of_mine:Absent"}, ("losses.loss", "losses_of_mine:Absent", "PYTHONPATH")),
        ({"loss": "absent_module:Energy"}, ("losses.loss", "absent_module", "PYTHONPATH")),
        ({"settings": {"wrong": 1}}, ("losses.settings", "wrong", "Energy")),
        ({"loss": "losses_of_mine:Plain"}, ("losses.loss", "needs")),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(module, change, parts):
    own = OwnLoss(**({"loss": "losses_of_mine:Energy"} | change))
    with pytest.raises(ValueError, match="must") as error:
        step_of(replace(KINDS["topk"], losses=(own,)))
    assert all(part in str(error.value) for part in parts)


def test_the_form_of_the_name_is_checked_before_anything_is_imported(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("saes: {a: {d_sae: 37, losses: [{loss: Energy}]}}\n")
    with pytest.raises(ConfigError, match=r"saes\.a\.losses\.0\.loss must .*module:Class.* got 'E"):
        load(TrainConfig, path)
    path.write_text("saes: {a: {d_sae: 37, losses: [{loss: 'm:Energy', settings: {w: 2}}]}}\n")
    assert load(TrainConfig, path).saes["a"].losses == (
        OwnLoss(loss="m:Energy", settings={"w": 2}),
    )


def test_a_loss_of_each_row_is_refused():
    with pytest.raises(ValueError, match=r"Rowwise must .* got \(31,\); take the mean"):
        step_of(KINDS["topk"], (Rowwise(),))(rows())


def test_split_latents_and_memory_ask_the_loss(module):
    ranks = Ranks(latents=Axis(size=23))
    with pytest.raises(ValueError, match="losses must be absent with latent_shards=23"):
        TrainStep(
            step_of(KINDS["topk"]).autoencoder, KINDS["topk"], 3, ranks=ranks, losses=[Energy()]
        )
    sizes = []
    for needs in ("Light", "Energy"):
        module.Light = type("Light", (Energy,), {"needs": "output"})
        own = OwnLoss(loss=f"losses_of_mine:{needs}")
        sizes.append(estimate(replace(KINDS["topk"], losses=(own,)), D_IN, BATCH).activations)
    assert sizes[1] - sizes[0] == 3 * 4 * BATCH * D_SAE

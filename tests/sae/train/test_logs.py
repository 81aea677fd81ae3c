"""Where a run's figures go: CSV, TensorBoard, a picture; Weights & Biases only where asked for."""

import sys
from importlib.util import find_spec

import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import JumpReLU, TopK
from sae.train import fit
from sae.train.config import L0, AuxK, DictionaryConfig, TrainConfig, Wandb
from sae.train.curves import draw, read_curves
from sae.train.fit import train

SAES = {
    "topk": DictionaryConfig(d_sae=23, activation=TopK(k=3), auxk=AuxK(), dead_after_tokens=303),
    "jump": DictionaryConfig(d_sae=19, activation=JumpReLU(), l0=L0()),
}
CONFIG = TrainConfig(saes=SAES, batch=101, precision="fp32", log_every=5)


@pytest.fixture
def cache(tmp_path):
    return write_synthetic(tmp_path / "cache", synthetic_plan({"a.1:out": 7}, n_examples=119))


def test_a_run_leaves_curves_as_csv_for_tensorboard_and_as_a_picture(cache, tmp_path):
    said = []
    train(cache, CONFIG, tmp_path / "run", progress=lambda done, total, unit: said.append(unit))
    curves = read_curves(tmp_path / "run")
    assert curves.keys() == {"topk", "jump", ""}
    own = {"fvu", "l0", "dead", "shrinkage", "grad_norm", "grad_norm_enc_rows", "density_q50"}
    assert own | {"rows_per_second"} <= curves["topk"].keys()
    assert {"threshold_q10", "threshold_stuck"} <= curves["jump"].keys() - curves["topk"].keys()
    assert curves[""].keys() == {"rows", "rows_per_second", "loader_wait", "eta_seconds"}
    assert curves[""]["eta_seconds"][-1] == 0
    assert curves["topk"]["l0"][-1] == pytest.approx(3, abs=0.2)
    (events,) = (tmp_path / "run" / "logs" / "tensorboard").rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload()
    assert {f"topk/{name}" for name in curves["topk"].keys() - {"rows"}} <= {
        *shown.Tags()["scalars"]
    }
    assert [p.value for p in shown.Scalars("topk/l0")] == pytest.approx(curves["topk"]["l0"])
    assert tuple(101 * p.step for p in shown.Scalars("rows")) == curves[""]["rows"]
    assert draw(tmp_path / "run") == tmp_path / "run" / "curves.png"
    height, width, _ = imread(tmp_path / "run" / "curves.png").shape
    assert (height > 600, width > 1500) == (True, True)
    assert said[0] == "rows"
    head, *lines = said[-1].split("\n")
    assert head == "rows"
    assert [line.split(": FVU ")[0] for line in lines] == ["topk", "jump"]
    assert "wandb" not in sys.modules


def test_what_is_logged_does_not_part_a_run_from_its_checkpoint(cache, tmp_path):
    train(cache, CONFIG, tmp_path / "run")
    fewer = TrainConfig(saes=SAES, batch=101, precision="fp32", log_every=7)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/checkpoints/*/*")}
    train(cache, fewer, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("run/checkpoints/*/*")} == before


def test_nothing_is_drawn_of_a_run_without_curves(tmp_path):
    assert draw(tmp_path) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_installed_is_refused_before_the_first_step(cache, tmp_path):
    config = TrainConfig(saes=SAES, batch=101, wandb=Wandb(project="dictionaries"))
    with pytest.raises(
        ValueError, match=r"train.wandb must be absent where the package wandb"
    ) as e:
        train(cache, config, tmp_path / "run")
    assert str(e.value) == (
        "train.wandb must be absent where the package wandb is not installed, got project "
        "'dictionaries'; pip install 'monosema[wandb]', or remove it"
    )
    assert not (tmp_path / "run").exists()


def test_wandb_is_one_more_logger_where_it_is_chosen(tmp_path, monkeypatch):
    """A resumed run goes on in the same run there: its id is that of what is trained on what."""
    made = []

    class Recorder(DummyLogger):
        def __init__(self, **settings):
            super().__init__()
            made.append(settings)

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Recorder)
    assert len(fit.loggers(tmp_path, 0, None, "0123456789abcdef0123")) == 2
    assert made == []
    wanted = Wandb(project="dictionaries", offline=True)
    assert len(fit.loggers(tmp_path, 7, wanted, "0123456789abcdef0123")) == 3
    [settings] = made
    assert settings["id"] == "0123456789abcdef"
    assert (settings["project"], settings["offline"]) == ("dictionaries", True)
    with pytest.raises(ValueError, match="project must name a project, got ''"):
        Wandb(project="")

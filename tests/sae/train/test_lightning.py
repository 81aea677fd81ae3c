"""SAEModule and ActivationDataModule in a Trainer of one's own: each flag has its effect."""

import csv
import dataclasses
import os
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy

import sae
from activations_cache.testing import synthetic_plan, write_synthetic
from monosema.checks import MonosemaError
from sae.architecture import BatchTopK, TopK
from sae.train import (
    ActivationDataModule,
    Checkpoints,
    DictionaryConfig,
    SAEModule,
    TrainConfig,
    checkpoint,
    train,
)
from sae.train.config import AuxK
from sae.train.data_module import ahead
from sae.train.optim_config import Adam
from sae.train.step import TrainStep

SAES = {
    "topk": DictionaryConfig(d_sae=30, activation=TopK(k=3), auxk=AuxK(), dead_after_tokens=303),
    "batchtopk": DictionaryConfig(d_sae=22, activation=BatchTopK(k=2)),
}
CONFIG = TrainConfig(saes=SAES, batch=101, precision="fp32", log_every=5)
PLAIN = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1,
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # Of the state after the optimiser's step, which is the state that we want in a checkpoint.
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual:UserWarning"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    plan = synthetic_plan({"a.1:out": 7}, n_examples=119, dtype="float32")
    return write_synthetic(tmp_path_factory.mktemp("cache") / "cache", plan)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """What `sae train` makes of it."""
    path = tmp_path_factory.mktemp("whole")
    train(cache, CONFIG, path)
    return {name: sae.load(path / name).state_dict() for name in SAES}


def fit(cache, ckpt_path=None, config=SAES, batch=101, epochs=1, **flags):
    """Train with a Trainer of these flags."""
    trainer, module = lightning.Trainer(**PLAIN | flags), SAEModule(config)
    data = ActivationDataModule(cache, batch=batch, epochs=epochs)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


def weights(module):
    return {name: step.whole().state_dict() for name, step in module.steps.items()}


def require_equal(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        for key, tensor in state.items():
            torch.testing.assert_close(ours[name][key], tensor, rtol=0, atol=tolerance)


def logged_steps(path):
    with (path / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_trainer_gives_what_the_command_gives(cache, whole, tmp_path):
    trainer, module = fit(cache)
    n = cache.n_batches(batch=101)
    assert (trainer.global_step, module.n_steps, trainer.current_epoch) == (n, n, 1)
    require_equal(weights(module), whole)
    paths = module.save(tmp_path)
    require_equal({name: sae.load(path).state_dict() for name, path in paths.items()}, whole)
    assert sae.load(paths["topk"]).provenance["rows"] == n * 101


def test_epochs_and_limits_shorten_and_lengthen_the_schedules(cache):
    n = cache.n_batches(batch=101)
    cases: list[tuple[dict[str, Any], int]] = [
        ({"max_epochs": 3}, 3 * n),
        ({"max_epochs": -1, "max_steps": 2 * n + 1}, 2 * n + 1),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"limit_train_batches": 0.5}, n // 2),
        ({"fast_dev_run": 3}, 3),
    ]
    for flags, total in cases:
        trainer, module = fit(cache, **flags)
        assert (trainer.global_step, module.n_steps, module.total_steps) == (total,) * 3, flags


def test_each_row_comes_once_a_pass_and_passes_have_no_seam(cache, monkeypatch):
    seen, original = [], SAEModule.step

    def step(self, x):
        seen.append(x.clone())
        return original(self, x)

    monkeypatch.setattr(SAEModule, "step", step)
    fit(cache, max_epochs=3, limit_train_batches=4)
    order = cache.batches(batch=101, seed=0, epochs=3)
    assert all(x.equal(batch.x) for x, batch in zip(seen, order, strict=False))
    assert len(seen) == 12


@pytest.mark.parametrize("stop", [3, 8, 9, 11])
def test_a_checkpoint_of_lightning_goes_on_to_the_same_bits(cache, tmp_path, stop):
    """In the middle of a pass, and at its end."""
    n = 8
    flags = {"max_epochs": 3, "limit_train_batches": n}
    _, uninterrupted = fit(cache, **flags)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    fit(cache, enable_checkpointing=True, callbacks=[keep], **flags)
    assert (tmp_path / f"step={stop}.ckpt").exists()
    assert len(list(tmp_path.iterdir())) == 3 * n // stop
    trainer, resumed = fit(cache, tmp_path / f"step={stop}.ckpt", **flags)
    assert (trainer.global_step, trainer.current_epoch) == (3 * n, 3)
    require_equal(weights(resumed), weights(uninterrupted))


class StopAt(lightning.Callback):
    """Interrupt a run as a fault of the machine would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args, **named):
        if trainer.global_step == self.step:
            raise ConnectionError("the machine is gone")


class EveryStep(Checkpoints):
    """Each step's checkpoint is written before the step after it."""

    def on_train_batch_end(self, *args, **named):
        self.saver.settle()


@pytest.mark.parametrize("stop", [3, 8, 11])
def test_checkpoints_of_ours_go_on_in_any_trainer(cache, tmp_path, monkeypatch, stop):
    """Lightning's counters follow: passes end where they would have, its files have the numbers."""
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)
    n, ours = 8, tmp_path / "ours"
    flags = {"max_epochs": 3, "limit_train_batches": n}
    _, uninterrupted = fit(cache, **flags)
    with pytest.raises(ConnectionError):
        fit(cache, callbacks=[EveryStep(ours, seconds=1e-9), StopAt(stop)], **flags)
    assert max(path.name for path in ours.iterdir()) == f"step-{stop:08d}"
    keep = ModelCheckpoint(
        tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{epoch}-{step}"
    )
    trainer, resumed = fit(
        cache, enable_checkpointing=True, callbacks=[Checkpoints(ours), keep], **flags
    )
    assert (trainer.global_step, trainer.current_epoch, resumed.n_steps) == (3 * n, 3, 3 * n)
    expected = {f"epoch={(step - 1) // n}-step={step}.ckpt" for step in (5, 10, 15, 20)}
    later = {name for name in expected if int(name[13:-5]) > stop}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == later
    require_equal(weights(resumed), weights(uninterrupted))


def test_a_checkpoint_of_other_rows_is_refused(cache, tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="last")
    fit(cache, enable_checkpointing=True, callbacks=[keep], max_steps=3)
    with pytest.raises(MonosemaError, match="ckpt_path must be a checkpoint of the same dict"):
        fit(cache, tmp_path / "last.ckpt", batch=53)


def test_a_loss_that_is_good_enough_stops_early(cache):
    stopping = EarlyStopping("topk/fvu", mode="min", stopping_threshold=9.0, verbose=False)
    trainer, module = fit(cache, callbacks=[stopping], max_epochs=5, log_every_n_steps=2)
    n = cache.n_batches(batch=101)
    assert (trainer.global_step, module.total_steps) == (n, 5 * n)
    assert float(trainer.callback_metrics["topk/fvu"]) < 9


def test_the_best_checkpoint_is_chosen_by_a_figure(cache, tmp_path):
    keep = ModelCheckpoint(
        tmp_path, monitor="topk/fvu", every_n_train_steps=4, save_top_k=1, filename="best"
    )
    fit(cache, enable_checkpointing=True, callbacks=[keep], log_every_n_steps=4)
    assert keep.best_model_score is not None
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_figures_go_to_the_trainer_s_loggers_at_its_interval(cache, tmp_path):
    class Recorder(DummyLogger):
        def __init__(self):
            super().__init__()
            self.seen = []

        def log_metrics(self, metrics, step=None):
            if "topk/l0" in metrics:
                self.seen.append(step)

    recorder, own = Recorder(), CSVLogger(tmp_path, name="", version="")
    fit(cache, logger=[recorder, own], log_every_n_steps=7, max_steps=16, max_epochs=-1)
    assert recorder.seen == [7, 14, 16]
    assert logged_steps(tmp_path) == [7, 14, 16]


def test_the_rates_of_all_dictionaries_can_be_watched(cache, tmp_path):
    saes = {
        name: dataclasses.replace(SAES["topk"], optimizer=Adam(lr=lr, warmup=0.0, decay=0.0))
        for name, lr in (("low", 1e-3), ("high", 2e-3))
    }
    own = CSVLogger(tmp_path, name="", version="")
    monitor = LearningRateMonitor("step")
    fit(cache, config=saes, logger=own, callbacks=[monitor], log_every_n_steps=5)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("lr-OneOptimizer/pg1")]
    assert [float(rows[-1][f"lr-OneOptimizer/pg{n}"]) for n in (1, 2)] == [1e-3, 2e-3]


def test_precision_reaches_the_steps(cache, monkeypatch):
    made, original = [], TrainStep.__init__

    def init(self, *args, precision, **named):
        made.append(precision)
        original(self, *args, precision=precision, **named)

    monkeypatch.setattr(TrainStep, "__init__", init)
    results = {}
    for flag in ("32-true", "bf16-mixed"):
        _, module = fit(cache, precision=flag, config=SAES["topk"])
        results[flag] = weights(module)["sae"]
    assert made == ["fp32", "bf16"]
    assert not results["32-true"]["enc_rows"].equal(results["bf16-mixed"]["enc_rows"])
    assert {t.dtype for t in results["bf16-mixed"].values()} == {torch.float32}


def test_bf16_of_a_trainer_is_that_of_the_command(cache, tmp_path):
    config = dataclasses.replace(CONFIG, precision="bf16")
    train(cache, config, tmp_path)
    _, module = fit(cache, precision="bf16-mixed")
    theirs = {name: sae.load(tmp_path / name).state_dict() for name in SAES}
    require_equal(weights(module), theirs)


def test_a_profiler_counts_each_step(cache):
    profiler = SimpleProfiler()
    fit(cache, profiler=profiler, max_steps=6, max_epochs=-1)
    times = profiler.recorded_durations
    assert len(times["run_training_batch"]) == 6
    assert len(times["optimizer_step"]) == 6


REFUSED = [
    ({"gradient_clip_val": 1.0}, "gradient_clip_val must be absent, got 1.0; saes.NAME.optimizer"),
    ({"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1, got 2; saes.NAME.accum"),
    ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "callbacks with GradientAccumulation"),
    ({"precision": "16-true"}, "precision must be one of 32-true, bf16-mixed, got 16-true"),
    ({"precision": "bf16-true"}, "precision must be one of 32-true, bf16-mixed, got bf16-true"),
    ({"precision": 64}, "precision must be one of 32-true, bf16-mixed, got 64-true; weights stay"),
    ({"overfit_batches": 2}, "overfit_batches must be 0, got 2; limit_train_batches shortens"),
    ({"max_epochs": -1}, "max_steps must be given where max_epochs is -1, got neither; schedules"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_a_flag_that_cannot_work_is_one_line_with_our_key(cache, flags, message):
    with pytest.raises(MonosemaError) as refused:
        fit(cache, **flags)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_what_a_train_config_says_otherwise_is_refused(cache):
    for change, message in (
        ({"batch": 53}, r"train\.batch must be that of the data module, 101, got 53"),
        ({"epochs": 2}, r"train\.epochs must be that of the data module, 1, got 2"),
        ({"precision": "bf16"}, r"train\.precision must be the Trainer's, 'fp32', got 'bf16'"),
    ):
        with pytest.raises(MonosemaError, match=message):
            fit(cache, config=dataclasses.replace(CONFIG, **change))
    _, module = fit(cache, config=TrainConfig(saes=SAES), max_steps=2)
    assert module.n_steps == 2


def test_other_data_is_refused(cache):
    trainer = lightning.Trainer(**PLAIN)
    with pytest.raises(MonosemaError, match="SAEModule must be trained on an ActivationDataModule"):
        trainer.fit(SAEModule(SAES), [torch.randn(101, 7)])


def ends(processes):
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return codes, [said.read_text()[-900:] if said.exists() else "" for said in processes.values()]


@pytest.mark.parametrize(("strategy", "shards"), [("ddp", 1), ("ddp", 2), ("mesh", 1)])
def test_processes_of_a_trainer_share_rows_or_latents(
    cache, whole, tmp_path, in_processes, strategy, shards
):
    """The result is that of one process, also where a run goes on in its middle."""

    def work():
        for attempt in ("once", "resumed"):
            flags: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
            ckpt_path = None
            if strategy == "mesh":
                mesh = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
                flags["strategy"] = mesh
                flags["callbacks"] = [Checkpoints(tmp_path / "ours")]
            else:
                keep = ModelCheckpoint(tmp_path, every_n_train_steps=5, filename="last")
                flags |= {"callbacks": [keep], "enable_checkpointing": True}
                ckpt_path = tmp_path / "last.ckpt" if attempt == "resumed" else None
            module = SAEModule(SAES, latent_shards=shards)
            trainer = lightning.Trainer(**PLAIN | flags)
            trainer.fit(module, ActivationDataModule(cache, batch=101), ckpt_path=ckpt_path)
            axes = (module.ranks.rows.size, module.ranks.latents.size)
            assert axes == ((2, 1) if strategy == "ddp" and shards == 1 else (1, 2))
            module.save(tmp_path / attempt)

    if strategy == "mesh":  # what one process began goes on in two
        with pytest.raises(ConnectionError):
            fit(cache, callbacks=[Checkpoints(tmp_path / "ours", seconds=1e-9), StopAt(5)])
    codes, said = ends(in_processes(2, work))
    assert codes == [0, 0], "\n".join(said)
    for attempt in ("once", "resumed"):
        ours = {name: sae.load(tmp_path / attempt / name).state_dict() for name in SAES}
        require_equal(ours, whole, tolerance=1e-5)


def test_lightning_s_checkpoints_are_refused_where_it_cannot_load_them(cache):
    mesh = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(MonosemaError, match="enable_checkpointing must be False beside Model"):
        fit(cache, strategy=mesh, enable_checkpointing=True)


def test_two_batches_are_on_their_way_while_a_step_runs():
    events: list[str] = []

    def read():
        for n in range(4):
            events.append(f"read {n}")
            yield torch.full((1,), n)

    def begin(x):
        events.append(f"copy {int(x)}")
        return x + 10, lambda: events.append(f"wait {int(x)}")

    events.extend(f"step {int(x) - 10}" for x in ahead(read(), begin))
    first = ["read 0", "copy 0", "read 1", "copy 1", "wait 0", "step 0"]
    assert events[: len(first)] == first
    rest = ["read 2", "copy 2", "wait 1", "step 1", "read 3", "copy 3", "wait 2", "step 2"]
    assert events[len(first) :] == [*rest, "wait 3", "step 3"]
    assert list(ahead(iter(()), begin)) == []

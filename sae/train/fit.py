"""Train the dictionaries of a TrainConfig from a cache, with Lightning; resumable at any moment."""

import csv
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

from activations_cache.progress import Progress, silent
from sae.config import digest
from sae.pretrained.own import save
from sae.train import checkpoint
from sae.train.build import new_autoencoder
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.module import SAEModule
from sae.train.reads import reads
from sae.train.sites import Sites, sites
from sae.train.step import TrainStep

if TYPE_CHECKING:
    from activations_cache import ActivationCache

LOGS = "logs"
CHECKPOINTS = "checkpoints"
NOT_OURS = (
    ".*configure_optimizers.*",
    ".*does not have many workers.*",
    ".*Experiment logs directory.*",
    ".*logging interval.*",
    ".*LeafSpec.*",
)
"""Lightning's warnings that do not apply: the TrainSteps hold the optimisers, the cache feeds ready
tensors, a killed run left logs behind; the last one is about Lightning's own code."""


class CacheRows(IterableDataset):
    """The rows of `cache.batches` from a given step on, for a DataLoader without a batch size."""

    def __init__(
        self, cache: "ActivationCache", hook_points: tuple[str, ...], config: TrainConfig
    ) -> None:
        """Take what decides the order of the rows; `start` is set before the loop begins."""
        self.cache, self.hook_points, self.config = cache, hook_points, config
        self.start = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield tensors (batch, width), each row once per epoch, in the order of the seed."""
        config = self.config
        for batch in self.cache.batches(
            self.hook_points,
            batch=config.batch,
            seed=config.seed,
            start=self.start,
            epochs=config.epochs,
        ):
            yield batch.x


def train(
    cache: "ActivationCache",
    config: TrainConfig,
    path: str | Path,
    *,
    progress: Progress = silent,
) -> dict[str, Path]:
    """Train every entry of `config.saes` side by side; returns each dictionary's directory.

    A run that was stopped goes on from its newest checkpoint, bit-equal on the CPU to one that
    was not. The curves lie in `path/logs`, as CSV and for TensorBoard.

    Raises:
        ValueError: If the cache gives less than one batch, or has not the hook points.
        FloatingPointError: If the loss is not finite in three steps in a row.
    """
    path = Path(path)
    total_steps = cache.n_batches(batch=config.batch, epochs=config.epochs)
    if total_steps < 1:
        raise ValueError(f"batch must be at most the cache's rows, got {config.batch}; lower it")
    precision = resolve_precision(config.precision)
    identity = digest({"cache": cache.fingerprint, "train": asdict(config), "precision": precision})
    where = sites(config.saes, cache.hook_points)
    steps = {
        name: _new_step(cache, where[name], entry, config.seed, total_steps, precision)
        for name, entry in config.saes.items()
    }
    read = reads(where, {point: cache.d_model(point) for point in cache.hook_points})
    rows = CacheRows(cache, read.hook_points, config)
    saver = _Saver(path / CHECKPOINTS, identity, config, progress)
    module = SAEModule(steps, total_steps, config.log_every, saver, read.columns)
    found = checkpoint.load_newest(path / CHECKPOINTS, identity)
    if found is not None:
        module.load_full_state(*found)
        rows.start = found[0]
    if module.n_steps < total_steps:
        _fit(module, DataLoader(rows, batch_size=None), path / LOGS, rows.start)
        checkpoint.save(path / CHECKPOINTS, module.n_steps, module.full_state(), identity)
    provenance = {
        "cache": cache.fingerprint,
        "seed": config.seed,
        "rows": total_steps * config.batch,
        "precision": precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return {
        name: save(step.autoencoder, path / name, {**provenance, "recipe": asdict(step.config)})
        for name, step in steps.items()
    }


def resolve_precision(precision: str) -> str:
    """`auto` becomes bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def _new_step(
    cache: "ActivationCache",
    where: Sites,
    entry: DictionaryConfig,
    seed: int,
    total_steps: int,
    precision: str,
) -> TrainStep:
    autoencoder = new_autoencoder(cache, where, entry, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainStep(autoencoder.to(device), entry, total_steps, precision=precision)


class _Saver:
    """Called after each step: reports progress, and saves when it is time."""

    def __init__(self, root: Path, identity: str, config: TrainConfig, progress: Progress) -> None:
        self.root, self.identity, self.config, self.progress = root, identity, config, progress
        self.saved_at = time.monotonic()

    def __call__(self, n_steps: int, module: SAEModule) -> None:
        batch, total = self.config.batch, module.total_steps
        self.progress(n_steps * batch, total * batch, "rows")
        late = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if late and n_steps < total:
            checkpoint.save(self.root, n_steps, module.full_state(), self.identity)
            self.saved_at = time.monotonic()


def _fit(module: SAEModule, loader: DataLoader, logs: Path, start: int) -> None:
    version = f"from-step-{start:08d}"
    loggers: list[Logger] = [
        CSVLogger(logs, name="csv", version=version, flush_logs_every_n_steps=1),
        TensorBoardLogger(logs, name="tensorboard", version=version),
    ]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in NOT_OURS:
            warnings.filterwarnings("ignore", message=text)
        trainer = lightning.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=1,
            max_epochs=1,
            logger=loggers,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, loader)
        except SystemExit as stop:  # Lightning's answer to Ctrl-C, which says nothing
            raise KeyboardInterrupt from stop


def read_curves(path: str | Path) -> dict[str, dict[str, tuple[float, ...]]]:
    """The training curves of each dictionary: {name: {"rows": ..., "fvu": ..., "l0": ...}}."""
    lines = _logged_lines(Path(path) / LOGS / "csv")
    if not lines:
        return {}
    rows = tuple(float(line["rows"]) for line in lines)
    curves: dict[str, dict[str, tuple[float, ...]]] = {}
    for key in lines[0]:
        name, slash, metric = key.partition("/")
        if slash:
            curve = curves.setdefault(name, {"rows": rows})
            curve[metric] = tuple(float(line[key]) for line in lines)
    return curves


def _logged_lines(directory: Path) -> list[dict[str, str]]:
    """One line per logged step; where a resumed run repeated steps, the later lines count."""
    by_step: dict[int, dict[str, str]] = {}
    for file in sorted(directory.glob("from-step-*/metrics.csv")):
        with file.open(newline="") as lines:
            by_step |= {int(line["step"]): line for line in csv.DictReader(lines)}
    return [by_step[step] for step in sorted(by_step)]

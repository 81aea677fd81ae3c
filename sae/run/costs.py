"""What a training will take, before it begins: time, memory and money, from the config.

On this machine's CPU the time comes from one timed product; on a GPU, this one or another, from the
model in `sae.train.cost`.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch

from activations_cache.builder import rank_of_this_process
from activations_cache.manifest import MANIFEST
from activations_cache.models import stream_width
from monosema.checks import require
from sae.browser import ResultTable
from sae.config import config_file, load
from sae.run.config import RunConfig
from sae.run.context import Run, wrong_class
from sae.train.cost import DEVICES, Memory, StepTime, devices_of, estimate, pinned, step_seconds
from sae.train.hook_points import hook_points_of

ENCODER_SHAPE = (1024, 576, 4608)
"""How many products of this shape a training step takes, sparse work and the optimiser included,
is a fact of each activation (`sae.architecture`): measured on two cores for topk and relu, of the
others by their count of products."""


class TimeEstimate(NamedTuple):
    """How long the training of a run will take on this machine."""

    where: str
    """What trains, and how fast it is."""
    flops_per_second: float
    """Of a CPU, measured by one product; of a GPU, by its name."""
    seconds: float
    """Of the training."""


def estimate_time(config: RunConfig) -> TimeEstimate | None:
    """Estimate the time of a run's training on this machine; None on a GPU without figures here.

    On a CPU one product is timed. GPUs of all processes count as many as a launcher started.
    """
    if torch.cuda.is_available():
        name = next((name for name in DEVICES if name in torch.cuda.get_device_name()), None)
        if name is None:
            return None
        n = rank_of_this_process()[1]
        cost = training_cost(config, f"{n}x{name}")
        return TimeEstimate(f"{n} {name}, by a model", DEVICES[name].flops, cost.seconds)
    from sae.train.fit import resolve_precision  # Lightning: seconds, where nothing is trained

    rate = _flops_per_second(resolve_precision(config.train.precision))
    rows = (config.train.n_rows or config.cache.n_rows) * config.train.epochs
    # Without the model its width is unknown; the reference shape's width serves.
    per_latent = 2.0 * ENCODER_SHAPE[1] * rows / rate
    seconds = sum(
        per_latent * entry.d_sae * entry.activation.facts.products
        for entry in config.train.saes.values()
    )
    where = f"{torch.get_num_threads()} threads, {rate / 1e9:,.0f} GFLOP/s"
    return TimeEstimate(where, rate, seconds)


def _flops_per_second(precision: str) -> float:
    n, d, m = ENCODER_SHAPE
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = torch.ones(n, d, dtype=dtype), torch.ones(d, m, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(x, w)
        times.append(time.perf_counter() - began)
    return 2.0 * n * d * m / min(times)


class TrainingCost(NamedTuple):
    """What a training takes on GPUs, by the model in `sae.train.cost`."""

    table: ResultTable
    """A row per dictionary."""
    steps: dict[str, StepTime]
    """Of each dictionary, the parts of a step."""
    memory: dict[str, Memory]
    """Of each dictionary, in one process."""
    n_rows: int
    """Rows that are read."""
    seconds: float
    """Of all steps of all dictionaries."""
    gpu_hours: float
    """Of all GPUs together."""


def training_cost(config: RunConfig | str | Path, gpus: str = "H200") -> TrainingCost:
    """Estimate what a run's training takes on GPUs; nothing is trained, and no weights are read.

    Args:
        config: The run, its YAML file, or a recipe's name.
        gpus: How many of which, such as "8xH200"; the names are those of `sae.train.cost.DEVICES`.

    Raises:
        ValueError: If the GPUs are unknown, or do not divide among `train.latent_shards`.
        ModelError: If there is no cache yet and the model's config does not say its width.
    """
    if isinstance(config, str | Path):
        config = load(RunConfig, config_file(str(config)))
    if not isinstance(config, RunConfig):
        raise wrong_class("config", "be a RunConfig or the path of a YAML file", config, "see docs")
    n_gpus, name = devices_of(gpus)
    device, settings = DEVICES[name], config.train
    shards = settings.latent_shards
    rule = f"be a multiple of train.latent_shards={shards}"
    require(n_gpus % shards == 0, "the number of GPUs", rule, n_gpus)
    precision = "fp32" if settings.precision == "fp32" else "bf16"
    steps, memory = {}, {}
    for entry, (d_in, d_out) in _widths(config).items():
        sae = settings.saes[entry]
        steps[entry] = step_seconds(
            sae, d_in, settings.batch, device,
            d_out=d_out, precision=precision, n_gpus=n_gpus, shards=shards,
        )  # fmt: skip
        memory[entry] = estimate(
            sae, d_in, -(-settings.batch * shards // n_gpus),
            d_out=d_out, precision=precision, shards=shards, of_rows=n_gpus // shards, on_gpu=True,
        )  # fmt: skip
    n_rows = (settings.n_rows or config.cache.n_rows) * settings.epochs
    seconds = sum(step.total for step in steps.values()) * (n_rows // settings.batch)
    table = _cost_table(config, f"{n_gpus} {name}", device.memory, steps, memory)
    return TrainingCost(table, steps, memory, n_rows, seconds, seconds * n_gpus / 3600)


def _cost_table(
    config: RunConfig, gpus: str, room: int, steps: dict[str, StepTime], memory: dict[str, Memory]
) -> ResultTable:
    columns = ("dictionary", "latents", "ms per step", "M rows/s", "longest part", "GiB per GPU")
    rows = tuple(
        (
            name,
            f"{config.train.saes[name].d_sae:,}",
            f"{1e3 * step.total:.2f}",
            f"{config.train.batch / step.total / 1e6:.2f}",
            max(step._fields, key=step._asdict().__getitem__),
            f"{memory[name].total / 2**30:.1f}",
        )
        for name, step in steps.items()
    )
    needed = sum(entry.total for entry in memory.values()) / 2**30
    shards = config.train.latent_shards
    copied = sum(entry.snapshot for entry in memory.values()) * shards
    copied = (pinned(copied) if shards == 1 else copied) / 2**30
    note = (
        f"A model of the step on {gpus}: no GPU has confirmed it, and reading the rows is not in "
        f"it. All dictionaries together need {needed:,.1f} of {room} GiB"
    )
    if needed > room:
        note += ": they do not fit; lower d_sae or batch, use --part, or raise train.latent_shards"
    note += f". A checkpoint is written from a copy of {copied:,.1f} GiB in the host's memory"
    return ResultTable(columns, rows, f"{note}.")


def _widths(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Of each dictionary, the width of what it reads and of what it predicts."""
    run = Run(config)
    if (run.cache_path / MANIFEST).is_file():
        points, width_of = run.cache.hook_points, run.cache.d_model
    else:
        points, of_images = config.cache.hook_points, config.cache.images is not None
        width = stream_width(config.cache.model, of_images=of_images)
        width_of = dict.fromkeys(points, width).__getitem__
    return {
        name: (sum(map(width_of, where.inputs)), sum(map(width_of, where.predicted)))
        for name, where in hook_points_of(config.train.saes, points).items()
    }

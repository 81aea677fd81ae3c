"""How much memory training takes, and how much time on a GPU, from the config alone; no torch here.

Memory: with S the size of the trained weights in fp32, A that of a dense (batch, d_sae) matrix and
X that of the rows: S each for weights and gradients, 2 S for Adam's moments (other optimisers:
`MOMENTS`), S for a mean of the weights, 4 X for rows and reconstructions, and for the activations
what the kind of dictionary holds at once: a piece of fixed size (sparse kinds), one A (ReLU and
JumpReLU in one op), or about 7 A (the kinds that torch differentiates), A being that of one part
where a batch is cut into parts. AuxK works with the dead latents alone, dense: it is counted for
`DEAD` of them. Refining holds a second gradient of the encoder while it adds them up, and the rows
of each round. Peaks measured on a CPU agree within 15 % (tests/sae/train/test_cost.py).

Time: each part of a step at the rate that limits it, a product by the device's arithmetic and
whatever passes over weights, rows or latents by its memory (`StepTime`). No GPU has confirmed it.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from monosema.checks import MonosemaError
from sae.train.config import DictionaryConfig
from sae.train.hook_points import hook_points_of
from sae.train.loss_term import COMPOSED, Sizes
from sae.train.optim_config import Adam

if TYPE_CHECKING:
    import torch

    from activations_cache import ActivationCache
    from sae.train.ranks import Ranks

FLOAT = 4
MIB = 1 << 20
FIXED = 5 * MIB
"""Small tensors and the allocator's own."""
CHUNK = 16 * MIB
"""What `sae_kernels` works on at a time in a CPU's memory."""
GPU_WORKSPACE = 1024 * MIB
"""What it works on at a time on a GPU: `sae_kernels.blocks.WORKSPACE_BYTES`."""
COMPOSED_PLAIN = 4.0
"""Dense matrices that ReLU holds in bf16, where torch differentiates the kernel's own terms."""
DEAD = 0.2
"""Share of the latents for which AuxK's memory is counted; how many die, no config tells."""
SOFT = 2.15
"""Temporaries of turning the rows of a soft decoder back, in units of the weights."""
MOMENTS = {"float32": 2.0, "bfloat16": 1.0, "int8": 0.55, "muon": 1.0, "schedule_free": 3.0}
"""What the optimiser keeps of the weights it trains, in units of their size."""
UPDATES = {"muon": 1.0, "schedule_free": 1.0}
"""What it works with while it updates them, in the same units; torch's Adam is fused."""
CONTAINER = {
    "/sys/fs/cgroup/memory.max": ("memory.current", "inactive_file"),
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file"),
}
"""A container's limit, what of it is in use, and what of that is files that can be read again."""


class Device(NamedTuple):
    """What a GPU reaches: four fifths of its maker's bf16 rate, nine tenths of its memory's."""

    flops: float
    """Floating point operations per second of a bf16 product."""
    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    cache: float
    """Bytes per second from the L2 cache."""
    link: float
    """Bytes per second to other GPUs of the machine, in one direction."""
    memory: int
    """GiB."""


DEVICES = {
    "A100": Device(250e12, 1.8e12, 3.5e12, 300e9, 80),
    "H100": Device(790e12, 3.0e12, 5.5e12, 450e9, 80),
    "H200": Device(790e12, 4.3e12, 5.5e12, 450e9, 141),
    "B200": Device(1800e12, 7.2e12, 9.0e12, 900e9, 180),
}
"""By name; of the SXM forms."""
FP32_PRODUCT = 12.0
"""How many times as long a product in fp32 takes as one in bf16."""
WEIGHT_BYTES = 72
"""Bytes of traffic for each weight of the encoder and its twin in the decoder, all of a step."""
LAUNCHES = {"sparse": 250, "dense": 150, "gated": 160}
"""Kernels of a step, as tests/sae/train/test_device.py counts them for the recipes (150 to 280)."""
LAUNCH_SECONDS = 6e-6
"""What the host takes for each."""
OWN_PRODUCT_WIDTH = 1536
"""Width up to which our product, which selects as it goes, is faster than the library's."""


class Memory(NamedTuple):
    """Bytes in one process at the peak of a training step."""

    weights: int
    """Parameters in fp32."""
    gradients: int
    """Their gradients."""
    moments: int
    """The optimiser's moments."""
    means: int
    """A running mean of the weights, and the directions that a soft decoder stays near to."""
    activations: int
    """Rows, latents and reconstructions."""
    workspace: int
    """What the kernels work in, and copies in bfloat16."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)

    @property
    def snapshot(self) -> int:
        """Of the host besides: the copy from which a checkpoint is written, if it has the room."""
        return self.weights + self.moments + self.means


def estimate(  # noqa: PLR0913
    config: DictionaryConfig,
    d_in: int,
    batch: int,
    *,
    d_out: int | None = None,
    precision: str = "fp32",
    shards: int = 1,
    of_rows: int = 1,
    on_gpu: bool = False,
    dead: float = DEAD,
) -> Memory:
    """Memory of one dictionary in one process.

    Args:
        config: What is trained.
        d_in: Width of the rows that are read.
        batch: Rows per step in one process.
        d_out: Width of the rows that are predicted; d_in when absent.
        precision: "fp32" or "bf16".
        shards: Processes that split the latents.
        of_rows: Processes that split the rows.
        on_gpu: Whether the kernels' larger workspace on a GPU is taken.
        dead: Share of the latents that AuxK has to work with, if there is one.
    """
    d_out = d_in if d_out is None else d_out
    d_sae = -(-config.d_sae // shards)
    weights = FLOAT * d_sae * (d_in + d_out)
    trained = {"none": 1.0, "soft_decoder": 1.0}.get(config.frozen, 0.5) * weights
    dense = FLOAT * -(-batch // config.accumulate) * d_sae
    rows = 2 * FLOAT * batch * (d_in + d_out)
    held, pieces = _held(config, precision)
    sizes = Sizes(weights, dense, FLOAT * batch * d_in, precision, dead)
    terms = sum(term.memory(sizes) for term in (*config.terms.values(), *config.losses))
    passing = int(SOFT * weights) if config.frozen == "soft_decoder" else 0
    passing += int(UPDATES.get(config.optimizer.kind, 0.0) * trained)
    # of the encoder, in half as many bytes; of the decoder as well where the kernels read both
    facts = config.activation.facts
    reads_both = on_gpu and (facts.trains == "sparse" or precision in facts.one_op)
    copies = weights // (2 if reads_both else 4) if precision == "bf16" else 0
    sent = int(trained / 2) if of_rows > 1 and precision == "bf16" else 0
    chunk = GPU_WORKSPACE if on_gpu else CHUNK
    return Memory(
        weights,
        int(trained),
        int(_moments(config) * trained),
        int(trained) * (config.ema is not None) + weights // 2 * (config.frozen == "soft_decoder"),
        rows + int(held * dense + terms),
        int(pieces * min(chunk, dense)) + copies + passing + sent + FIXED,
    )


class StepTime(NamedTuple):
    """Seconds of the parts of a training step on one GPU."""

    products: float
    """Of the encoder, and where latents are dense of the decoder and both gradients as well."""
    selection: float
    """Writing and reading the pre-activations, and choosing among them."""
    rows: float
    """Decoding, the error, and the gradients of what fired."""
    weights: float
    """Writing the gradients and the optimiser's step, with the 16-bit copies."""
    exchange: float
    """Sums over the other GPUs."""
    launches: float
    """What the host takes to launch all kernels, however small they are, while the GPU works."""

    @property
    def total(self) -> float:
        """The longer of what the GPU takes, one part after the other, and what the host takes."""
        return max(sum(self) - self.launches, self.launches)


def step_seconds(  # noqa: PLR0913
    config: DictionaryConfig,
    d_in: int,
    batch: int,
    device: Device,
    *,
    d_out: int | None = None,
    precision: str = "bf16",
    n_gpus: int = 1,
    shards: int = 1,
) -> StepTime:
    """Time of a step of one dictionary, by its arithmetic and its bytes.

    Args:
        config: What is trained.
        d_in: Width of the rows that are read.
        batch: Rows per step of all GPUs together.
        device: What each GPU reaches.
        d_out: Width of the rows that are predicted; d_in when absent.
        precision: "bf16" or "fp32".
        n_gpus: GPUs, one process on each.
        shards: How many of them split the latents; the others split the rows.
    """
    d_out = d_in if d_out is None else d_out
    d_sae, n = -(-config.d_sae // shards), -(-batch * shards // n_gpus)
    number = 2 if precision == "bf16" else FLOAT
    slower = 1.0 if precision == "bf16" else FP32_PRODUCT
    product = 2 * n * d_sae * (d_in + d_out) / 2 / device.flops * slower
    latents = n * d_sae / device.bandwidth
    per_row = config.activation.per_row
    if config.activation.facts.trains == "sparse" and per_row is not None:
        rounds = 1 if config.refine is None else 1 + config.refine.steps
        own = d_in <= OWN_PRODUCT_WIDTH and precision == "bf16"
        products = rounds * product / (0.6 if own else 0.9)
        selection = rounds * (FLOAT / 64 if own else 1.5 * FLOAT) * latents
        entries = n * -(-per_row // shards)
        rows = entries * (d_in + d_out) * number * (rounds / device.bandwidth + 1 / device.cache)
        if config.auxk is not None:  # the dead latents' product there and back, twice
            products += 4 * DEAD * product
    else:
        products, rows = 5 * product / 0.9, 0.0
        selection = (2 * 5 + FLOAT * 3) * latents
    weights = WEIGHT_BYTES * d_sae * (d_in + d_out) / 2 / device.bandwidth
    of_rows, gradients = n_gpus // shards, number * d_sae * (d_in + d_out)
    exchanged = _ring(of_rows) * gradients + _ring(shards) * FLOAT * n * d_out
    launches = LAUNCHES[config.activation.facts.trains] * LAUNCH_SECONDS
    return StepTime(products, selection, rows, weights, exchanged / device.link, launches)


def _ring(n: int) -> float:
    """How many times its size a tensor passes a link when n processes add it up."""
    return 2 * (n - 1) / n


def devices_of(text: str) -> tuple[int, str]:
    """Read "8xH200" or "H200" as a number and the name of a GPU.

    Raises:
        ValueError: If it has another form, or the GPU is not among `DEVICES`.
    """
    found = re.fullmatch(r"(?:(\d+) *x *)?([A-Za-z]\w*)", text.strip())
    name = found[2].upper() if found else ""
    number = int(found[1] or 1) if found else 0
    if number < 1 or name not in DEVICES:
        raise MonosemaError(
            f"the GPUs must be a number and one of {', '.join(DEVICES)}, such as 8xH200, got "
            f"{text!r}"
        )
    return number, name


def _moments(config: DictionaryConfig) -> float:
    """What the optimiser keeps, in units of what is trained."""
    optimizer = config.optimizer
    return MOMENTS[optimizer.states if isinstance(optimizer, Adam) else optimizer.kind]


def _held(config: DictionaryConfig, precision: str) -> tuple[float, float]:
    """Dense matrices held over a step, and pieces of the workspace."""
    facts = config.activation.facts
    if facts.trains == "sparse":
        return 0.0, 1.0
    if not config.in_one_op or config.gate_by_decoder_norm:
        return COMPOSED, 0.0
    if precision not in facts.one_op:
        return COMPOSED if not facts.one_op else COMPOSED_PLAIN, 0.0
    return 1.0, facts.pieces


class Needs(NamedTuple):
    """What decides the memory of the dictionaries of a run in one process."""

    saes: Mapping[str, DictionaryConfig]
    cache: "ActivationCache"
    hook_points: Sequence[str]
    batch: int
    precision: str
    ranks: "Ranks"
    device: "torch.device"

    def total(self, batch: int) -> int:
        """The estimate for so many rows of all processes together."""
        needed = 0
        for name, where in hook_points_of(self.saes, self.hook_points).items():
            needed += estimate(
                self.saes[name],
                sum(map(self.cache.d_model, where.inputs)),
                -(-batch // self.ranks.rows.size),
                d_out=sum(map(self.cache.d_model, where.predicted)),
                precision=self.precision,
                shards=self.ranks.latents.size,
                of_rows=self.ranks.rows.size,
                on_gpu=self.device.type == "cuda",
            ).total
        return needed


def require_room(needs: Needs) -> None:
    """Refuse dictionaries of a cache that this process cannot hold.

    Raises:
        ValueError: If there are any; it names both numbers.
    """
    on_gpu = needs.device.type == "cuda"
    free = _free_on_gpu(needs.device)[0] if on_gpu else free_on_cpu()
    require_memory(needs.total(needs.batch), free, ", ".join(needs.saes), needs.device.type)


ROOM = 0.75
"""Of what ran out of memory so much is said to fit: the estimate was too low by that."""


def out_of_memory(needs: Needs) -> MonosemaError:
    """What to say of a step for which the estimate had been too low, and what would fit."""
    total, batch = _free_on_gpu(needs.device)[1], needs.batch
    estimated = needs.total(batch)
    goal = ROOM * min(estimated, total)
    smaller = (batch >> n for n in range(1, batch.bit_length()))
    fits = next((b for b in smaller if needs.total(b) <= goal), None)
    widest = max(entry.d_sae for entry in needs.saes.values())
    instead = f"train.batch to {fits}" if fits else f"d_sae to {int(ROOM * widest)}"
    return MonosemaError(
        f"train.saes must fit into the memory of {needs.device}, {total / 2**30:,.1f} GiB, got a "
        f"step of {', '.join(needs.saes)} that ran out of it, against an estimate of "
        f"{estimated / 2**30:,.1f} GiB; lower {instead}"
    )


def _free_on_gpu(device: "torch.device") -> tuple[int, int]:
    import torch  # sizes alone need none

    return torch.cuda.mem_get_info(device)


def require_memory(needed: int, free: int, what: str, where: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        ValueError: If more is needed than is free; it names both.
    """
    if needed > free:
        raise MonosemaError(
            f"train.saes must fit into the memory of {where}, {free / 2**30:,.1f} GiB free, "
            f"got {what} that need {needed / 2**30:,.1f} GiB; lower d_sae or batch, or raise "
            "latent_shards"
        )


def pinned(n_bytes: int) -> int:
    """What torch takes for so many bytes of pinned memory: a power of two."""
    return 1 << (n_bytes - 1).bit_length() if n_bytes else 0


def free_on_cpu() -> int:
    """Bytes that this machine, or the container that we are in, can still give."""
    lines = _text(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for name, (used, cached) in CONTAINER.items():
        path = Path(name)
        if (limit := _text(path)).isdigit():
            statistics = dict(map(str.split, _text(path.with_name("memory.stat")).splitlines()))
            in_use = int(_text(path.with_name(used)) or 0) - int(statistics.get(cached, 0))
            found.append(max(int(limit) - in_use, 0))
    return min(found, default=1 << 62)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""

"""How much memory training takes, from the config alone; no torch here.

With S the size of the trained weights in fp32, A that of a dense (batch, d_sae) matrix and X that
of the rows: S each for weights and gradients, 2 S for Adam's moments (other optimisers: `MOMENTS`),
S for a mean of the weights, 4 X for rows and reconstructions, and for the activations what the kind
of dictionary holds at once: a piece of fixed size (sparse kinds), one A (ReLU and JumpReLU in one
op), or about 7 A (the kinds that torch differentiates), A being that of one part where a batch is
cut into parts. AuxK works with the dead latents alone, dense: it is counted for `DEAD` of them.
Refining holds a second gradient of the encoder while it adds them up, and the rows of each round.
Peaks measured on a CPU agree within 15 % (tests/sae/train/test_memory.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from monosema.checks import MonosemaError
from sae.train.config import DictionaryConfig
from sae.train.hook_points import sites
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
MEMORY_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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


def estimate(  # noqa: PLR0913
    config: DictionaryConfig,
    d_in: int,
    batch: int,
    *,
    d_out: int | None = None,
    precision: str = "fp32",
    shards: int = 1,
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
    chunk = GPU_WORKSPACE if on_gpu else CHUNK
    return Memory(
        weights,
        int(trained),
        int(_moments(config) * trained),
        int(trained) * (config.ema is not None) + weights // 2 * (config.frozen == "soft_decoder"),
        rows + int(held * dense + terms),
        int(pieces * min(chunk, dense)) + copies + passing + FIXED,
    )


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


def require_room(
    saes: Mapping[str, DictionaryConfig],
    cache: "ActivationCache",
    hook_points: Sequence[str],
    batch: int,
    precision: str,
    ranks: "Ranks",
    device: "torch.device",
) -> None:
    """Refuse dictionaries of a cache that this process cannot hold.

    Raises:
        ValueError: If there are any; it names both numbers.
    """
    on_gpu, needed = device.type == "cuda", 0
    for name, where in sites(saes, hook_points).items():
        needed += estimate(
            saes[name],
            sum(map(cache.d_model, where.inputs)),
            -(-batch // ranks.rows.size),
            d_out=sum(map(cache.d_model, where.predicted)),
            precision=precision,
            shards=ranks.latents.size,
            on_gpu=on_gpu,
        ).total
    free = _free_on_gpu(device) if on_gpu else free_on_cpu()
    require_memory(needed, free, ", ".join(saes), device.type)


def _free_on_gpu(device: "torch.device") -> int:
    import torch  # sizes alone need none

    return torch.cuda.mem_get_info(device)[0]


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


def free_on_cpu() -> int:
    """Bytes that this machine, or the container that we are in, can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for name in MEMORY_FILES:
        path = Path(name)
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            found.append(int(limit))
    return min(found, default=1 << 62)

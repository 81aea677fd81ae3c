"""How much memory training takes, from the config alone; no torch here.

With S the size of the trained weights in fp32, A that of a dense (batch, d_sae) matrix and X that
of the rows: S each for weights and gradients, 2 S for Adam's moments, 4 X for rows and
reconstructions, and for the activations what the kind of dictionary holds at once: a piece of
fixed size (sparse kinds), one A (ReLU and JumpReLU in one op), or about 7 A (the kinds that torch
differentiates). Peaks measured on a CPU agree within 15 % (tests/sae/train/test_memory.py).
AuxK is not counted: its three (batch, dead) matrices depend on how many latents die.
"""

from pathlib import Path
from typing import NamedTuple

from sae.train.config import DictionaryConfig

FLOAT = 4
MIB = 1 << 20
FIXED = 5 * MIB
"""Small tensors and the allocator's own."""
CHUNK = 16 * MIB
"""What `sae_kernels` works on at a time in a CPU's memory."""
GPU_WORKSPACE = 256 * MIB
"""What it works on at a time on a GPU."""
MEMORY_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Memory(NamedTuple):
    """Bytes in one process at the peak of a training step."""

    weights: int
    """Parameters in fp32."""
    gradients: int
    """Their gradients."""
    moments: int
    """The optimiser's moments."""
    activations: int
    """Rows, latents and reconstructions."""
    workspace: int
    """What the kernels work in, and copies in bfloat16."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def estimate(
    config: DictionaryConfig,
    d_in: int,
    batch: int,
    *,
    d_out: int | None = None,
    precision: str = "fp32",
    shards: int = 1,
    on_gpu: bool = False,
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
    """
    d_out = d_in if d_out is None else d_out
    d_sae = -(-config.d_sae // shards)
    weights = FLOAT * d_sae * (d_in + d_out)
    dense = FLOAT * batch * d_sae
    rows = 2 * FLOAT * batch * (d_in + d_out)
    held, pieces = _held(config, precision)
    copies = weights // 4 if precision == "bf16" else 0  # of the encoder, in half as many bytes
    chunk = GPU_WORKSPACE if on_gpu else CHUNK
    return Memory(
        weights,
        weights if config.frozen == "none" else weights // 2,
        2 * (weights if config.frozen == "none" else weights // 2),
        rows + int(held * dense),
        int(pieces * min(chunk, dense)) + copies + FIXED,
    )


def _held(config: DictionaryConfig, precision: str) -> tuple[float, float]:
    """Dense matrices held over a step, and pieces of the workspace."""
    trains, kind = config.activation.facts.trains, config.activation.kind
    if trains == "sparse":
        return 0.0, 1.0
    others = (config.tanh, config.preact, config.p_anneal, config.matryoshka)
    composed = any(term is not None for term in others) or config.gate_by_decoder_norm
    if trains == "gated" or composed:
        return 7.0, 0.0
    if precision == "bf16" and kind == "relu":
        return 4.0, 0.0
    return 1.0, 4.0 if kind == "jumprelu" else 1.0


def require_memory(needed: int, free: int, what: str, where: str) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        ValueError: If more is needed than is free; it names both.
    """
    if needed > free:
        raise ValueError(
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

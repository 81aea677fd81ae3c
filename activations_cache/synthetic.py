"""A cache without a language model: rows are a seeded linear map of token and position.

For tests, benchmarks and trying things out; everything but the model is as in a real cache.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from activations_cache.config import SPLITS, Compression, Dtype
from activations_cache.manifest import Plan
from activations_cache.reader import ActivationCache, open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.writer import CacheWriter

_LABELS = ("noun.animal", "noun.food", "verb.motion")


def synthetic_plan(  # noqa: PLR0913
    hook_points: Mapping[str, int],
    *,
    n_examples: int,
    context: int = 17,
    rows_per_shard: int = 61,
    dtype: Dtype = "bfloat16",
    compression: Compression = "none",
    n_labels: int = 3,
    seed: int = 0,
) -> Plan:
    """Describe a synthetic cache; one position of each example is skipped."""
    return Plan(
        made_from={"model": "linear", "seed": seed},
        hook_points=dict(hook_points),
        dtype=dtype,
        compression=compression,
        context=context,
        skip_positions=1,
        rows_per_shard=rows_per_shard,
        n_examples=n_examples,
        source_names=("prose", "glosses"),
        label_names=_LABELS[:n_labels],
    )


class LinearModel:
    """The seeded linear map, and the examples that it reads.

    Args:
        plan: What `synthetic_plan` gave.
        vocab: Number of different tokens.
    """

    def __init__(self, plan: Plan, *, vocab: int = 97) -> None:
        made = torch.Generator().manual_seed(int(plan.made_from["seed"]))
        n, shape = plan.n_examples, (plan.n_examples, plan.context)
        n_labels = len(plan.label_names)
        self.plan = plan
        self.examples = Examples(
            tokens=torch.randint(vocab, shape, generator=made),
            split=torch.arange(n) % 10 // 4 % len(SPLITS),
            source=torch.arange(n) % 2,
            source_names=plan.source_names,
            label=torch.randint(-1, n_labels, shape, generator=made) if n_labels else None,
            label_names=plan.label_names,
        )
        self._of_token = {
            name: torch.randn(vocab, d_model, generator=made) * 3 + 1
            for name, d_model in plan.hook_points.items()
        }
        self._of_position = {
            name: torch.randn(plan.context, d_model, generator=made)
            for name, d_model in plan.hook_points.items()
        }

    def __call__(self, numbers: range) -> dict[str, Float[Tensor, "example pos _"]]:
        """Return the activations of some examples by hook point."""
        tokens = self.examples.tokens[numbers.start : numbers.stop]
        return {
            name: table[tokens] + self._of_position[name] for name, table in self._of_token.items()
        }

    def shard(self, shard: int, *, examples_per_forward: int = 2) -> ShardBuffer:
        """Return a shard, filled."""
        buffer = ShardBuffer(self.plan, shard, self.examples)
        covered = self.plan.examples_of(shard)
        for start in covered[::examples_per_forward]:
            numbers = range(start, min(start + examples_per_forward, covered.stop))
            buffer.add(numbers, self(numbers))
        return buffer


def write_synthetic(path: Path, plan: Plan, *, rank: int = 0, n_ranks: int = 1) -> ActivationCache:
    """Write, or go on writing, a synthetic cache and open it."""
    model = LinearModel(plan)
    with CacheWriter(path, plan, rank=rank) as writer:
        for shard in writer.claims(n_ranks):
            writer.commit(model.shard(shard))
        writer.finish({"device": "cpu"})
    return open_cache(path)

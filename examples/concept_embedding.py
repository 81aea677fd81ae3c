"""A concept embedding head beside a concept bottleneck, on two toys of arXiv 2209.09056.

The answer (dot: whether two vectors have a positive product; trigonometry: whether three numbers
sum to more than 1) is no function of the concepts, which are signs. A bottleneck cannot tell it
even from the true concepts; embeddings carry what the concepts leave out. For a dictionary and its
model `sae concepts DICT --bottleneck records.jsonl` fits both on the stream and on the latents.
"""

# %%
import numpy as np

from sae.evaluate.concepts import ConceptBottleneck, ConceptEmbedding, corrected

generator = np.random.default_rng(0)


def dot(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs v + w and v - w, concepts of v and of w alone, and the sign of their product."""
    v, w = generator.normal(size=(2, n, 2)) * 2
    concepts = np.stack([v.sum(1) > 0, w.sum(1) < 0], 1)
    return np.concatenate([v + w, v - w], 1), concepts, ((v * w).sum(1) > 0).astype(int)


def trigonometry(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Waves of three numbers and their square sum, the signs, and whether they sum to above 1."""
    h = generator.normal(size=(n, 3)) * 2
    x = np.concatenate([np.sin(h) + h, np.cos(h) + h, (h**2).sum(1, keepdims=True)], 1)
    return x, h > 0, (h.sum(1) > 1).astype(int)


# %%
for toy in (dot, trigonometry):
    train, test = toy(4000), toy(2000)
    for name, model in (
        ("bottleneck", ConceptBottleneck(k=7, head="tree")),
        ("embedding", ConceptEmbedding()),
    ):
        concepts, told, true, others = corrected(model.fit(*train), *test).ends
        print(
            f"{toy.__name__}, {name}: {concepts:.2f} of the concepts and {told:.2f} of the answers "
            f"recovered, {true:.2f} with true concepts, {others:.2f} with those of others"
        )

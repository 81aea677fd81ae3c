"""A hyperdimensional probe: what a model's stream holds, read as one vector of bound pairs.

    python examples/hyperdimensional_probe.py runs/demo/cache

Concepts are random vectors of +1 and -1. A role is bound to its filler by their product, which
undoes itself; several pairs are bundled by their sum. A small net learns from the rows of a cache
to the bundle, and questions ("which token stood here, which before it?") are answered by unbinding
and looking in the codebook (Bronzini et al. 2025). Unlike a sparse autoencoder it is supervised: it
finds the roles that it was taught and no others. Without an argument a tiny random model stands in.
"""

# %%
import torch

import activations_cache
import sae
import stand_ins
from activations_cache import ModelConfig, TextConfig, TextSource
from sae.evaluate.hyperdimensional import Codebook, ProbeFit, hyperdimensional_probe, text_roles

# %% The algebra, before anything is learned.
generator = torch.Generator().manual_seed(0)
for n in (3, 30, 300):
    book = Codebook.draw([12] * n, 1024, generator)
    said = torch.randint(12, (100, n), generator=generator)
    recall = float((book.unbind(book.bundle(said)) == said).float().mean())
    print(f"{n} pairs in 1024 dimensions: {recall:.0%} recalled")

# %% The stream of a model at several layers.
given = stand_ins.arguments()
if given:
    cache = activations_cache.open(given[0])
else:
    model = ModelConfig(path=stand_ins.language_model(), dtype="float32")
    source = TextSource(path="text.txt", document_pattern="CHAPTER ")
    points = [f"model.layers.{i}:out" for i in range(3)]
    text = TextConfig(sources=(source,), context=64)
    cache = sae.run.cache(model, text, points, n_rows=12_000, out="cache")

# %% The most frequent tokens are fillers; rows where one of them follows another one are read.
result = hyperdimensional_probe(
    cache, cache.hook_points, text_roles(cache), ProbeFit(steps=400 if given else 150)
)
for role, one in result.roles.items():
    print(
        f"{role}: {one.recall.value:.2f} [{one.recall.low:.2f}, {one.recall.high:.2f}] recalled; "
        f"linear {one.linear:.2f}, most frequent {one.floor:.2f}, exchanged {one.control:.2f}"
    )

"""Compare the layers of a model: by twelve measures, with what chance gives, and through the model.

    python examples/similarity.py HuggingFaceTB/SmolLM2-135M corpus.txt model.layers.7:out ...

Name hook points in the order of their layers. Without arguments a tiny random model and a made-up
text stand in; what its layers share is what blocks of random weights leave of their input.
"""

# %%
# One cache with several places of a model: the same rows at each.
import torch

import sae
import stand_ins
from activations_cache import ModelConfig, TextConfig, TextSource
from sae.evaluate.spaces import Draws, compare

model, corpus, *hook_points = stand_ins.arguments() or [stand_ins.language_model(), "text.txt"]
hook_points = hook_points or [f"model.layers.{layer}:out" for layer in range(4)]
text = TextConfig(sources=(TextSource(path=corpus, document_pattern="CHAPTER "),), context=64)
cache = sae.run.cache(
    ModelConfig(path=model, dtype="float32"), text, hook_points, n_rows=4_000, out="cache"
)

# %%
# Every pair by every measure. Read a value with the two columns beside it: the interval over texts,
# and what the measure gives when the rows of one side are exchanged. The second table has the shape
# of each place: how many dimensions its rows fill, and whether a few columns dominate.
result = sae.run.similar(cache, rows=300, permutations=19, draws=20)
result

# %%
# Chance is not 0 for all of them: with few rows any two sets have high canonical correlations.
first, last = hook_points[0], hook_points[-1]
for measure in ("cka", "svcca", "stitching"):
    one = result.pairs[first, last][measure]
    print(f"{measure} of the first and the last layer: {one.value:.2f}, by chance {one.chance:.2f}")

# %%
# Can a measure tell what it claims? How many components a set may lose before it is less like
# itself than like another layer, and whether near layers are more alike than far ones.
checked = sae.run.similar(
    cache, rows=300, permutations=19, draws=10, check=True, measures=["cka", "procrustes", "svcca"]
)
checked.sections[-1]

# %%
# A high R^2 may leave out the little that later layers go by. So each place is mapped into the next
# one's in the model itself, and the loss is read in nats, beside the stream as it is, a map of
# wrong pairs, and the mean row.
stitched = sae.run.similar(
    cache, rows=2_000, measures=["procrustes"], permutations=3, draws=3, model=True, contexts=8
)
stitched.sections[-1]

# %%
# Measures differ in what they forgive. Most do not see a rotation; a matching of units does.
x = cache[first][cache.rows()[:400]]
rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1])).Q
draws = Draws.of(torch.arange(len(x)), n_permutations=19, n_draws=10, seed=0)
for measure in ("cka", "procrustes", "relative search", "matching"):
    [copy] = compare({"rows": x, "rotated": x @ rotation}, [(0, 1)], measure, draws)[0].values()
    print(f"{measure} of a rotated copy: {copy.value:.2f}")

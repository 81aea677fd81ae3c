"""Train a dictionary on a vision model.

    python examples/train_on_images.py facebook/dinov2-small photos encoder.layer.9:out

`photos` is a folder with a folder for each class. Without arguments a tiny random DINOv2 and drawn
discs and squares stand in; their figures mean nothing.
"""

# %%
import sys

import torch

import activations_cache
import sae
import stand_ins
from activations_cache import CacheConfig, ImagesConfig, ImageSource, ModelConfig
from sae.architecture import TopK
from sae.evaluate import EvaluateConfig, evaluate
from sae.train import DictionaryConfig, TrainConfig, train

given = sys.argv[1:]
model, folder, hook_point = given or (
    stand_ins.vision_model(), stand_ins.drawings(), "encoder.layer.1:out",
)  # fmt: skip

# %%
# A row for each patch. An image that cannot be read is skipped, counted and listed.
config = CacheConfig(
    model=ModelConfig(path=model, dtype="float32"),
    images=ImagesConfig(sources=(ImageSource(path=folder),), tokens="patches"),
    hook_points=(hook_point,),
    n_rows=3_000,
)
cache = activations_cache.build(config, "cache")

# %%
entries = {"topk": DictionaryConfig(d_sae=96, activation=TopK(k=6))}
paths = train(cache, TrainConfig(saes=entries, batch=128, epochs=4), "train")
dictionary = sae.load(paths["topk"])
report = evaluate({"topk": dictionary}, cache, hook_point, None, EvaluateConfig()).report
print(f"FVU {report.reconstruction['topk'].fvu:.3f}, L0 {report.reconstruction['topk'].l0:.1f}")

# %%
# Where a latent fires: the patches of the image on which it is strongest.
rows = cache.rows(("explain",))
acts = dictionary.encode_dense(cache[hook_point][rows])
latent = int((acts > 0).sum(dim=0).argmax())
refs = cache.refs(rows)
strongest = int(refs.example[acts[:, latent].argmax()])
of_image = refs.example == strongest
patches = acts[of_image, latent]
side = int(len(patches) ** 0.5)
print(f"latent {latent} on image {strongest}:")
for line in torch.round(9 * patches / patches.max()).int().view(side, side).tolist():
    print(" ".join("." if value == 0 else str(value) for value in line))

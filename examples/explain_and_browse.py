"""Explain latents without a language model, and open the browser in the notebook.

    python examples/explain_and_browse.py runs/demo/train/topk runs/demo/cache

Labels come from the texts alone: the words with which a latent fires, scored on documents that the
label has not seen. Without arguments a tiny random model and a made-up text stand in; its labels
mean nothing.
"""

# %%
# A dictionary and the cache that it was trained on.
import sae
import stand_ins
from activations_cache import ModelConfig, TextConfig, TextSource
from sae.explain.config import ExplainConfig

given = stand_ins.arguments()
if given:
    dictionary, cache = given
else:
    model = ModelConfig(path=stand_ins.language_model(), dtype="float32")
    text = TextConfig(
        sources=(TextSource(path="text.txt", document_pattern="CHAPTER "),), context=64
    )
    cache = sae.run.cache(model, text, "model.layers.1:out", n_rows=4_000, out="cache").path
    dictionary = sae.run.train(cache, k=4, d_sae=48, out="train")["topk"]

# %%
# How often each latent fires, and its largest activation, are counted on held-out rows. They are
# the unit of steering, and a dictionary shows them.
measured = sae.run.evaluate(dictionary, cache, contexts=2)
sae.load(dictionary)

# %%
# The table has the baselines in it: what random directions reach, no dictionary needed to learn.
measured

# %%
# One label for each latent, and how well it tells on other documents where the latent fires. 0.5 is
# chance. `beats_null` is the share of the latents whose label does better than exchanged ones.
explained = sae.run.explain(dictionary, cache, ExplainConfig(min_firings=10, n_baseline=8))
summary = explained.labels.summary
print(f"{summary.n_scored} of {summary.n_latents} latents scored, AUC {summary.auc.mean:.2f}; "
      f"{summary.beats_null.mean:.0%} beat their null")  # fmt: skip
explained

# %%
# Which latents are like this one? Also by texts: `pos=["a text"], neg=["another"]`.
sae.run.find(dictionary, near=3, n=5)

# %%
# The feature browser in the cell. It is a folder of pages, which opens without a server as well.
browser = sae.run.show(dictionary, cache=cache, height=640)
browser

"""Ask whether an answer of the model depends on concepts, and on which latents.

    python examples/concepts.py runs/demo/train/topk concepts

`concepts` is a folder: `cooking.txt` holds a text of the concept in each line. TCAV (Kim et al.
2018) takes the direction that tells these texts from random ones, and asks whether the logit of the
answer grows along it. Without arguments a tiny random model and made-up texts stand in; its answers
mean nothing.
"""

# %%
# A dictionary, and concepts as folders of texts. Random texts, which the concepts are held against,
# are WordNet's glosses where none are named.
from pathlib import Path

import sae
import stand_ins
from activations_cache import ModelConfig, TextConfig, TextSource

given = stand_ins.arguments()
asked = {"prompts": ["The weather was cold and the", "She opened the old"], "target": " door"}
if given:
    dictionary, concepts = given
else:
    model = ModelConfig(path=stand_ins.language_model(), dtype="float32")
    text = TextConfig(
        sources=(TextSource(path="text.txt", document_pattern="CHAPTER "),), context=64
    )
    cache = sae.run.cache(model, text, "model.layers.1:out", n_rows=4_000, out="cache").path
    dictionary = sae.run.train(cache, k=4, d_sae=48, out="train")["topk"]
    parts = Path("text.txt").read_text().split(".")
    sentences = [part.split("\n")[-1].strip() for part in parts if len(part) > 9]
    concepts = stand_ins.folder_of_texts({
        word: [s for s in sentences if word in s] for word in ("garden", "horse")
    })
    Path("random.txt").write_text("\n".join(sentences))
    asked = {"prompts": sentences[:12], "target": "horse", "random": "random.txt", "texts": 8}

# %%
# `score` is the share of the prompts whose answer grows along the concept. Each random set is tried
# as if it were the concept; p is the rank among these, so it is never below 1 / (sets + 1). Both
# the stream and the dictionary's latents are asked. With too few sets for the number of concepts
# nothing can be significant; the note then says how many it takes: here 39.
tested = sae.run.concepts(dictionary, concepts=concepts, sets=40, sides="greater", **asked)
for name, on_latents in tested.latents.items():
    print(f"{name}: score {on_latents.score:.2f}, chance {on_latents.random:.2f}, "
          f"p {on_latents.p:.3f}")  # fmt: skip
tested.section

# %%
# Which latents fire in texts of one concept and not in those of another?
texts = [path.read_text().splitlines() for path in sorted(Path(concepts).glob("*.txt"))[:2]]
sae.run.find(dictionary, pos=texts[0][:3], neg=texts[1][:3], n=5)

# %%
# Which latents is the answer of one prompt made of? Attribution is exact to first order; turning
# each latent off is the check. Integrated gradients go the whole way from a baseline, and what they
# say depends on it: several stand side by side, with how far they agree.
behind = sae.run.find(
    dictionary, prompt=asked["prompts"][0], target=asked["target"], n=5,
    baselines=["off", "zero", "mean"],
)  # fmt: skip
behind

"""Label the latents of a vision model by words.

    python examples/images_with_words.py openai/clip-vit-base-patch32 photos words.txt

CLIP and SigLIP embed texts and images into one space. `words.txt` has a word or a caption in each
line, `photos` a folder with a folder for each class. Labels are made from one part of the images
and scored on another one. Without arguments a tiny random CLIP and drawings stand in; their labels
mean nothing.
"""

# %%
# The dictionary reads the patches of the tower for images; any other vision model will do as well,
# as long as the images are the same.
from dataclasses import replace
from pathlib import Path

import sae
import stand_ins
from activations_cache import ImagesConfig, ImageSource, ModelConfig
from sae.explain.config import ExplainConfig, ImageLabelConfig, WordsConfig
from sae.explain.tables import read_latents

given = stand_ins.arguments()
if given:
    tower, folder, words = given
else:
    tower, folder, words = stand_ins.towers(), stand_ins.drawings(), "words.txt"
images = ImagesConfig(
    sources=(ImageSource(path=folder),), tokens="patches", explain=0.4, score=0.4, hold=0.2
)
cache = sae.run.cache(
    ModelConfig(path=tower, dtype="float32"), images, "encoder.layers.1:out", out="cache",
    n_rows=400_000 if given else 2_900,
).path  # fmt: skip
dictionary = sae.run.train(cache, k=4, d_sae=48, epochs=4, out="train")["topk"]

# %%
# CLIP-Dissect (Oikarinen and Weng 2023) chooses each latent's word. The column `exchanged` is what
# other latents' words reach on the same images, `random` and `neurons` what untrained directions
# do: labels say something where they beat these.
asked = WordsConfig(tower=tower, concepts=words, templates=("a drawing of {}",), share=0.3)
config = ExplainConfig(
    n_baseline=8, images=ImageLabelConfig(words=asked, min_images=3, permutations=99)
)
explained = sae.run.explain(dictionary, cache, config)
explained

# %%
# Labels with their AUC on images that they were not made from; 0.5 is chance. The mean of all texts
# and the mean of all images lie apart in the common space: that is the modality gap.
labelled = [one for one in read_latents(explained.path) if one.label]
for one in labelled[:5]:
    print(f"latent {one.latent}: {', '.join(one.words[:3])}, AUC {one.auc:.2f}")
print(f"gap between texts and images: {explained.labels.words['modality_gap']:.2f}")

# %%
# SpLiCE (Bhalla et al. 2024) writes each image as a sum of few words, and takes the words that a
# latent's images share.
sparse = replace(config, images=replace(config.images, words=replace(asked, method="splice")))
sae.run.explain(dictionary, cache, sparse, out="by-splice")

# %%
# Latents by pictures: which fire in these and not in those?
classes = sorted(path for path in Path(folder).iterdir() if path.is_dir())
pos, neg = ([str(file) for file in sorted(path.iterdir())[:2]] for path in classes[:2])
sae.run.find(dictionary, pos=pos, neg=neg, n=5)

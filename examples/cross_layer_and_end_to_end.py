"""A cross-layer transcoder, and an end of the training by what the model predicts.

    python examples/cross_layer_and_end_to_end.py SmolLM2-135M corpus.txt model.layers 14

Two neighbouring blocks from the given one on are taken. Without arguments a tiny random model and a
made-up text stand in, so that all of this runs in seconds; its figures mean nothing.
"""

# %%
import sys

import activations_cache
import sae
import stand_ins
from activations_cache import CacheConfig, ModelConfig, TextConfig, TextSource, load_model
from sae.architecture import BatchTopK, TopK
from sae.evaluate import EvaluateConfig, evaluate
from sae.train import DictionaryConfig, TrainConfig, train
from sae.train.optim_config import EndToEnd

given = sys.argv[1:]
model, corpus, blocks, first = given or (
    stand_ins.language_model(),
    "text.txt",
    "model.layers",
    "1",
)
layers = [f"{blocks}.{int(first) + n}.mlp" for n in (0, 1)]
reads, writes = tuple(f"{m}:in" for m in layers), tuple(f"{m}:out" for m in layers)

# %%
# What the MLPs read and what they give, side by side for every token.
config = CacheConfig(
    model=ModelConfig(path=model, dtype="float32"),
    text=TextConfig(sources=(TextSource(path=corpus, document_pattern="CHAPTER "),), context=64),
    hook_points=(*reads, *writes),
    n_rows=6_000,
)
cache = activations_cache.build(config, "cache")

# %%
# Half of the cross-layer transcoder's latents read the first MLP's input and write to both outputs;
# the others read the second one's and write to the second. Beside it stands a transcoder per layer.
# One autoencoder is trained on rows alone, one ends by what the model predicts.
form = {"b_in": "none", "unit_norm": False}
plain = {"d_sae": 96, "activation": BatchTopK(k=8), **form}
both = {"d_sae": 192, "activation": BatchTopK(k=16), **form}
rows = {"d_sae": 96, "activation": TopK(k=8), "inputs": writes[:1]}
entries = {
    "cross-layer": DictionaryConfig(inputs=reads, outputs=writes, cross_layer=True, **both),
    "layer-0": DictionaryConfig(inputs=reads[:1], outputs=writes[:1], **plain),
    "layer-1": DictionaryConfig(inputs=reads[1:], outputs=writes[1:], **plain),
    "rows-alone": DictionaryConfig(**rows),
    "end-to-end": DictionaryConfig(**rows, end_to_end=EndToEnd(n_rows=4_000, lr=1e-3)),
}
paths = train(cache, TrainConfig(saes=entries, batch=256, epochs=4), "train")

# %%
# FVU of each place, and how much the model loses with a reconstruction in the place's stream.
dictionaries = {name: sae.load(path) for name, path in paths.items()}
language_model = load_model(config.model).model
found = evaluate(dictionaries, cache, writes[0], language_model, EvaluateConfig(n_contexts=8))
for name, figures in found.report.reconstruction.items():
    places = figures.fvu_per_hook_point or {writes[name == "layer-1"]: figures.fvu}
    each = ", ".join(f"{fvu:.3f} of {place}" for place, fvu in places.items())
    spliced = found.report.spliced(name).dictionaries[name]
    print(f"{name}: FVU {each}; the model loses {spliced.ce_increase.value:+.4f} nats")

"""Train a dictionary on a language model.

    python examples/train_on_a_model.py HuggingFaceTB/SmolLM2-135M corpus.txt model.layers.15:out

Any causal or masked language model of `transformers` will do: an id of the hub, a directory, a GGUF
file. Without arguments a tiny random model and a made-up text stand in, so that all of this runs in
seconds; its figures mean nothing.
"""

# %%
# `capture` takes any module path, with `:out` or `:in`; `sae cache hook-points MODEL` lists them.
import activations_cache
import sae
import stand_ins
from activations_cache import CacheConfig, ModelConfig, TextConfig, TextSource
from sae.architecture import BatchTopK
from sae.train import DictionaryConfig, TrainConfig, train
from sae.train.config import AuxK

given = stand_ins.arguments()
model, corpus, hook_point = given or (stand_ins.language_model(), "text.txt", "model.layers.2:out")

# %%
# The rows go to disk first. A second call finds them there; a call that was killed goes on.
# `skip_positions` leaves attention sinks out: where their norms are a hundred times the others',
# they would be all that is learned.
config = CacheConfig(
    model=ModelConfig(path=model, dtype="float32"),
    text=TextConfig(
        sources=(TextSource(path=corpus, document_pattern="CHAPTER "),), context=64, hold=0.1
    ),
    hook_points=(hook_point,),
    n_rows=12_000,
    skip_positions=1,
)
cache = activations_cache.build(config, "cache")

# %%
# Dictionaries of one config are trained side by side. The one with a frozen random decoder is the
# baseline: what it reaches, no dictionary needed to learn.
recipe = {
    "d_sae": 128, "activation": BatchTopK(k=8), "auxk": AuxK(coefficient=0.5),
    "dead_after_tokens": 2_000,
}  # fmt: skip
entries = {
    "learned": DictionaryConfig(**recipe),
    "frozen": DictionaryConfig(**recipe, frozen="decoder"),
}
paths = train(cache, TrainConfig(saes=entries, batch=256, epochs=4), "train")

# %%
# Held-out rows, and the model with each dictionary spliced in. FVU is centred per dimension; read
# the rise of the cross-entropy in nats, not the share that is recovered.
measured = sae.run.evaluate(paths, cache, contexts=8, baselines=False)
for name, figures in measured.report.reconstruction.items():
    spliced = measured.report.spliced(name).dictionaries[name]
    print(f"{name}: FVU {figures.fvu:.3f}, L0 {figures.l0:.1f}, "
          f"cross-entropy +{spliced.ce_increase.value:.4f} nats")  # fmt: skip
measured

# %%
# The dictionary as it lies on the disk, and what it says of some rows.
dictionary = sae.load(paths["learned"])
dictionary

# %%
rows = cache[hook_point][cache.rows(("hold",))[:256]]
dictionary.encode(rows)

"""Label latents by a language model of your own.

    vllm serve Qwen/Qwen2.5-7B-Instruct --port 8000
    python examples/explain_with_vllm.py http://127.0.0.1:8000/v1 Qwen/Qwen2.5-7B-Instruct

Any OpenAI-compatible endpoint does. Without arguments a local one stands in that answers with the
most frequent marked word. On the command line the same is `sae explain DICT --cache CACHE
autointerp.llm.base_url=URL autointerp.llm.model=NAME`.
"""

# %%
# Something to explain: a dictionary of a tiny random model.
import sys
from contextlib import nullcontext
from pathlib import Path

import activations_cache
import sae
import stand_ins
from activations_cache import CacheConfig, ModelConfig, Pieces, TextConfig, TextSource, load_model
from sae.architecture import TopK
from sae.explain.autointerp import Subject, client_of, label_with_llm
from sae.explain.config import AutointerpConfig, LLMConfig, WindowConfig
from sae.train import DictionaryConfig, TrainConfig, train

model = ModelConfig(path=stand_ins.language_model(), dtype="float32")
text = TextConfig(sources=(TextSource(path="text.txt", document_pattern="CHAPTER "),), context=64)
hook_point = "model.layers.1:out"
config = CacheConfig(model=model, text=text, hook_points=(hook_point,), n_rows=4_000)
cache = activations_cache.build(config, "cache")
entries = {"topk": DictionaryConfig(d_sae=32, activation=TopK(k=4))}
path = train(cache, TrainConfig(saes=entries, batch=256, epochs=4), "train")["topk"]
pieces = Pieces(load_model(model).tokenizer)

# %%
# Labels are written from the split `explain` and scored on `score`, which share no document. Limits
# are never exceeded, and every answer is kept: a second run asks nothing.
given = sys.argv[1:]
with nullcontext(given[0]) if given else stand_ins.endpoint() as url:
    settings = AutointerpConfig(
        llm=LLMConfig(
            model=given[1] if given else "stand-in", base_url=url, api_key="none",
            max_tokens=2_000_000,
        ),
        windows=WindowConfig(tokens=16),
        n_latents=5,
        n_controls=3,
        n_baseline=2,
    )  # fmt: skip
    subject = Subject(sae.load(path), cache, hook_point, pieces)
    summary = label_with_llm(subject, settings, Path("labels"), client_of(settings))

# %%
# No score without its floor and its controls: another latent's label, exchanged texts, and random
# directions that were labelled the same way.
detection = summary["scores"]["detection"]
print(f"{summary['n_done']} labelled, {summary['n_failed']} failed; "
      f"detection {detection['mean']:.2f}, chance {detection['floor']:.2f}")  # fmt: skip
for arm, scores in summary["controls"].items():
    print(f"  {arm}: {scores['detection']['mean']:.2f}")

"""From a text to a steered model in ten lines, after `import sae` or after anything else."""

import json
import os
import re
import subprocess
import sys

import pytest

LINES = """
cache = sae.run.cache({model!r}, {text!r}, "model.layers.1:out", n_rows=3001, out="cache")
[path] = sae.run.train(cache, k=3, d_sae=53, batch=127).values()
figures = sae.run.evaluate(path, cache, contexts=3)
sae.run.explain(path, cache)
dictionary, model = sae.load(path), sae.run.model(cache)
with sae.capture(model.model, [dictionary.hook_point]) as run:
    latents = dictionary.encode(run(cache.examples.tokens[:2, :9].long())[dictionary.hook_point])
label = sae.explain.read_latents(path / "explain")[latents.top(1)[0]]
with sae.run.steer(model, dictionary, {{latents.top(1)[0]: "10x"}}):
    text = sae.steer.generate(model.model, model.tokenizer, "The", max_new_tokens=3).text
"""
SHOWN = """
assert figures.report.reconstruction["topk"].l0 > 0
assert latents.values.shape[:2] == (2, 9)
assert label.latent == latents.top(1)[0]
assert float(dictionary.stats.max_activation[label.latent]) > 0
assert dictionary.provenance["cache"] == cache.fingerprint
print(dictionary, text)
"""
EVERYTHING = """
import pkgutil
import sae
for found in pkgutil.walk_packages(sae.__path__, "sae."):
    if "__main__" not in found.name and "pickled_child" not in found.name:
        __import__(found.name)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("before", ["import sae", EVERYTHING], ids=["alone", "after everything"])
def test_the_lines_run(before, tmp_path, tiny_model_dir, tiny_text):
    words = tiny_text.read_text().split()
    documents = [" ".join(words[i : i + 400]) for i in range(0, len(words), 400)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    lines = LINES.format(model=str(tiny_model_dir), text=str(text))
    assert len(lines.strip().splitlines()) <= 11
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{lines}{SHOWN}"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[0]
    assert re.match(r"SparseAutoencoder\(TopK\(.*k=3\), d_in=\d+, d_sae=53, of model.layers", said)

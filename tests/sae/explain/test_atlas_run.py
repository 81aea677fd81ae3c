"""The written map: what stands in atlas.parquet is what the parts compute."""

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from activations_cache.hooks import capture
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.explain.atlas import draw_atlas
from sae.explain.config import AtlasConfig
from sae.explain.firings import before, correlate_with_neurons, neurons_before

HOOK = "model.layers.3:out"


def untied(n: int, d_in: int, seed: int) -> SparseAutoencoder:
    config = SAEConfig(d_in=d_in, d_sae=n, activation=ReLU(), b_in="none")
    dictionary = SparseAutoencoder(config)
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in (dictionary.enc_rows, dictionary.dec_rows):
            rows.copy_(torch.randn(n, d_in, generator=made))
    return dictionary


def test_neighbours_parents_and_correlations_are_written(planted, tmp_path):
    d_in = planted.cache.acts.shape[2]
    dictionary, narrow = untied(23, d_in, 0), untied(11, d_in, 1)
    with torch.no_grad():
        dictionary.enc_rows[0] = torch.eye(d_in)[2]  # a coordinate of the stream
        dictionary.dec_rows[5] = 3 * narrow.dec_rows[7]
        dictionary.dec_rows[6] = 2 * narrow.dec_rows[7] + 0.01
    config = AtlasConfig(n_neighbours=3, n_rows=4096)
    summary = draw_atlas(dictionary, planted.cache, HOOK, config, tmp_path, narrow=narrow)
    rows = pq.read_table(tmp_path / "atlas.parquet").to_pylist()
    assert [row["latent"] for row in rows] == list(range(23))
    assert rows[5]["neighbours"][0] == 6
    assert rows[5]["cosines"][0] > 0.99
    assert (rows[5]["parent"], rows[6]["parent"]) == (7, 7)
    assert summary["splitting"]["most_children"] >= 2
    assert rows[0]["max_correlation"] == pytest.approx(1.0, abs=1e-4)
    assert len({(row["x"], row["y"]) for row in rows}) == 23
    assert json.loads((tmp_path / "atlas.json").read_text())["caution"] == summary["caution"]
    assert not list(tmp_path.glob("*.partial"))


def test_without_a_narrower_dictionary_nobody_has_a_parent(planted, tmp_path):
    dictionary = untied(7, planted.cache.acts.shape[2], 0)
    summary = draw_atlas(dictionary, planted.cache, HOOK, AtlasConfig(n_rows=64), tmp_path)
    rows = pq.read_table(tmp_path / "atlas.parquet").to_pylist()
    assert {row["parent"] for row in rows} == {None}
    assert "splitting" not in summary


def test_hook_points_before_one_are_known_by_their_blocks():
    among = (
        "model.embed_tokens:out", "model.layers.2.mlp.act_fn:out", "model.layers.15.mlp.act_fn:out",
        "model.layers.15:out", "model.layers.15:in", "model.layers.16:in", "model.layers.7:out",
    )  # fmt: skip
    assert before("model.layers.15:out", among) == (*among[1:3], among[4], among[6])
    assert before("model.layers.15.mlp:in", among) == (among[1], among[6])
    assert before("model.norm:out", among) == ()


def test_latents_are_correlated_with_units_of_all_earlier_layers(planted, tmp_path):
    d_in = planted.cache.acts.shape[2]
    dictionary = untied(11, d_in, 0)
    with torch.no_grad():
        dictionary.enc_rows[4] = torch.eye(d_in)[3]
    cache, units = copy.copy(planted.cache), "model.layers.1.mlp.act_fn:out"
    config = AtlasConfig(n_rows=4096, plane="pca")
    alone = draw_atlas(dictionary, cache, HOOK, config, tmp_path)
    assert alone["neurons"] == {"reason": f"the cache has no hook point before {HOOK}"}
    cache.hook_points = (HOOK, units, "model.layers.9:out")
    summary = draw_atlas(dictionary, cache, HOOK, config, tmp_path)
    assert summary["neurons"]["hook_points"] == [units]
    own = summary["correlation_with_the_stream"]
    assert {name: summary["neurons"][name] for name in own} == own  # the same rows, here


def test_neurons_of_all_earlier_layers_are_read_from_the_model(causal_model):
    """The largest over all layers is NumPy's, and small memory gives the same."""
    ids = torch.randint(1, 307, (7, 19), generator=torch.Generator().manual_seed(0))
    gpt2 = causal_model.config.model_type == "gpt2"
    name = "transformer.h.{}.mlp.c_proj:in" if gpt2 else "model.layers.{}.mlp.down_proj:in"
    hook = "transformer.h.2:out" if gpt2 else "model.layers.2:out"
    points = neurons_before(causal_model, hook, 23)
    assert points == tuple(name.format(i) for i in range(3))
    placed = untied(11, 23, 0).at(hook)
    largest = correlate_with_neurons(causal_model, placed, list(ids), points, skipped=1)
    with capture(causal_model, [hook, *points]) as run:
        streams = {p: x[:, 1:].flatten(0, 1).float() for p, x in run(ids).items()}
    acts, units = (
        placed.encode_dense(streams[hook]).detach(),
        torch.cat([streams[p] for p in points], 1),
    )
    expected = np.abs(np.corrcoef(acts.numpy().T, units.numpy().T)[:11, 11:]).max(axis=1)
    assert largest.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert torch.equal(
        largest, correlate_with_neurons(causal_model, placed, list(ids), points[::-1], skipped=1)
    )

"""The written map: what stands in atlas.parquet is what the parts compute."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.explain.atlas import draw_atlas, words_with_a_latent
from sae.explain.config import AtlasConfig, ExplainConfig
from sae.explain.labels import make_labels

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


def test_words_are_complete_where_they_are_frequent(codes_of, text_of):
    """Latent i is word i; only the frequent words have one."""
    made = np.random.default_rng(0)
    n_words, n_with = 61, 20
    zipf = 1 / np.arange(1, n_words + 1)
    words = made.choice(n_words, 499 * 41, p=zipf / zipf.sum())
    has = np.arange(n_words) < n_with
    has[[3, 25]] = ~has[[3, 25]]
    fires = (words[:, None] == np.flatnonzero(has)).astype(float)
    codes, text = codes_of(fires), text_of(499, 41, word=words)
    labels = make_labels(codes, text, ExplainConfig(kinds=("word",)))
    names = {"word": ["w" + chr(97 + i // 26) + chr(97 + i % 26) for i in range(n_words)]}
    result = words_with_a_latent(
        labels, names, text.values["word"], codes.n_fired, int(has.sum()), AtlasConfig()
    )
    assert result["n"] == n_words
    assert sum(n for _, _, n in result["points"]) == n_words
    assert result["points"][0][1] < 0.2 < 0.8 < result["points"][-1][1]
    assert result["share_present"] == pytest.approx(has.mean())
    boundary = zipf[n_with] / zipf.sum()
    assert boundary / 2 < result["f50"] < boundary * 2
    none = words_with_a_latent(
        labels, names, text.values["word"], codes.n_fired * 9, 20, AtlasConfig()
    )
    assert "present must hold both" in none["reason"]

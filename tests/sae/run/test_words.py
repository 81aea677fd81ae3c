"""Words of a pair of towers that is trained here on the shipped drawings and folders."""

import json
from pathlib import Path

import pytest

from sae import run
from tests import drawn_pair


def figures(path: Path) -> tuple[float, dict, dict]:
    """Share of the unseen drawings that the pair tells right; labels of topk and of its twin."""
    told = drawn_pair.drawn_pair(path / "clip", epochs=60)
    made = run.job(drawn_pair.run_config(path, path / "clip"), "explain")
    files = [made.output / "explain" / name / "summary.json" for name in ("topk", "topk-frozen")]
    topk, frozen = (json.loads(file.read_text()) for file in files)
    return told, topk, frozen


@pytest.mark.long
def test_words_beat_exchanged_ones_on_unseen_drawings(tmp_path, monkeypatch):
    """By the tower's own words, and by the folders that they name, which the tower never saw."""
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))
    told, topk, frozen = figures(tmp_path)
    assert told > 0.25  # one folder in 20 is chance
    assert topk["n_images_score"] > 200
    for arm in (topk, frozen):
        assert arm["beats_null_shuffled"]["value"] < 0.05
        assert abs(arm["control_auc"]["mean"] - 0.5) < 0.1
    for key in ("over_exchanged", "by_folders_over_exchanged"):
        assert topk[key]["low"] > 0

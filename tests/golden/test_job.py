"""A toy model's cache, and the evaluation of a dictionary on it, as commit d8b6d6c made them."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

import activations_cache
import sae
from activations_cache.config import CacheConfig
from activations_cache.models import load_model
from sae.config import load
from sae.evaluate.report import evaluate, read_json
from sae.run.config import RunConfig
from tests.exact import numerics

FIXTURES = Path(__file__).parents[1] / "released" / "d8b6d6c"
IS_EXACT = numerics() == json.loads((FIXTURES / "expected.json").read_text())["numerics"]


@pytest.fixture(autouse=True)
def config(tmp_path: Path) -> RunConfig:
    shutil.copytree(FIXTURES, tmp_path, dirs_exist_ok=True)
    for name in ("cache", "run"):
        with tarfile.open(f"{name}.tar.xz") as archive:
            archive.extractall(filter="data")
    return load(RunConfig, "run.yaml")


def test_a_cache_has_the_recorded_bytes(config):
    assert isinstance(config.cache, CacheConfig)
    ours = activations_cache.build(config.cache, "again")
    theirs = activations_cache.open("run/cache")
    for name in theirs.hook_points:
        a, b = ours[name][ours.rows()], theirs[name][theirs.rows()]
        assert a.equal(b) if IS_EXACT else torch.allclose(a, b, rtol=2**-6, atol=2**-8)
    files = [file for file in Path("run/cache").rglob("c/**/*") if file.is_file()]
    assert len(files) == 28
    for file in files:
        again = Path("again", file.relative_to("run/cache"))
        is_text = "examples" in file.parts or "rows" in file.parts
        if IS_EXACT or is_text:
            assert again.read_bytes() == file.read_bytes(), file


def test_an_evaluation_gives_the_recorded_numbers(config):
    dictionaries = {name: sae.load(f"run/train/{name}") for name in config.train.saes}
    result = evaluate(
        dictionaries,
        activations_cache.open("run/cache"),
        config.cache.hook_points[0],
        load_model(config.cache.model).model,
        config.evaluate,
    ).report
    recorded = read_json(Path("run/evaluate/report.json"))
    if IS_EXACT:
        assert result == recorded
    for name, measured in recorded.reconstruction.items():
        assert result.reconstruction[name].fvu == pytest.approx(measured.fvu, rel=1e-4)
        assert result.reconstruction[name].l0 == pytest.approx(measured.l0, rel=1e-4)
    ce, base = (r.substitution["intact"].ce_base.value for r in (result, recorded))
    assert ce == pytest.approx(base, rel=1e-4)

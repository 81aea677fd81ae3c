"""`sae evaluate DICT...` and `sae compare` on a tiny model's cache."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import activations_cache
from activations_cache import seals
from sae import pretrained
from sae.baselines import covariance_of, principal_components, random_dictionary
from sae.cli import main
from sae.evaluate.probe_tasks import RowLabels
from sae.evaluate.report import ParetoPoint
from sae.run import page
from sae.run.page import ParetoPanel, Series

HOOK = "model.layers.1:out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_cache_config) -> Path:
    """A cache, and two seeds each of a recipe that does well (wide) and of one that does not."""
    root = tmp_path_factory.mktemp("compare")
    cache = activations_cache.build(
        replace(tiny_cache_config, hook_points=(HOOK,), n_rows=2003), root / "cache"
    )
    covariance = covariance_of(cache, HOOK, cache.rows())
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        wide = principal_components(cache[HOOK].mean, covariance, 5)
        wide.b_dec.data += 1e-3 * torch.randn(wide.b_dec.shape, generator=generator)
        narrow = random_dictionary(wide, 5.0, generator)
        for name, dictionary in (("wide", wide), ("narrow", narrow)):
            provenance = {
                "seed": seed, "recipe": {"name": name}, "hook_points": [HOOK],
                "model": cache.identity["model"],
            }  # fmt: skip
            pretrained.save(dictionary, root / f"run{seed}" / "train" / name, provenance)
    return root


def sae(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return int(stop.value.code)


def paths(root: Path) -> list[str]:
    return [str(root / f"run{seed}/train/{name}") for name in ("wide", "narrow") for seed in (0, 1)]


def test_one_table_with_the_baselines_beside_the_dictionary(monkeypatch, capsys, trained):
    wide = paths(trained)[0]
    figures = trained / "figures.json"
    code = sae(
        monkeypatch, "evaluate", wide, "--cache", str(trained / "cache"), "--figures", str(figures),
        "--probe", "1", "--page", str(trained / "page.html"),
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    for name in ("wide", "PCA, k=5", "raw neurons, k=5", "random, k=5", "permuted decoder"):
        assert f" {name} " in out
    assert "dead: silent in" in out
    assert "k-sparse probing" in out
    assert (Path(wide) / "stats.safetensors").is_file()
    record = json.loads(figures.read_text())
    fvu = {name: of_one["fvu"] for name, of_one in record["report"]["reconstruction"].items()}
    assert fvu["wide"] == pytest.approx(fvu["PCA, k=5"], abs=0.01)
    assert fvu["wide"] < fvu["random, k=5"]
    assert fvu["wide"] < fvu["permuted decoder"]
    intact = record["report"]["substitution"]["intact"]["dictionaries"]
    assert set(intact) == set(fvu)
    assert set(record["probes"]["auc"]) == {"wide", "wide, random", "raw neurons"}
    page = (trained / "page.html").read_text()
    assert "<h1>Evaluation of wide</h1>" in page
    for title in ("Reconstruction", "Firing", "special positions intact", "Probes by label"):
        assert title in page
    kl = record["report"]["substitution"]["intact"]["dictionaries"]["wide"]["kl"]
    assert f"{kl['value']:.3f} [{kl['low']:.3f}, {kl['high']:.3f}]" in page
    assert "seeds" not in out  # there is one


def test_seeds_of_a_recipe_are_one_group_and_differences_are_judged(monkeypatch, capsys, trained):
    out_path = trained / "out"
    cache = ("--cache", str(trained / "cache"))
    arguments = (*paths(trained), *cache, "--out", str(out_path), "--contexts", "3", "--structure")
    assert sae(monkeypatch, "compare", *arguments) == 0
    out = capsys.readouterr().out
    record = json.loads((out_path / "compare.json").read_text())
    short = (*paths(trained)[:2], *cache, "--out", str(trained / "short"), "--no-model", "--json")
    assert sae(monkeypatch, "compare", *short) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"] == json.loads((trained / "short" / "compare.json").read_text())
    assert shown["tables"][0]["rows"]
    groups = record["groups"]
    assert len(set(groups.values())) == 2
    assert groups["run0/train/wide"] == groups["run1/train/wide"] == "run0/train/wide"
    assert record["seeds"]["run1/train/narrow"] == 1
    (pair,) = record["comparisons"]["FVU"]
    assert pair["verdict"] == "run0/train/wide < run0/train/narrow"
    assert "a < b" in out
    assert {"FVU", "Δ CE"} == set(record["comparisons"])
    spliced = record["report"]["substitution"]
    assert (spliced["intact"]["n_contexts"], spliced["spliced"]["n_contexts"]) == (3, 1)
    assert (out_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (out_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert 'src="http' not in page
    for title in ("at L0 = ", "seeds", "stability over seeds", "structure"):
        assert f"<h2>{title}" in page
        assert title in out
    wide, narrow = record["structure"]["stability over seeds"]["rows"]
    assert (wide[1], wide[2]) == ("1", "1.000")  # the seeds of `wide` differ by their bias alone
    assert abs(float(narrow[2]) - float(narrow[3])) < 0.1  # `narrow` is random: at the floor


def test_seeds_of_one_pass_are_told_apart_by_their_entries(monkeypatch, capsys, trained, tmp_path):
    """A grid over `seed` trains its entries in one run, whose own seed is the same for all."""
    targets, one_pass = [], tmp_path / "pass" / "train"
    for seed, path in enumerate(paths(trained)[:2]):
        shutil.copytree(path, one_pass / f"wide-{seed}")
        targets.append(str(one_pass / f"wide-{seed}"))
        record = json.loads((Path(path) / "provenance.json").read_text())
        record |= {"seed": 0, "recipe": {**record["recipe"], "seed": seed}}
        seals.write(one_pass / f"wide-{seed}", {"provenance.json": json.dumps(record).encode()})
    code = sae(
        monkeypatch, "compare", *targets, *paths(trained)[2:], "--cache", str(trained / "cache"),
        "--no-model", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["groups"]["pass/train/wide-1"] == "pass/train/wide-0"
    assert record["seeds"]["pass/train/wide-0"] == 0
    assert record["seeds"]["pass/train/wide-1"] == 1
    (pair,) = record["comparisons"]["FVU"]
    assert pair["verdict"] == "pass/train/wide-0 < run0/train/narrow"


def test_named_groups_and_no_model(monkeypatch, capsys, trained):
    targets = [f"all={path}" for path in paths(trained)]
    code = sae(
        monkeypatch, "compare", *targets, "--cache", str(trained / "cache"), "--no-model",
        "--out", str(trained / "named"),
    )  # fmt: skip
    assert code == 0
    record = json.loads((trained / "named" / "compare.json").read_text())
    assert set(record["groups"].values()) == {"all"}
    assert record["report"]["substitution"] == {}
    assert record["comparisons"] == {"FVU": []}


@pytest.mark.parametrize(
    ("baseline", "scale"), [(0.3, "linear"), (4.0, "log"), (-1.0, "linear"), (math.nan, "linear")]
)
def test_far_baselines_do_not_press_the_compared_into_a_line(baseline, scale):
    points = [ParetoPoint(l0=30.0, value=0.2), ParetoPoint(l0=40.0, value=0.15)]
    panel = ParetoPanel(
        "FVU", [Series("a", points, points)], {"b": ParetoPoint(l0=30.0, value=baseline)}
    )
    axis = Figure().subplots()
    page.draw(axis, panel, 32.0)
    assert axis.get_yscale() == scale


def refused(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    code = sae(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return code, error


def test_requests_that_do_not_fit_take_one_line(monkeypatch, capsys, trained):
    wide, cache = paths(trained)[0], str(trained / "cache")
    code, error = refused(monkeypatch, capsys, "evaluate", wide)
    assert (code, "--cache must be given" in error) == (2, True)
    code, error = refused(
        monkeypatch, capsys, "evaluate", wide, "--cache", cache, "--hook-point", "a.b:out"
    )
    assert (code, "must hold the hook point a.b:out, got model.layers.1:out" in error) == (1, True)
    code, error = refused(monkeypatch, capsys, "evaluate", wide, wide, "--cache", cache)
    assert (code, "dictionaries must be given once" in error) == (1, True)


def test_caches_without_held_out_rows_or_labels_are_refused_before_the_work(
    monkeypatch, capsys, trained, tmp_path, tiny_cache_config
):
    text = replace(tiny_cache_config.text, explain=0.7, score=0.3, hold=0.0)
    config = replace(tiny_cache_config, hook_points=(HOOK,), n_rows=211, text=text)
    activations_cache.build(config, tmp_path / "cache")
    for command in ("evaluate", "compare"):
        arguments = (command, *paths(trained)[:2], "--cache", str(tmp_path / "cache"))
        code, error = refused(monkeypatch, capsys, *arguments)
        assert code == 1
        assert "cache must have rows in the split hold, got none; build it with" in error
    one_class = lambda labels, cache, rows: torch.zeros_like(rows)  # noqa: E731
    monkeypatch.setattr(RowLabels, "of", one_class)
    cache = str(trained / "cache")
    arguments = ("evaluate", paths(trained)[0], "--cache", cache, "--probe", "2")
    code, error = refused(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "must have two labels with 20 rows in explain and in score and hold, got 1;" in error


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {"model_sha256": "ab" * 32}, "must be a dictionary of the cache's model"),
        ("hook_points", ["h.7:out"], "the cache's hook point model.layers.1:out, got one of h.7"),
    ],
)
def test_dictionaries_of_other_models_and_places_are_refused(
    monkeypatch, capsys, trained, tmp_path, key, value, message
):
    other = tmp_path / "other"
    shutil.copytree(paths(trained)[0], other)
    record = json.loads((other / "provenance.json").read_text())
    seals.write(other, {"provenance.json": json.dumps({**record, key: value}).encode()})
    arguments = ("compare", paths(trained)[0], str(other), "--cache", str(trained / "cache"))
    code, error = refused(monkeypatch, capsys, *arguments)
    assert code == 1
    assert message in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--no-model", "--contexts", "5"), "--contexts and --images must come with --model"),
        (
            ("--images", "31"),
            "evaluate.n_images must be absent where the cache is of texts, got 31",
        ),
    ],
)
def test_options_that_nothing_would_read_are_refused(
    monkeypatch, capsys, trained, options, problem
):
    cache = ("--cache", str(trained / "cache"))
    assert sae(monkeypatch, "evaluate", paths(trained)[0], *cache, *options) in {1, 2}
    assert problem in " ".join(capsys.readouterr().err.split())

"""`sae explain DICT --cache CACHE`: one line for a wrong request, files for a right one."""

import json

import pytest
import torch

import activations_cache
from sae import pretrained
from sae.architecture import SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.cli import main
from sae.explain.llm.chat import ConstantClient, UnavailableError

HOOK = "model.layers.1:out"


@pytest.fixture(scope="module")
def paths(tiny_cache_config, tmp_path_factory):
    """A tiny cache and a random dictionary that fits it."""
    where = tmp_path_factory.mktemp("explain")
    cache = activations_cache.build(tiny_cache_config, where / "cache")
    dictionary = SparseAutoencoder(SAEConfig(d_in=23, d_sae=37, activation=TopK(k=5)))
    initialise(dictionary, torch.Generator().manual_seed(0), mean=cache[HOOK].mean)
    pretrained.save(dictionary, where / "dictionary")
    wide = SparseAutoencoder(SAEConfig(d_in=29, d_sae=37, activation=TopK(k=5)))
    pretrained.save(wide, where / "wide")
    return where


def sae(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sae", "explain", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code or 0


def test_labels_without_and_with_a_language_model(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae.run.explaining.client_of", lambda config: ConstantClient(1))
    arguments = [
        str(paths / "dictionary"), "--cache", str(paths / "cache"), "--hook-point", HOOK,
        "--out", str(tmp_path / "out"),
        "min_firings=5", "min_examples=2", "autointerp.llm.model=m", "autointerp.n_latents=5",
        "autointerp.n_baseline=0", "autointerp.min_windows=2", "autointerp.logit_lens=true",
        "autointerp.windows.tokens=8", "n_baseline=7", "rules.windows.tokens=8",
        "rules.n_latents=5", "rules.min_windows=2", "weights=40", "seed=1",
    ]  # fmt: skip
    assert sae(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "AUC of labels from weights" in shown
    assert shown.index("failed") < shown.index("labelled")
    assert "0.500" in shown
    assert "calls" in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "latents.parquet", "examples.parquet", "summary.json", "windows.parquet",
        "activity.parquet", "explanations.jsonl", "explanations.parquet", "explanations.json",
        "llm.sqlite", "rules.jsonl", "rules.parquet", "rules.json", "atlas.parquet", "atlas.json",
        "files.json", "origin.json", "weights.json",
    }  # fmt: skip
    weights = json.loads((tmp_path / "out" / "weights.json").read_text())
    told = json.loads((tmp_path / "out" / "summary.json").read_text())["weights"]
    assert {**weights["summary"], "null": told["null"]} == told
    assert told["null"]["of"] == "random directions of the same width and L0"
    assert told["null"]["auc"]["mean"] != told["auc"]["mean"]
    aucs = [one["auc"] for one in weights["latents"] if one["auc"] is not None]
    assert told["auc"]["mean"] == pytest.approx(sum(aucs) / len(aucs))
    assert told["n_words"] == 40
    assert "says nothing about what the model does" in " ".join(shown.split())
    assert "raw neurons" in shown
    summary = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert summary["n_done"] + summary["n_insufficient"] == 5
    assert summary["n_done"] > summary["n_different_labels"] == 1
    assert f"{summary['n_done']}, 1 different labels" in shown


def test_scorers_that_look_into_the_model(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae.run.explaining.client_of", lambda config: ConstantClient(1))
    arguments = [
        str(paths / "dictionary"), "--cache", str(paths / "cache"), "--hook-point", HOOK,
        "--out", str(tmp_path / "out"),
        "autointerp.llm.model=m", "autointerp.n_latents=3", "autointerp.n_baseline=2",
        "autointerp.min_windows=2", "autointerp.windows.tokens=8", "rules.n_latents=5",
        "rules.min_windows=2", "rules.windows.tokens=8", "n_baseline=0", "min_firings=5",
        'autointerp.scorers=["embedding", "surprisal", "output side", "sensitivity", "ablation"]',
        'rules.scorers=["embedding", "surprisal", "output side", "sensitivity", "ablation"]',
    ]  # fmt: skip
    assert sae(monkeypatch, *arguments) == 0, capsys.readouterr().err
    asked = json.loads((tmp_path / "out" / "explanations.json").read_text())
    executed = json.loads((tmp_path / "out" / "rules.json").read_text())
    names = {"embedding", "surprisal", "output side", "sensitivity", "ablation"}
    assert asked["scores"].keys() == executed["scores"].keys() == names
    assert all(asked["scores"][name]["mean"] is not None for name in names)
    assert asked["scores"]["ablation"]["mean"] == 0.0  # a constant answer is the mean
    assert executed["scores"]["sensitivity"]["n"] == 0  # a rule writes no texts: no value, no 0
    assert asked["baselines"]["raw neurons"]["scores"] == {}


def test_a_dry_run_estimates_and_asks_nobody(paths, tmp_path, monkeypatch, capsys):
    def refuse(config):
        raise AssertionError("no client is needed")

    monkeypatch.setattr("sae.run.explaining.client_of", refuse)
    arguments = [
        str(paths / "dictionary"), "--cache", str(paths / "cache"), "--hook-point", HOOK,
        "--out", str(tmp_path / "out"),
        "--dry-run", "--max-usd", "0.5", "--max-tokens", "9999", "autointerp.llm.model=m",
        "autointerp.llm.usd_per_million_input=20", "autointerp.n_latents=5",
        "autointerp.n_baseline=0", "autointerp.min_windows=2", "autointerp.windows.tokens=8",
    ]  # fmt: skip
    assert sae(monkeypatch, *arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "max_usd 0.5 max_tokens 9,999" in shown
    assert "nothing was called" in shown
    assert "cost $0." in shown
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"windows.parquet", "activity.parquet", "files.json"}


def test_what_can_be_asked_again_is_exit_code_1(paths, tmp_path, monkeypatch, capsys):
    class Failing(ConstantClient):
        n, fails = 0, True

        async def complete(self, request):
            self.n += 1
            if self.fails and self.n == 3:
                raise UnavailableError("transport", "connection reset")
            return await super().complete(request)

    client = Failing(1)
    monkeypatch.setattr("sae.run.explaining.client_of", lambda config: client)
    arguments = [
        str(paths / "dictionary"), "--cache", str(paths / "cache"), "--hook-point", HOOK,
        "autointerp.llm.model=m", "autointerp.n_latents=5", "n_baseline=0", "rules.n_latents=1",
        "rules.windows.tokens=8", "min_firings=5", "permutations=100", "autointerp.n_baseline=0",
        "autointerp.min_windows=2", "autointerp.windows.tokens=8", "autointerp.llm.retries=0",
    ]  # fmt: skip
    out, whole = (["--out", str(tmp_path / name)] for name in ("out", "whole"))
    assert sae(monkeypatch, *arguments, *out) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "got 1 without one of 1 latents (transport: connection reset); run the same" in shown
    n_stored, client.n, client.fails = client.n - 1, 0, False
    assert sae(monkeypatch, *arguments, *out) == 0
    assert "cost of all runs so far" in capsys.readouterr().out
    n_asked, client.n = client.n, 0
    assert sae(monkeypatch, *arguments, *whole) == 0
    assert n_asked == client.n - n_stored  # what was answered is not asked again


def test_limits_reach_the_client(paths, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae.run.explaining.client_of", lambda config: ConstantClient(1))
    arguments = [
        str(paths / "dictionary"), "--cache", str(paths / "cache"), "--hook-point", HOOK,
        "--out", str(tmp_path / "out"),
        "--max-tokens=0", "autointerp.llm.model=m", "autointerp.n_latents=5", "n_baseline=0",
        "rules.n_latents=1", "rules.windows.tokens=8", "min_firings=5", "permutations=100",
        "autointerp.n_baseline=0", "autointerp.min_windows=2", "autointerp.windows.tokens=8",
    ]  # fmt: skip
    assert sae(monkeypatch, *arguments) == 0
    assert "budget" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "explanations.json").read_text())
    assert summary["cost"]["requests"] == 0
    assert summary["failed_by_reason"] == {"budget": summary["n_failed"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.yaml", "--dry-run"], "--dry-run must come with --cache CACHE, got none"),
        (["x.yaml", "--across", "y"], "--across must come with --cache CACHE, got none"),
        (["d", "--cache", "c", "--dry-run"], "--dry-run must come with autointerp.llm.model=NAME"),
        (
            ["d", "--cache", "c", "--max-usd", "1", "autointerp.llm.model=m"],
            "autointerp.llm.max_usd must come with usd_per_million_input",
        ),
        (["d", "--cache", "c", "--max-tokens", "9"], "autointerp.llm.model"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message, monkeypatch, capsys):
    assert sae(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in " ".join(error.split())


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({1: "nowhere"}, 1, "must be a directory with a cache, got no such directory"),
        ({0: "wide"}, 1, "must read rows as wide as model.layers.1:out of"),
        ({2: "--hook-point=x:out"}, 2, "--hook-point must be one of model.layers.1:out"),
        ({2: "autointerp.llm.modle=x"}, 2, "is not a key of autointerp.llm; did you mean 'model'?"),
        ({2: "autointerp.llm.model=x"}, 1, "must have OPENAI_API_KEY, got none; set it"),
        (
            {2: "autointerp.style=x"},
            2,
            "autointerp.style must be one of 'levels', 'bills', 'delphi'",
        ),
    ],
)
def test_a_wrong_request_is_one_line(change, code, message, paths, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    parts = {0: "dictionary", 1: "cache", 2: "min_firings=5"} | change
    arguments = [str(paths / parts[0]), "--cache", str(paths / parts[1]), parts[2]]
    arguments += ["--hook-point", HOOK] if parts[2] != "--hook-point=x:out" else []
    assert sae(monkeypatch, *arguments) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in " ".join(error.split())
    assert "Traceback" not in error

"""A released dictionary, by its name, through every command; errors' remedies are followed."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import activations_cache
import sae as library
from sae.cli import main
from sae.metrics import Firing
from sae.pretrained import hub
from sae.run import steer

NAME = "gemma-2-2b-res-matryoshka-dc:blocks.1.hook_resid_post"
OTHER = "gemma-2-2b-res-snap-matryoshka-dc:blocks.1.hook_resid_post"
HOOK = "model.layers.1:out"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
D, F = 23, 37


@pytest.fixture(scope="module")
def cache(tiny_cache_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "cache"
    return activations_cache.build(replace(tiny_cache_config, hook_points=(HOOK,)), path).path


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """Two dictionaries of SAELens, as the hub's client leaves them."""
    root = tmp_path_factory.mktemp("hub") / "models--org--name" / "snapshots" / COMMIT
    rng = np.random.default_rng(5)
    cfg = {
        "architecture": "jumprelu", "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": {"sae_lens_version": "6.18.0"},
    }  # fmt: skip
    for kind in ("standard", "snap"):
        folder = root / kind / "blocks.1.hook_resid_post"
        folder.mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps(cfg))
        rows = rng.standard_normal((F, D)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        tensors = {
            "W_enc": rows.T.copy(), "W_dec": rows, "b_enc": np.zeros(F, np.float32),
            "b_dec": np.zeros(D, np.float32), "threshold": np.full(F, 0.1, np.float32),
        }  # fmt: skip
        save_file(tensors, folder / "sae_weights.safetensors")
    return root


@pytest.fixture
def run(monkeypatch, capsys, snapshot, tmp_path):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, " ".join(printed.out.split()), printed.err

    return call


def followed(run, message: str, before: str, **places):
    """Run the command that stands in an error between backquotes behind a word."""
    command = message.partition(before)[2].partition("`")[2].partition("`")[0]
    for word, value in places.items():
        command = command.replace(word, str(value))
    code, out, err = run(*command.split()[1:])
    assert code == 0, (command, err)
    return out


def test_strengths_in_maxima_work_after_what_the_error_says(run, cache, tiny_model_config):
    arguments = (
        "steer", NAME, "--latent", "7=10x", "--prompt", "Aba cede", "max_new_tokens=4",
        "dtype=float32",
    )  # fmt: skip
    code, _, err = run(*arguments, "--model", tiny_model_config.path)
    assert code == 1
    assert err.count("\n") == 1
    followed(run, err, "run", DICT=NAME, CACHE=cache)
    code, out, err = run(*arguments)  # the model is that of the cache it was measured on
    assert code == 0, err
    assert "ran on" in out


def test_statistics_lie_under_the_hash_of_the_weights(run, cache, snapshot, tmp_path):
    assert run("evaluate", NAME, OTHER, "--cache", cache, "--no-model", "--no-baselines")[0] == 0
    loaded = [library.pretrained.load_with_source(name) for name in (NAME, OTHER)]
    for one in loaded:
        digest = one.source.source_sha256["sae_weights.safetensors"]
        home = tmp_path / "user" / "dictionaries" / digest
        assert Firing.read(home, digest).n_rows > 0
        with pytest.raises(ValueError, match="must be made for the weights of the dictionary"):
            Firing.read(home, "0" * 64)
        record = json.loads((home / "measured_on.json").read_text())
        assert record["hook_point"] == HOOK
    assert not any(path.name == "stats.safetensors" for path in snapshot.rglob("*"))
    homes = {path.name for path in (tmp_path / "user" / "dictionaries").iterdir()}
    assert len(homes - {"fetched"}) == 2  # there stand the hashes of what the hub gave


def test_the_browser_takes_it_after_what_the_error_says(run, cache, tmp_path, tiny_model_config):
    code, _, err = run("browse", NAME)
    assert code == 1
    followed(run, err, "run", CACHE=f"{cache} min_firings=5 min_examples=2 n_baseline=3")
    code, out, _ = run("browse", NAME, "--cache", cache)
    assert code == 0
    assert "page: " in out
    (page,) = (tmp_path / "user" / "dictionaries").glob("*/browse/index.html")
    assert page.stat().st_size > 1000
    assert not (tmp_path / NAME).exists()
    check_pages(run, tmp_path / "pages", tiny_model_config.path)


def check_pages(run, pages, model):
    """What was explained, as pages of Neuronpedia and circuit-tracer, with promoted tokens."""
    code, _, err = run("convert", NAME, pages, "--to", "neuronpedia", "--model", model)
    assert code == 0, err
    batch = json.loads((pages / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"]) == ("gemma-2-2b", 1)
    assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(F))
    assert all(feature.keys() == FEATURE for feature in batch["features"])
    shown = next(feature for feature in batch["features"] if feature["activations"])
    example = shown["activations"][0]
    assert example["values"][example["qualifying_token_index"]] == max(example["values"]) > 0
    assert len(example["tokens"]) == len(example["values"])
    assert abs(sum(shown["freq_hist_data_bar_heights"]) - 1) < 1e-6
    assert len(shown["pos_str"]) == len(shown["pos_values"]) == 10
    assert len(shown["vector"]) == D
    page = json.loads((pages / "features" / f"{shown['feature_index']}.json").read_text())
    assert page["act_max"] >= page["examples_quantiles"][0]["examples"][0]["tokens_acts_list"][0]
    labels = [json.loads(x) for x in (pages / "explanations.jsonl").read_text().splitlines()]
    assert {"modelId", "layer", "index", "description"} <= labels[0].keys()


FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero",
    "freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt", "dataset",
    "decoder_weights_dist", "activations", "vector",
}  # fmt: skip
"""The keys that SAEDashboard 2026-05 writes for a feature."""


def test_pages_need_labels(run):
    code, _, err = run("convert", NAME, "pages", "--to", "neuronpedia")
    assert code == 1
    assert "run `sae explain DICT --cache CACHE`" in err


def test_the_other_commands_take_it(run, cache, tiny_model_config):
    code, out, err = run(
        "compare", f"a={NAME}", f"b={OTHER}", "--cache", cache, "--no-model", "--out", "compared"
    )
    assert code == 0, err
    code, out, _ = run("find", NAME, "--near", "3", "n=4")
    assert code == 0
    assert "near latent 3" in out
    model = ("--model", tiny_model_config.path, "dtype=float32")
    code, out, _ = run("find", NAME, "--pos", "Aba cede", "n=4", *model)
    assert code == 0
    code, out, _ = run("inspect", NAME)
    assert code == 0
    assert HOOK in out
    assert "neuronpedia" not in out


def test_a_name_is_verified_against_what_the_list_publishes(run, cache):
    code, out, _ = run("verify-release", NAME, cache)
    assert code == 1
    assert "published: l0 40" in out
    assert "meets the published figures: no reading" in out
    assert float(out.partition("as loaded")[2].split()[0]) > 0


def test_what_needs_a_cache_says_so_for_a_name(run):
    for command in ("evaluate", "explain"):
        code, _, err = run(command, NAME)
        assert code == 2
        assert "--cache" in err


def test_from_python_by_name(run, cache, tiny_model):
    library.run.evaluate(NAME, cache, model=False, baselines=False)
    with steer(tiny_model, NAME, {3: "2x"}) as steering, torch.no_grad():
        tiny_model.model(torch.tensor([[1, 2, 3]]))
    assert steering.counts[0].n_chosen == 2


def test_a_refined_read_out_works_after_what_the_error_says(run, cache, tiny_model_config):
    arguments = (
        "steer", NAME, "--latent", "7=2.5", "--prompt", "Aba cede", "max_new_tokens=4",
        "--model", tiny_model_config.path, "dtype=float32", "--read-out", "refined",
    )  # fmt: skip
    code, _, err = run(*arguments)
    assert code == 1
    followed(run, err, "run", DICT=NAME, CACHE=f"{cache} --rows 300")
    assert run(*arguments)[0] == 0


def test_damaged_statistics_are_counted_again_as_the_error_says(run, cache, tmp_path):
    measure = ("evaluate", NAME, "--cache", cache, "--no-model", "--no-baselines")
    assert run(*measure)[0] == 0
    (stats,) = (tmp_path / "user" / "dictionaries").glob("*/stats.safetensors")
    tensors = load_file(stats)
    save_file(tensors, stats, {"sae_sha256": "0" * 64})
    with pytest.raises(ValueError, match="it is damaged: run") as error:
        Firing.read(stats.parent, stats.parent.name)
    followed(run, str(error.value), "run", DICT=NAME, CACHE=f"{cache} --no-model --no-baselines")
    assert Firing.read(stats.parent, stats.parent.name).n_rows > 0


def test_ids_are_listed_by_the_command_that_the_error_names(run):
    release = NAME.partition(":")[0]
    code, _, err = run("inspect", f"{release}:blocks.99.hook_resid_post")
    assert code == 1
    assert "blocks.1.hook_resid_post" in followed(run, err, "and")


def test_a_pickle_is_written_as_ours_by_the_command_that_the_error_names(run, tmp_path):
    record = {"dict_class": "AutoEncoderTopK", "activation_dim": D, "dict_size": F, "k": 3}
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"trainer": record, "buffer": {}}))
    state = {
        "encoder.weight": torch.eye(F, D), "encoder.bias": torch.zeros(F), "b_dec": torch.zeros(D),
        "decoder.weight": torch.eye(D, F), "k": torch.tensor(3), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    torch.save(state, folder / "ae.pt")
    code, _, err = run("inspect", folder)
    assert code == 1
    followed(run, err, "ours by", TARGET=tmp_path / "ours")
    assert library.load(tmp_path / "ours").config.d_sae == F

"""`sae refine` and what reads by it: files, evaluation, labels, steering, other libraries."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from pyarrow import parquet

import activations_cache
import sae as library
from benchmarks import bench_labels
from sae import run
from sae.cli import main
from sae.evaluate.report import read_json
from sae.pretrained import DictionaryFormatError
from sae.pretrained.monosema_format import READ_OUT
from sae.read_out import ReadOut
from sae.steer.edits import read_latents

HOOK = "model.layers.1:out"


def command(capsys, *arguments) -> tuple[int, str]:
    before, sys.argv = sys.argv, ["sae", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            main.main()
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return int(stop.value.code), said.out + said.err


@pytest.fixture(scope="module")
def cache(tiny_cache_config, tmp_path_factory):
    config = replace(tiny_cache_config, hook_points=(HOOK,), n_rows=3001)
    return activations_cache.build(config, tmp_path_factory.mktemp("refining") / "cache")


@pytest.fixture(scope="module")
def trained(cache):
    [path] = run.train(cache, k=3, d_sae=53, batch=127, epochs=2).values()
    return path


@pytest.fixture
def path(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "topk")


@pytest.fixture
def refined(path, cache):
    return run.refine(path, cache, rows=2000)


def rows(cache, n=37):
    return cache[HOOK][cache.rows(("hold",))[:n]].float()


def same(a, b) -> bool:
    return torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices)


def test_it_is_saved_beside_the_dictionary_and_loaded_again(refined, path, cache):
    x = rows(cache)
    expected = refined.dictionary.encode(x, read_out="refined")
    assert refined.path == path / READ_OUT
    back = library.load(path)
    assert same(back.encode(x, read_out="refined"), expected)
    assert back.read_out.made_from["cache"] == cache.fingerprint
    copy = library.save(back, path.with_name("copy"))
    assert same(library.load(copy).reading("refined").encode(x), expected)
    assert refined.figures["refined"].fvu < refined.figures["linear"].fvu
    library.save(run.distil(back, cache, rows=500, steps=3).dictionary, copy)
    assert library.load(copy).read_out is None  # it was of the weights before


def test_a_dictionary_without_one_is_as_it_was(path, cache):
    assert library.load(path).read_out is None
    with pytest.raises(ValueError, match="sae refine"):
        library.load(path).reading("refined")
    assert same(library.load(path).encode(rows(cache)), library.load(path).encode(rows(cache)))


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_flipped_bit_is_refused_where_it_is_used(refined, path, cache, place):
    data = bytearray(refined.path.read_bytes())
    data[int(place * len(data))] ^= 4
    refined.path.write_bytes(data)
    dictionary = library.load(path)
    dictionary.encode(rows(cache))
    with pytest.raises(DictionaryFormatError, match=READ_OUT) as refused:
        dictionary.encode(rows(cache), read_out="refined")
    assert "\n" not in str(refused.value)
    assert "sae refine" in str(refused.value)


def test_other_weights_and_other_files_are_refused(refined, path, tmp_path, cache):
    other = library.load(path)
    with torch.no_grad():
        other.b_dec += 1
    other.read_out = None
    library.save(other, tmp_path / "other")
    shutil.copy(refined.path, tmp_path / "other" / READ_OUT)
    with pytest.raises(DictionaryFormatError, match="made for the weights"):
        library.load(tmp_path / "other").require_read_out()
    (tmp_path / "other" / READ_OUT).write_bytes(b"{}")
    with pytest.raises(DictionaryFormatError, match="run `sae refine` again"):
        library.load(tmp_path / "other").require_read_out()


def test_evaluation_sets_what_is_missing_and_has_statistics_of_its_own(path, cache):
    plain = run.evaluate(path, cache, model=False, baselines=False)
    n_linear = library.load(path).stats.n_fired
    found = run.evaluate(path, cache, model=False, baselines=False, read_out="refined")
    assert (path / READ_OUT).is_file()
    assert plain.report.read_out == {}
    assert found.report.read_out == {"topk": "refined"}
    assert found.report.reconstruction["topk"].fvu < plain.report.reconstruction["topk"].fvu
    back = library.load(path)
    assert torch.equal(back.stats.n_fired, n_linear)
    n_refined = back.reading("refined").stats.n_fired
    assert not torch.equal(n_refined, n_linear)
    changed = replace(back.require_read_out(), tau=back.require_read_out().tau + 0.1)
    back.read_out = changed
    with pytest.raises(ValueError, match="must be made for"):
        _ = library.load(library.save(back, path)).reading("refined").stats


def test_labels_are_of_refined_latents_and_say_so(refined, path, cache):
    run.explain(path, cache, read_out="refined")
    assert json.loads((path / "explain/origin.json").read_text())["read_out"] == "refined"
    linear = run.explain(path, cache, out=path / "linear")
    assert linear.labels.summary != run.explain(refined.dictionary.reading("refined"), cache).labels


def test_steering_has_the_same_directions_and_other_activations(refined, path, cache):
    model, x = run.model(cache), rows(cache)
    dictionary = library.load(path).reading("refined")
    latent = dictionary.encode(x).top(1)[0]
    [read] = read_latents(dictionary, x, torch.tensor([latent])).T
    assert torch.equal(read, dictionary.encode_dense(x)[:, latent])
    assert torch.equal(dictionary.direction(latent), library.load(path).direction(latent))
    ids = cache.examples.tokens[cache.refs(cache.rows(("hold",))[:37]).example].long()
    ids = ids[(ids >= 0).all(dim=1)].unique(dim=0)
    logits = []
    for read_out in ("linear", "refined"):
        with run.steer(model, path, {latent: "off"}, read_out=read_out), torch.no_grad():
            logits.append(model.model(ids).logits)
    assert not torch.equal(*logits)
    with pytest.raises(ValueError, match="--read-out refined"):
        run.steer(model, path, {latent: "10x"}, read_out="refined")


def test_dictionaries_of_other_libraries_get_one_in_the_users_cache(
    path, cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))
    run.convert(path, tmp_path / "theirs", "saelens")
    before = sorted((tmp_path / "theirs").iterdir())
    made = run.refine(tmp_path / "theirs", cache, rows=2000)
    assert sorted((tmp_path / "theirs").iterdir()) == before
    x = rows(cache)
    back = library.load(tmp_path / "theirs").reading("refined")
    assert same(back.encode(x), made.dictionary.encode(x, read_out="refined"))
    found = run.evaluate(
        tmp_path / "theirs", cache, model=False, baselines=False, read_out="refined"
    )
    assert found.report.reconstruction["theirs"].fvu == pytest.approx(
        made.figures["refined"].fvu, rel=0.2
    )


def test_a_distilled_encoder_is_an_ordinary_dictionary(refined, path, cache, tmp_path):
    made = run.distil(path, cache, tmp_path / "new", rows=2000, steps=50)
    assert set(made.figures) == {"linear", "refined", "distilled"}
    back, x = library.load(tmp_path / "new"), rows(cache)
    assert back.read_out is None
    assert back.provenance["distilled"]["steps"] == 50
    assert back.hook_point == HOOK
    run.convert(tmp_path / "new", tmp_path / "theirs", "saelens")
    torch.testing.assert_close(library.load(tmp_path / "theirs")(x), back(x))


def test_the_command_and_its_option(path, cache, capsys, tmp_path):
    code, said = command(
        capsys, "refine", path, "--cache", cache.path, "--rows", 500, "--distil", tmp_path / "new"
    )
    assert code == 0
    assert "refined" in said
    assert "distilled" in said
    assert (path / READ_OUT).is_file()
    assert (tmp_path / "new" / "config.json").is_file()
    figures = tmp_path / "figures.json"
    code, _ = command(
        capsys, "evaluate", path, "--cache", cache.path, "--no-model", "--no-baselines",
        "--read-out", "refined", "--figures", figures,
    )  # fmt: skip
    assert code == 0
    assert json.loads(figures.read_text())["report"]["read_out"] == {"topk": "refined"}
    code, said = command(capsys, "evaluate", path, "--cache", cache.path, "--read-out", "refine")
    assert code == 2
    assert "refined" in said
    code, said = command(capsys, "steer", path, "read_out=refine", "--latent", "3=4.5")
    assert code == 2


def test_a_run_reads_by_it_from_the_evaluation_on(tiny_model_dir, tiny_text, tmp_path):
    from tests.tiny import cache_record

    record = {
        "output": str(tmp_path / "run"),
        "read_out": "refined",
        "cache": cache_record(tiny_model_dir, tiny_text, 2003),
        "train": {"saes": {"topk": {"d_sae": 53, "activation": {"kind": "topk", "k": 3}}}},
        "evaluate": {"n_contexts": 2, "n_contexts_special": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(record))
    run.job(tmp_path / "run.yaml", last="evaluate")
    where = tmp_path / "run/train/topk"
    assert (where / READ_OUT).is_file()
    assert (where / "refined_stats.safetensors").is_file()
    report = read_json(tmp_path / "run/evaluate/report.json")
    assert report.read_out == {"topk": "refined"}
    assert library.load(where).reading("refined").stats is not None


def test_a_run_whose_latents_cannot_be_refined_is_refused_before_it_begins(
    tiny_model_dir, tiny_text
):
    from sae.config import ConfigError, from_dict
    from sae.run.config import RunConfig
    from tests.tiny import cache_record

    points = ["model.layers.0:out", HOOK]
    entry = {"d_sae": 53, "activation": {"kind": "topk", "k": 3}, "inputs": points[:1]}
    record = {
        "output": "x",
        "read_out": "refined",
        "cache": cache_record(tiny_model_dir, tiny_text, 2003) | {"hook_points": points},
        "train": {"saes": {"transcoder": entry | {"outputs": points[1:], "b_in": "none"}}},
    }
    with pytest.raises(ConfigError, match=r"read_out must be 'linear' beside train\.saes\.transc"):
        from_dict(RunConfig, record, "x.yaml")
    record["train"]["saes"]["transcoder"] = entry
    assert from_dict(RunConfig, record, "x.yaml").read_out == "refined"


def test_rows_that_it_was_not_trained_on_are_refused(path, cache):
    dictionary = library.load(path)
    with torch.no_grad():
        dictionary.dec_rows.mul_(-1)
    # A bad dictionary of this cache is not one of another place: a run still gets its table.
    assert run.refine(dictionary, cache).figures["linear"].fvu > 1
    dictionary.provenance = {**dictionary.provenance, "cache": "another"}
    with pytest.raises(ValueError, match="FVU below 1"):
        run.refine(dictionary, cache)
    dictionary.read_out = ReadOut(tau=torch.zeros(53))
    run.evaluate(dictionary, cache, model=False, baselines=False, read_out="refined")


def test_the_benchmark_of_labels_reads_by_it_and_says_so(
    refined, path, cache, tmp_path, capsys, monkeypatch
):
    recorded = []
    monkeypatch.setattr(bench_labels, "append", lambda _, rows: recorded.extend(rows))
    shutil.copytree(path, path.with_name("topk-frozen"))
    dictionaries = [str(path), str(path.with_name("topk-frozen"))]
    options = ("--permutations", "19", "--baseline", "7", "--record")
    for name in ("linear", "refined"):
        of = ("--cache", str(cache.path), "--read-out", name, "--out", str(tmp_path / name))
        monkeypatch.setattr(sys, "argv", ["bench_labels", *dictionaries, *of, *options])
        bench_labels.main()
        table = parquet.read_table(tmp_path / name / "topk" / "latents.parquet")
        x = cache[HOOK][cache.rows(("explain",))].float()
        reading = library.load(path).reading(name)
        n_fired = (reading.encode_dense(x) > 0).sum(dim=0)
        assert table["n_fired_explain"].to_pylist() == n_fired.tolist()
    assert [row["read_out"] for row in recorded] == sorted(row["read_out"] for row in recorded)
    assert {row["read_out"] for row in recorded} == {"linear", "refined"}
    assert {"topk", "topk-frozen"} < {row["arm"] for row in recorded}
    assert "topk: AUC at equal density: +0.000" in capsys.readouterr().out

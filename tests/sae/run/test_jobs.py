"""Each job from Python gives the same numbers as its command."""

import json
import re
import subprocess
import sys

import pytest
import torch

import activations_cache
import sae as library
from sae import run
from sae.cli import main
from sae.evaluate.report import plain
from sae.explain.config import ExplainConfig
from sae.explain.tables import read_latents
from sae.run.steering import placed_in_model
from sae.steer.generation import generate

HOOK = "model.layers.1:out"


def command(*arguments) -> int:
    before, sys.argv = sys.argv, ["sae", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            main.main()
    finally:
        sys.argv = before
    return int(stop.value.code)


def as_json(record) -> object:
    return json.loads(json.dumps(plain(record)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return activations_cache.ModelConfig(path=str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="module")
def text(tiny_text):
    source = activations_cache.TextSource(path=str(tiny_text), document_pattern="CHAPTER")
    return activations_cache.TextConfig(sources=(source,), context=31)


@pytest.fixture(scope="module")
def cache(folder, model, text):
    return run.cache(model, text, HOOK, n_rows=3001, out=folder / "cache")


@pytest.fixture(scope="module")
def dictionary(cache):
    paths = run.train(cache, k=3, d_sae=53, batch=127, epochs=2)
    assert list(paths) == ["topk"]
    return paths["topk"]


@pytest.fixture(scope="module")
def labels(folder, cache, dictionary):
    few = ExplainConfig(min_firings=5, min_examples=2, kinds=("word",), n_baseline=0)
    return run.explain(dictionary, cache, few, out=folder / "labels").path


def test_a_cache_is_the_command_s(folder, cache, model, text, tmp_path):
    config = {
        "output": str(tmp_path),
        "cache": {
            "model": {"path": model.path, "dtype": "float32"},
            "text": {"sources": [{"path": text.sources[0].path, "document_pattern": "CHAPTER"}]},
            "hook_points": [HOOK],
            "n_rows": 3001,
        },
    }
    config["cache"]["text"]["context"] = 31
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("cache", tmp_path / "run.yaml") == 0
    other = activations_cache.open(tmp_path / "cache")
    assert other.fingerprint == cache.fingerprint
    rows = cache.rows()
    assert torch.equal(other[HOOK][rows], cache[HOOK][rows])
    assert run.verify(folder / "cache") == []


def test_figures_are_those_of_evaluate(cache, dictionary, tmp_path):
    measured = run.evaluate(dictionary, cache, contexts=3)
    file = tmp_path / "report.json"
    arguments = (dictionary, "--cache", cache.path, "--contexts", 3, "--figures", file)
    assert command("evaluate", *arguments) == 0
    assert json.loads(file.read_text()) == as_json(measured.record)
    again = run.evaluate({"topk": library.load(dictionary)}, cache.path, contexts=3)
    assert as_json(again.report) == as_json(measured.report)
    assert again.report.reconstruction["topk"].l0 == pytest.approx(3, abs=0.5)


def test_figures_are_those_of_compare(cache, dictionary, tmp_path):
    compared = run.compare({"a": [dictionary]}, cache, model=False)
    target = f"a={dictionary}"
    arguments = (target, "--cache", cache.path, "--no-model", "--out", tmp_path)
    assert command("compare", *arguments) == 0
    assert json.loads((tmp_path / "compare.json").read_text()) == as_json(compared.record)


def test_labels_are_those_of_explain(cache, dictionary, tmp_path):
    explained = run.explain(dictionary, cache, out=tmp_path / "a")
    arguments = (dictionary, "--cache", cache.path, "--out", tmp_path / "b")
    assert command("explain", *arguments) == 0
    for name in ("summary.json", "rules.json", "atlas.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert explained.path == tmp_path / "a"
    loaded = run.explain(library.load(dictionary), cache)
    assert loaded.path is None
    assert loaded.labels.summary == explained.labels.summary


def test_a_steered_text_is_that_of_steer(cache, dictionary, capsys, monkeypatch):
    loaded = placed_in_model(dictionary, None, None, None).loaded
    with run.steer(loaded, dictionary, {5: 400.0}, first_position=1):
        text = generate(loaded.model, loaded.tokenizer, "The", max_new_tokens=4).text
    base = generate(loaded.model, loaded.tokenizer, "The", max_new_tokens=4).text
    assert text != base
    shown = []
    monkeypatch.setattr("sae.cli.console.side_by_side", lambda *given: shown.append(given))
    arguments = ("--latent", "5=400", "--prompt", "The", "max_new_tokens=4")
    assert command("steer", dictionary, *arguments) == 0
    assert shown[0][1:3] == (("base", base), ("steered", text))
    loaded_alone = run.steer(loaded.model, library.load(dictionary), {5: 400.0}, hook_point=HOOK)
    with loaded_alone:
        assert generate(loaded.model, loaded.tokenizer, "The", max_new_tokens=4).text == text


def test_latents_about_words_are_those_of_steer(cache, dictionary, labels, tmp_path):
    """Labels choose the latents; the arms of the command are those of Python."""
    run.evaluate(dictionary, cache, model=False)
    records = [
        record
        for record in read_latents(labels)
        if record.status == "scored" and record.p_held_out <= 0.01
    ]
    word = next(w for record in records for w in record.words if w.isalpha())
    named = {r.latent: r for r in records if word in r.words}
    asked = {"amplify": "40x", "n_latents": 3, "controls": 2, "max_new_tokens": 4, "n_neutral": 2}
    asked |= {"explained": str(labels)}
    steered = run.steer_words(dictionary, words=[f" {word.upper()}"], **asked)
    assert {one.latent for one in steered.latents} <= set(named)
    for one in steered.latents:
        record = named[one.latent]
        assert one.worth == record.information[record.words.index(word)]
    assert [arm.arm for arm in steered.arms] == ["words", "random latents 1", "random latents 2"]
    assert all(len(arm.latents) == len(steered.latents) for arm in steered.arms)
    assert not set(steered.arms[1].latents) & {one.latent for one in steered.latents}
    given = [f"{name}={value}" for name, value in asked.items()]
    out = tmp_path / "out"
    assert command("steer", dictionary, "--word", word, *given, f"output={out}") == 0
    written = json.loads((out / "words.json").read_text())
    assert written["arms"] == as_json([arm._asdict() for arm in steered.arms])
    loaded = placed_in_model(dictionary, None, None, None).loaded
    words = {"words": [word], "amplify": "40x", "n_latents": 3, "explained": asked["explained"]}
    with pytest.raises(ValueError, match="words must be absent beside latents"):
        run.steer(loaded, dictionary, {0: "off"}, words=words)
    with run.steer(loaded, dictionary, words=words):
        text = generate(loaded.model, loaded.tokenizer, "The", max_new_tokens=4).text
    assert text == steered.arms[0].texts[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--word", "zebra", "amplify=1x"], "latents.parquet must exist, got no such file; run"),
        (["--word", "zebra", "amplify=1x", "explained=LABELS"], "words must be named by a label"),
        (["--word", "zebra"], "amplify must be given, or calibrate: one of them, got []"),
        (["--word", "zebra", "calibrate=0", "explained=LABELS"], "calibrate must be above 0"),
        (["--word", "a", "--latent", "3=off"], "--latent must be absent beside --word"),
        (
            ["--word", "a", "amplify=1x", "by=weights", "explained=LABELS"],
            "weights.json must exist",
        ),
    ],
)
def test_words_that_cannot_be_steered_cost_one_line(
    cache, dictionary, labels, capsys, given, message
):
    given = [text.replace("LABELS", str(labels)) for text in given]
    assert command("steer", dictionary, *given) in {1, 2}
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("error: ")
    assert message in printed


def test_latents_are_those_of_find(dictionary, monkeypatch):
    shown = []
    monkeypatch.setattr("sae.cli.console.table", lambda *given: shown.append(given))
    matches = run.find(dictionary, near=7, n=4)
    assert command("find", dictionary, "--near", 7, "n=4") == 0
    assert shown == [(matches.title, matches.table)]
    assert len(matches.latents) == 4
    assert 7 not in matches.latents


def test_what_is_said_is_what_inspect_and_convert_say(dictionary, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("sae.cli.console.facts", shown.append)
    assert command("inspect", dictionary) == 0
    assert shown == [run.inspect(dictionary)]
    run.convert(dictionary, tmp_path / "a", "saelens")
    assert command("convert", dictionary, tmp_path / "b", "--to", "saelens") == 0
    weights = [(tmp_path / x / "sae_weights.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]


def test_a_job_is_the_run_of_its_config(folder, cache, capsys):
    record = {
        "output": str(folder / "run"),
        "cache_path": str(folder / "run-cache"),
        "cache": cache.manifest.plan.request["config"],
        "train": {"batch": 127, "saes": {"topk": {"d_sae": 41}}},
        "evaluate": {"n_contexts": 3, "n_contexts_special": 1},
    }
    record["train"]["saes"]["topk"]["activation"] = {"kind": "topk", "k": 3}
    file = folder / "job.yaml"
    file.write_text(json.dumps(record))
    steps = []
    result = run.job(file, "evaluate", progress=lambda done, total, unit: steps.append(unit))
    assert "spliced contexts" in steps
    assert [row[0] for row in result.table.rows] == ["topk"]
    assert result.dictionaries["topk"].is_dir()
    report = folder / "run" / "evaluate" / "report.json"
    before = report.stat().st_mtime_ns
    capsys.readouterr()
    assert command("evaluate", file) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3
    assert all(cell in printed for cell in result.table.rows[0])
    assert report.stat().st_mtime_ns == before


WRONG = """
import torch
from sae import run

HOOK = "model.layers.1:out"
for field, call in [
    ("model", lambda: run.cache(3, "x.txt", HOOK, n_rows=9, out="c")),
    ("data", lambda: run.cache("m", 3, HOOK, n_rows=9, out="c")),
    ("cache", lambda: run.train(3)),
    ("cache", lambda: run.evaluate("d", 3)),
    ("dictionaries", lambda: run.evaluate(3, "c")),
    ("cache", lambda: run.explain("d", 3)),
    ("model", lambda: run.steer(3, "d", {})),
    ("dictionary", lambda: run.steer(torch.nn.Identity(), 3, {})),
    ("latents", lambda: run.steer(torch.nn.Identity(), "d", [3])),
    ("config", lambda: run.job(3)),
]:
    try:
        call()
    except TypeError as error:
        print(f"{field}: {error}")
"""


def test_a_wrong_class_is_refused_by_name():
    # In a process of its own: here the shapes' check of the tests would speak first.
    done = subprocess.run(
        [sys.executable, "-c", WRONG], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        field, _, message = line.partition(": ")
        assert re.match(f"{field} must be .*, got (int|list); ", message), line


def test_the_jobs_are_listed():
    assert set(dir(run)) >= {"cache", "train", "evaluate", "explain", "steer", "job", "compare"}
    assert all(callable(getattr(run, name)) for name in run.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        run.other  # noqa: B018

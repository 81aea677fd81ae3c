"""The whole job on pictures of shapes with a tiny random ViT, then the single commands on it."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import activations_cache
from activations_cache import CacheFormatError, capture
from activations_cache.config import ModelConfig
from activations_cache.image_rows import CachedImages
from activations_cache.images import read_images
from activations_cache.testing import synthetic_plan, write_synthetic
from activations_cache.towers import ZeroShot, load_towers
from activations_cache.vision import load_vision_model
from sae import run as sae_run
from sae.cli import main
from sae.evaluate.report import read_json
from sae.explain import read_latents
from sae.explain.config import ExplainConfig, ImageLabelConfig, WordsConfig
from sae.explain.image_summary import ExplainedImages
from sae.explain.tables import read_examples
from sae.pretrained import load as load_dictionary
from sae.run.context import model_of
from sae.steer import Edit, Patches, Steering
from tests import pairs
from tests.shapes import CLASSES, N_EACH, SIDE, packed, pictures

TOPK = {"d_sae": 67, "activation": {"kind": "topk", "k": 3}, "dead_after_tokens": 2000}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MONOSEMA_CACHE", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    import torch
    from transformers import ViTConfig, ViTModel

    path = tmp_path_factory.mktemp("shapes")
    torch.manual_seed(7)
    vit = ViTConfig(
        hidden_size=22, num_hidden_layers=3, num_attention_heads=11, intermediate_size=29,
        image_size=SIDE, patch_size=7, initializer_range=0.3,
    )  # fmt: skip
    ViTModel(vit, add_pooling_layer=False).save_pretrained(path / "vit")
    record = {
        "output": str(path / "run"),
        "cache": {
            "model": {"path": str(path / "vit"), "dtype": "float32"},
            "images": {
                "sources": [{"path": str(packed(path / "shapes.tar"))}],
                "preprocessing": {"size": SIDE, "crop": False, "mean": [0.5] * 3, "std": [0.5] * 3},
                "explain": 0.45,
                "score": 0.35,
                "hold": 0.2,
            },
            "hook_points": ["layers.1:out"],
            "n_rows": 1200,
        },
        "train": {
            "batch": 61,
            "epochs": 6,
            "precision": "fp32",
            "saes": {"topk": TOPK, "topk-frozen": {**TOPK, "frozen": "decoder"}},
        },
        "evaluate": {"n_resamples": 97},
        "explain": {
            "n_baseline": 11,
            "images": {"group_separator": "-", "permutations": 199, "top_images": 3},
        },
    }
    file = path / "shapes.yaml"
    file.write_text(json.dumps(record))
    return file


def sae(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
    return int(stop.value.code)


@pytest.fixture(scope="module")
def run(config) -> Path:
    assert sae("run", config) == 0
    return config.parent / "run"


def test_the_chain_ends_with_one_table_and_is_not_done_twice(run, config, capsys):
    assert sae("run", config) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 5
    assert not (run / "steer").exists()
    rows = ("model as it is", "mean row instead", "topk-frozen", "PCA, k=3", "neurons as topk")
    for shown in (*rows, "kNN kept", "label AUC", "beat null"):
        assert shown in out, shown
    assert "…" not in out  # no heading and no figure is cut off
    note = " ".join(out.split())
    message = (
        r"topk against topk-frozen: beat null [+-][\d.]+ points \[.*\], it (wins|loses|does not)"
    )
    assert re.search(message, note)


def test_classes_are_told_and_an_ablation_costs_them(run):
    report = read_json(run / "evaluate" / "report.json")
    downstream = report.downstream
    assert downstream.n_classes == 3
    assert downstream.spliced["as it is"].linear.value > 0.8
    assert downstream.spliced["mean"].linear.value < 0.6
    assert downstream.spliced["topk"].linear.value > downstream.spliced["mean"].linear.value
    assert set(downstream.intact) == {"as it is", "zero", "mean"}
    assert report.reconstruction["topk"].fvu < report.reconstruction["topk-frozen"].fvu


def test_latents_are_labelled_by_what_was_drawn(run):
    records = read_latents(run / "explain" / "topk" / "latents.parquet")
    sure = [r for r in records if r.status == "scored" and r.p_held_out <= 0.01]
    assert {"red-disc"} < {r.label for r in sure} <= {*CLASSES, "dark"}
    best = max((r for r in sure if r.label == "red-disc"), key=lambda r: r.auc)
    assert best.auc > 0.9
    top = read_examples(run / "explain" / "topk" / "examples.parquet", best.latent)
    assert all(context.source.startswith("red-disc/") for context in top[:3])
    assert len(top[0].activations) == 16
    summary = json.loads((run / "explain" / "topk" / "summary.json").read_text())
    assert abs(summary["control_auc"]["mean"] - 0.5) < 0.2
    assert summary["beats_null_shuffled"]["value"] <= 0.05
    assert set(summary["baselines"]) == {"random directions", "raw neurons"}


def test_the_browser_gets_pictures_and_heat_maps(run):
    browse = run / "browse"
    pictures = list((browse / "data" / "images").glob("*.jpg"))
    assert len(pictures) > 20
    assert Image.open(io.BytesIO(pictures[0].read_bytes())).size == (SIDE, SIDE)
    latents = (browse / "data" / "d0" / "latents" / "0.js").read_text()
    assert '"grid":[4,4]' in latents
    assert "red-disc/" in latents
    assert "permuted classes score as well in " in latents
    assert '"kind":"image"' in (browse / "data" / "index.js").read_text()


def test_single_commands_take_the_same_cache(run, capsys):
    dictionary, cache = run / "train" / "topk", run / "cache"
    assert sae("evaluate", dictionary, "--cache", cache) == 0
    assert "kNN" in capsys.readouterr().out
    assert sae("explain", dictionary, "images.permutations=99", "--cache", cache,
               "--out", run / "again") == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "raw neurons" in out
    assert "unlabelled" in out
    assert (run / "again" / "latents.parquet").is_file()


def one_line(capsys) -> str:
    err = capsys.readouterr().err.strip()
    assert "\n" not in err
    return err


def test_one_class_is_refused_before_anything_is_trained(config, tmp_path, capsys):
    one = packed(tmp_path / "one.tar", classes=CLASSES[:1], n=101)
    arguments = (f"cache.images.sources.0.path={one}", f"output={tmp_path / 'run'}")
    assert sae("run", config, *arguments) == 1
    assert "must be of two classes or more to be labelled, got 1 (dark-disc)" in one_line(capsys)
    assert not (tmp_path / "run" / "train").exists()
    assert sae("train", config, *arguments, "train.epochs=1") == 0


def test_pictures_that_cannot_be_read_are_counted_in_one_line(config, tmp_path, capsys):
    bad = packed(tmp_path / "bad.tar", broken=N_EACH)
    source = f"cache.images.sources.0.path={bad}"
    assert sae("run", config, source, f"output={tmp_path / 'run'}") == 1
    assert "from 0 images beside 123 that cannot be read" in one_line(capsys)


def test_a_cache_of_text_is_refused_where_pictures_are_needed(tmp_path, capsys, config, run):
    from sae.run.browse_latents import Thumbnails

    text = write_synthetic(tmp_path / "text", synthetic_plan({"a:out": 7}, n_examples=23))
    with pytest.raises(CacheFormatError, match="must be a cache of images, got one of text"):
        Thumbnails(text)
    assert sae("steer", config) == 2
    assert "cache must be of texts for `sae steer`, got images" in one_line(capsys)


def test_a_split_that_nothing_can_be_measured_on_is_refused_before_training(
    config, tmp_path, capsys
):
    rare = packed(tmp_path / "rare.tar", CLASSES[:1], n=101, once=CLASSES[1:])
    source = f"cache.images.sources.0.path={rare}"
    none_held = ("cache.images.score=0.55", "cache.images.hold=0", f"output={tmp_path / 'a'}")
    assert sae("run", config, *none_held) == 1
    assert "the split hold must hold images, got none; give it a larger" in one_line(capsys)
    assert not (tmp_path / "a" / "train").exists()
    assert sae("run", config, source, f"output={tmp_path / 'b'}") == 1
    error = one_line(capsys)
    assert re.search(r"images of the split \w+ must be of two classes or more, got dark-d", error)
    assert not (tmp_path / "b" / "train").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("explain.min_firings=7", "explain.min_firings must be absent .* of images, got 7; it is"),
        ("explain.rules.n_latents=7", "explain.rules must be absent where .* of images, got one"),
        ("evaluate.n_contexts=31", "evaluate.n_contexts must be absent where .*, got 31; it is f"),
        ("steer.dictionary=topk", "steer.dictionary must be absent where .*, got 'topk'; it is"),
    ],
)
def test_what_is_of_texts_is_refused_for_images(config, override, message, capsys):
    assert sae("run", config, override) == 2
    assert re.search(message, one_line(capsys))


def test_what_is_of_images_is_refused_for_texts(config, run, tmp_path, capsys):
    record = json.loads(config.read_text())
    record["cache"]["text"] = {"sources": [{"path": "a.txt"}]}
    del record["cache"]["images"]
    config = tmp_path / "text.yaml"
    config.write_text(json.dumps(record))
    assert sae("run", config) == 2
    assert "explain.images must be absent where the cache is of texts, got one" in one_line(capsys)
    assert sae("run", config, "evaluate.n_neighbours=3") == 2
    assert "evaluate.n_neighbours must be absent where the cache is of texts" in one_line(capsys)
    synthetic = write_synthetic(
        tmp_path / "text", synthetic_plan({"layers.1:out": 22}, n_examples=23)
    )
    code = sae("explain", run / "train" / "topk", "images.max_p=0.5", "--cache", synthetic.path)
    assert code == 1
    assert "explain.images must be absent where the cache is of texts, got one" in one_line(capsys)


@pytest.fixture(scope="module")
def tower(config) -> Path:
    return pairs.clip(config.parent / "clip", ["dark red green disc square dot"])


def test_words_of_a_text_tower_are_labels(run, tower, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("dark disc\ndark square\nred disc\ngreen dot\nred square\n")
    given = [f"images.words.tower={tower}", f"images.words.concepts={words}"]
    command = ["explain", run / "train" / "topk", "--cache", run / "cache", *given]
    assert sae(*command, "--out", tmp_path / "out", "images.words.share=0.3") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "5 words by clip dissect of" in out
    assert "over exchanged" in out
    records = read_latents(tmp_path / "out" / "latents.parquet")
    labelled = [record for record in records if record.status == "scored"]
    assert {r.label for r in labelled} <= set(words.read_text().splitlines())
    assert {r.kind for r in labelled} == {"image word"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["words"]["n_concepts"] == 5
    assert 0 < summary["words"]["modality_gap"] <= 2
    told = sae_run.explain(
        run / "train" / "topk", run / "cache", out=tmp_path / "again",
        config=ExplainConfig(images=ImageLabelConfig(
            words=WordsConfig(tower=str(tower), concepts=str(words), share=0.3))),
    )  # fmt: skip
    assert isinstance(told.labels, ExplainedImages)
    assert told.labels.summary.auc.mean == summary["auc"]["mean"]
    assert told.labels.words == summary["words"]


def test_a_run_labels_images_of_one_folder_by_words_and_shows_them(config, tower, tmp_path, capsys):
    one = packed(tmp_path / "one.tar", CLASSES[:1], n=101)
    words = tmp_path / "words.txt"
    words.write_text("dark disc\nred square\ngreen dot\n")
    record = json.loads(config.read_text())
    record["output"] = str(tmp_path / "run")
    record["cache"]["images"]["sources"] = [{"path": str(one)}]
    record["train"]["epochs"] = 1
    wrong = "explain.images.words.tower=" + record["cache"]["model"]["path"]
    record["cache"]["model"]["path"] = str(tower)  # its own patches
    record["cache"]["hook_points"] = ["encoder.layers.0:out"]
    record["explain"]["images"] = {"words": {"tower": str(tower), "concepts": str(words)}}
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(record))
    assert sae("run", file, wrong) == 1
    assert "must have a tower for texts beside that for images, got ViTModel" in one_line(capsys)
    assert not (tmp_path / "run" / "train").exists()
    assert sae("run", file) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 words by clip dissect of" in out
    assert re.search(r"topk-frozen: AUC of words less that of other latents' words [+-]\.?\d", out)
    data = (tmp_path / "run" / "browse" / "data" / "d0" / "latents" / "0.js").read_text()
    assert "permuted images score as well in " in data
    assert '"label_kind":"image word"' in data
    pictures(tmp_path)
    find = ["find", tmp_path / "run" / "train" / "topk", f"cache={tmp_path / 'run' / 'cache'}"]
    assert sae(*find, "--prompt", tmp_path / "0.png", "target=dark disc", "against=green dot",
               "baselines=[off, zero]", "n=4") == 0  # fmt: skip
    out = " ".join(capsys.readouterr().out.split())
    assert f"'dark disc' for {tmp_path / '0.png'}" in out
    assert re.search(r"row [1-4], column [1-4] .*off: \+?-?\d", out)
    assert re.search(r"ablations attribution correlates 0?\.\d+ with the effect", out)
    assert sae(*find, "--prompt", tmp_path / "0.png", "target=dark", "baselines=[mean]") == 1
    assert "baselines must be off or zero for a picture, got mean" in one_line(capsys)
    dictionary = load_dictionary(tmp_path / "run" / "train" / "topk").at("encoder.layers.0:out")
    towers = load_towers(ModelConfig(path=str(tower), dtype="float32"))
    model, pixels = ZeroShot(towers, towers.texts(["red", "dark"])), torch.zeros(2, 3, SIDE, SIDE)
    base = model(pixels).logits
    edits = [Edit(dictionary, latent=5, clamp=3.0)]
    with Steering(model, edits, positions=Patches(n_prefix=1)) as steering:
        steered = model(pixels).logits
    assert steering.counts[0].n_chosen == 2 * 16
    assert (steered - base).abs().min() > 1e-4


def test_latents_are_found_by_pictures(run, tmp_path, capsys):
    files = pictures(tmp_path)
    cache = activations_cache.open(run / "cache")
    find = ["find", run / "train" / "topk", "n=67"]
    both = [*find, "--pos", files[0], "--pos", files[1]]
    assert sae(*both, "--neg", files[2], f"cache={cache.path}") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "fire in all of 2 pictures and in none of 1" in out
    assert re.search(r"row [1-4], column [1-4]; row [1-4], column [1-4]", out)
    matches = sae_run.find(
        run / "train" / "topk", pos=tuple(map(str, files[:2])), neg=(str(files[2]),), n=67,
        cache=str(cache.path),
    )  # fmt: skip
    tower, dictionary = load_vision_model(model_of(cache)), load_dictionary(run / "train" / "topk")
    made = CachedImages(cache).preprocessing
    peaks = []
    for file in files[:3]:
        with capture(tower.model, ["layers.1:out"]) as forward:
            rows = forward(torch.from_numpy(made(Image.open(file)))[None])["layers.1:out"][0, 1:]
        peaks.append(dictionary.encode_dense(rows).amax(dim=0) > 0)
    expected = (peaks[0] & peaks[1] & ~peaks[2]).nonzero().flatten().tolist()
    assert sorted(matches.latents) == expected
    for given, message in {
        ("where=last",): "where must be absent for pictures, got 'last'",
        ("--neg", str(tmp_path / "no.png")): "a picture must be an existing file, got ",
        ("--neg", str(run / "run.yaml")): "run.yaml must be a picture, got UnidentifiedImageError",
        (): "preprocessing.mean must be given where the model comes without settings",
    }.items():
        where = [f"cache={cache.path}"] if given else []
        assert sae(*both, *given, *where) == 1
        assert message in one_line(capsys)
    prompt = ["--prompt", str(files[0]), "target=dark"]
    assert sae(*find, *prompt, f"cache={cache.path}") == 1
    assert "must have a tower for texts beside that for images, got ViTModel" in one_line(capsys)


def test_words_of_captions_are_labels(run, tmp_path, capsys):
    file = tmp_path / "captions.jsonl"
    records = read_images(activations_cache.open(run / "cache"))
    lines = [{"image": r.name, "text": f"A {str(r.label).replace('-', ' ')}!"} for r in records]
    file.write_text("\n".join(map(json.dumps, lines)))
    command = ["explain", run / "train" / "topk", "--cache", run / "cache", "--out", tmp_path / "o"]
    assert sae(*command, f"images.captions={file}") == 0
    assert "labels are 2 words of" in " ".join(capsys.readouterr().out.split())
    labelled = read_latents(tmp_path / "o" / "latents.parquet")
    told = [r for r in labelled if r.p_held_out is not None and r.p_held_out <= 0.01]
    assert {r.label for r in told} == {"red", "square"}  # most pictures are dark, most are discs
    file.write_text(json.dumps(lines[0]))
    assert sae(*command, f"images.captions={file}") == 1
    assert f"got none for {len(lines) - 1}, the first of them" in one_line(capsys)


def test_words_that_do_not_fit_are_refused_in_one_line(run, tower, tmp_path, capsys):
    words = tmp_path / "words.txt"
    command = ["explain", run / "train" / "topk", "--cache", run / "cache", "--out", tmp_path / "o"]
    for given, message in {
        f"images.words.tower={tmp_path / 'none'}": "none must be a directory, a *.gguf file",
        f"images.words.concepts={words}": f"concepts must be an existing file, got {words}",
        "images.words.method=wpmi": "images.words.method must be",
        "images.method=soft_wpmi": "method must be absent where images.words is given, got",
    }.items():
        assert sae(*command, f"images.words.tower={tower}", given) in (1, 2)
        assert message in one_line(capsys)
    words.write_text("dark disc\n" + "dark " * 12 + "\n")
    given = (f"images.words.tower={tower}", f"images.words.concepts={words}")
    assert sae(*command, *given) == 1
    assert "each text must have at most 13 tokens for" in one_line(capsys)


def test_a_vision_model_is_no_model_of_text(run, capsys):
    assert sae("steer", run / "train" / "topk", "--latent", "3=5x", "--prompt", "I") == 1
    assert "must be a language model, got vit, which has no" in one_line(capsys)


def test_a_language_model_is_not_shown_pictures(run, capsys):
    code = sae("explain", run / "train" / "topk", "autointerp.llm.model=x", "--cache",
               run / "cache", "--out", run / "llm")  # fmt: skip
    assert code == 1
    assert "explain.autointerp must be absent where the cache is of images" in one_line(capsys)

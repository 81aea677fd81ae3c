"""`sae similar`: what is read, what is refused, and that the command gives the same numbers."""

import copy
import json
import math
import shutil
from itertools import pairwise

import pytest
import torch

import activations_cache
from activations_cache.config import CacheConfig, ImagePreprocessing, ImagesConfig, ImageSource
from activations_cache.images import read_images
from activations_cache.testing import synthetic_plan, write_synthetic
from activations_cache.towers import load_towers
from monosema.checks import MonosemaError
from sae import run
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.probe_tasks import signature_of
from sae.evaluate.similarity import cka
from sae.run.spaces import FILE, PAGE, PICTURE
from tests import pairs
from tests.sae.run.test_jobs import as_json, command
from tests.shapes import SIDE, packed

FEW = {"permutations": 19, "draws": 20}


def plan(widths, **changed):
    return synthetic_plan(widths, n_examples=53, dtype="float32", **changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("similar")


@pytest.fixture(scope="module")
def cache(folder):
    return write_synthetic(folder / "two", plan({"l.0:out": 5, "l.1:out": 7}))


@pytest.fixture(scope="module")
def other(folder):
    """The same rows at one of the places, in shards of another size."""
    return write_synthetic(folder / "one", plan({"l.0:out": 5}, rows_per_shard=97))


def dictionary(n_dead=2):
    made = SparseAutoencoder(SAEConfig(d_in=5, d_sae=11 + n_dead, activation=ReLU()))
    generator = torch.Generator().manual_seed(0)
    made.enc_rows.data.copy_(torch.randn(made.enc_rows.shape, generator=generator))
    made.b_enc.data[11:] = -1e6
    return made.requires_grad_(False)


def test_the_command_gives_the_numbers_of_the_function(cache, folder, capsys):
    out = folder / "out"
    options = ("--rows", "200", "--permutations", "19", "--draws", "20", "--out", out)
    assert command("similar", cache.path, *options) == 0
    result = run.similar(cache, rows=200, **FEW)
    assert json.loads((out / FILE).read_text()) == as_json(result.record)
    assert (out / PICTURE).stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "distance correlation" in shown
    assert result.n_rows == 200
    assert list(result.spaces) == ["l.0:out", "l.1:out"]
    assert result.spaces["l.1:out"].width == 7
    assert len(result.pairs["l.0:out", "l.1:out"]) == 12
    assert list(result.pairs["l.1:out", "l.0:out"]) == ["stitching"]
    matrix = result.matrix("cka")
    assert matrix[0, 1] == matrix[1, 0] < matrix[0, 0] == 1
    there, back = result.matrix("stitching")[[0, 1], [1, 0]].tolist()
    assert there == result.pairs["l.0:out", "l.1:out"]["stitching"].value
    assert back == result.pairs["l.1:out", "l.0:out"]["stitching"].value != there
    page = (out / PAGE).read_text()
    assert "data:image/png;base64" in page
    assert "relative search" in page


def test_rows_are_paired_by_where_they_come_from(cache, tmp_path):
    """Shards of another size number rows in another way."""
    wide = write_synthetic(tmp_path / "c", plan({"l.0:out": 5, "l.1:out": 7}, rows_per_shard=97))
    assert not torch.equal(cache.rows(), wide.rows())
    targets = (f"{path}::l.0:out" for path in (cache.path, wide.path))
    result = run.similar(*targets, rows=300, measures=["procrustes"], **FEW)
    [figures] = result.pairs.values()
    assert figures["procrustes"].value == pytest.approx(1)


def test_latents_of_a_dictionary_are_compared_without_silent_ones(other):
    result = run.similar(other, dictionary(), cache=other, measures=["cka", "svcca"], **FEW)
    assert list(result.constant.values()) == [0, 2]
    assert [space.width for space in result.spaces.values()] == [5, 11]
    [figures] = result.pairs.values()
    assert 0.05 < figures["cka"].value < 1
    assert figures["cka"].p == 1 / 20


def test_one_row_of_each_example_comes_first(cache):
    result = run.similar(cache, rows=53, measures=["cka"], **FEW)
    few = run.similar(cache, rows=53, measures=["cka"], pool="example", **FEW)
    assert (result.n_rows, few.n_rows) == (53, 53)
    [[one], [mean]] = [[f["cka"].value for f in r.pairs.values()] for r in (result, few)]
    assert one != mean


def test_too_few_rows_for_canonical_correlations_are_said(cache):
    result = run.similar(cache, rows=11, measures=["svcca", "rsa"], neighbours=3, **FEW)
    assert [list(figures) for figures in result.pairs.values()] == [["rsa"]]
    [note] = result.notes
    assert note.startswith("svcca is left out for 1 pairs: canonical correlations must have more")
    assert "take more rows" in result.sections[0].table.note
    assert math.isnan(result.matrix("svcca")[0, 1])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"n_examples": 47}, "848 and 752 rows"),
        ({"seed": 1}, r"token \d+ and \d+ in row 0"),
        ({"context": 13}, "848 and 636 rows"),
    ],
)
def test_caches_of_other_rows_are_refused(cache, tmp_path, changed, problem):
    given = {"n_examples": 53, "dtype": "float32", **changed}
    different = write_synthetic(tmp_path / "c", synthetic_plan({"l.0:out": 5}, **given))
    rule = f"must hold the same rows in the same order, got {problem}; build both from the same"
    with pytest.raises(ValueError, match=rule):
        run.similar(cache, different)


def test_wrong_requests_are_one_line(cache, other, tmp_path, capsys):
    assert command("similar", other.path) == 2
    assert "there must be two sets of rows to compare, got 1" in capsys.readouterr().err
    assert command("similar", cache.path, "--measure", "ckka") == 2
    assert "measures must be among cka" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--cache must be given for a dictionary"):
        run.similar(other, dictionary())
    with pytest.raises(ValueError, match=r"must hold the hook point l\.9:out, got l\.0:out, l\.1"):
        run.similar(f"{cache.path}::l.9:out", other)


PLACES = ("model.layers.1:out", "model.layers.3:in", "model.layers.3:out")


@pytest.fixture(scope="module")
def of_model(folder, tiny_model_config, tiny_text):
    source = activations_cache.TextSource(path=str(tiny_text), document_pattern="CHAPTER")
    text = activations_cache.TextConfig(sources=(source,), context=31, hold=0.3, explain=0.4)
    return run.cache(tiny_model_config, text, list(PLACES), n_rows=701, dtype="float32",
                     out=folder / "model")  # fmt: skip


def spliced_by_hand(model, tokens, layer, stream):
    """Mean cross-entropy of the predictions behind position 0, the output of a layer replaced."""

    def replace(_module, _args, output):
        rows = output[0] if isinstance(output, tuple) else output
        new = torch.cat([rows[:, :1], stream[:, 1:]], 1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hook = model.model.layers[layer].register_forward_hook(replace)
    logits = model(tokens).logits[:, 1:-1]
    hook.remove()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()))


def test_a_stitch_through_the_model_costs_what_it_does_by_hand(of_model, tiny_model):
    """From the stream before a block into the place behind it."""
    targets = [f"{of_model.path}::{place}" for place in PLACES[1:]]
    result = run.similar(*targets, rows=5000, measures=["cka"], model=True, contexts=5, **FEW)
    [(_, _, effects)] = result.stitched
    hold = (of_model.examples.split == 2).nonzero().flatten()
    order = torch.randperm(len(hold), generator=torch.Generator().manual_seed(0))
    tokens = of_model.examples.tokens[hold[order[:5]].sort().values]
    states = tiny_model.model(tokens, output_hidden_states=True).hidden_states
    rows = of_model.rows(("explain", "score"))
    x, y = (of_model[place][rows] for place in PLACES[1:])
    one = torch.ones(len(x), 1)
    solution = torch.linalg.lstsq(torch.cat([x, one], 1).double(), y.double()).solution.float()
    base = spliced_by_hand(tiny_model.model, tokens, 0, states[1])
    assert effects.ce_base.value == pytest.approx(base, abs=1e-6)
    streams = {"stitched": states[3] @ solution[:-1] + solution[-1], "identity": states[3]}
    for name, stream in streams.items():
        by_hand = spliced_by_hand(tiny_model.model, tokens, 3, stream) - base
        assert effects.dictionaries[name].ce_increase.value == pytest.approx(by_hand, abs=2e-5)
    kl = {name: one.kl.value for name, one in effects.dictionaries.items()}
    assert kl["stitched"] < min(kl["identity"], kl["exchanged rows"], effects.mean.kl.value)


def test_places_of_two_models_are_stitched_and_a_copy_costs_nothing(
    of_model, tiny_model, tiny_model_dir, tiny_tokenizer, folder
):
    """A copy of the model at another path; a checkpoint whose first blocks are others."""
    shutil.copytree(tiny_model_dir, folder / "copy")
    moved = copy.deepcopy(tiny_model.model)
    moved.model.layers[0].mlp.down_proj.weight.data.mul_(3)
    moved.save_pretrained(folder / "moved")
    tiny_tokenizer.save_pretrained(folder / "moved")
    config = of_model.manifest.plan.request["config"]["text"]
    text = activations_cache.TextConfig(**{
        **config,
        "sources": tuple(activations_cache.TextSource(**s) for s in config["sources"]),
    })
    costs = []
    for name in ("copy", "moved"):
        model = activations_cache.ModelConfig(path=str(folder / name), dtype="float32")
        cache = run.cache(model, text, PLACES[0], n_rows=701, dtype="float32",
                          out=folder / f"cache_{name}")  # fmt: skip
        targets = [f"{one.path}::{PLACES[0]}" for one in (cache, of_model)]
        result = run.similar(*targets, rows=5000, measures=["cka"], model=True, contexts=5, **FEW)
        [(_, _, effects)] = result.stitched
        costs.append({n: one.kl.value for n, one in effects.dictionaries.items()})
    assert costs[0]["identity"] == pytest.approx(0, abs=1e-6)
    assert costs[0]["stitched"] == pytest.approx(0, abs=1e-4)
    assert 1e-3 < costs[1]["stitched"] < costs[1]["identity"]


def test_the_command_checks_and_stitches(of_model, tmp_path, capsys):
    options = ("--rows", "900", "--permutations", "19", "--draws", "20", "--out", tmp_path,
               "--measure", "procrustes", "--measure", "stitching", "--check", "--model",
               "--contexts", "3")  # fmt: skip
    assert command("similar", of_model.path, *options) == 0
    record = json.loads((tmp_path / FILE).read_text())
    result = run.similar(of_model, rows=900, measures=["procrustes", "stitching"], check=True,
                         model=True, contexts=3, **FEW)  # fmt: skip
    assert record == as_json(result.record)
    assert [(one["a"], one["b"]) for one in record["stitched"]] == list(pairwise(PLACES))
    assert set(record["checks"]) == {"procrustes", "stitching"}
    assert record["checks"]["procrustes"]["order"] > 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nats per token above the cross-entropy" in out
    assert "without the first" in out
    html = result._repr_html_()
    assert html.count("<table") == 4
    assert "data:image/png" in html


def test_what_cannot_be_stitched_into_a_model_is_one_line(of_model, cache, capsys, tmp_path):
    wrong = {
        (of_model.path, "--model", "--pool", "example"): "--model must go with --pool row",
        (cache.path, "--model"): "must go with hook points of caches of texts that record their",
        (of_model.path, "--contexts", "3"): "--contexts must come with --model, got none",
        (of_model.path, "--model", "--rows", "20"): "more training rows than model.layers.1:out",
    }
    for arguments, problem in wrong.items():
        assert command("similar", *arguments, "--measure", "cka") in (1, 2)
        err = capsys.readouterr().err
        assert problem in " ".join(err.split())
        assert "Traceback" not in err
    assert not (tmp_path / "similar").exists()


@pytest.fixture(scope="module")
def captioned(folder):
    """A cache of pictures by a small CLIP, and what was written about each."""
    words = "dark red green disc square dot"
    tower = pairs.clip(folder / "clip", [words], image_size=SIDE)
    config = CacheConfig(
        model=activations_cache.ModelConfig(path=str(tower), dtype="float32"),
        images=ImagesConfig(
            sources=(ImageSource(path=str(packed(folder / "shapes.tar"))),),
            preprocessing=ImagePreprocessing(size=SIDE, crop=False),
        ),
        hook_points=("encoder.layers.0:out",), n_rows=300,
    )  # fmt: skip
    cache = activations_cache.build(config, folder / "pictures")
    texts = [f"{w} {x}" for w in words.split() for x in words.split()]
    records = [
        {"image": record.name, "text": text}
        for record, text in zip(read_images(cache), 9 * texts, strict=False)
    ]
    captions = folder / "captions.jsonl"
    captions.write_text("\n".join(map(json.dumps, reversed(records))))
    return cache, captions, tower, [record["text"] for record in records]


def test_captions_are_paired_with_images_by_their_names(captioned, capsys):
    cache, captions, tower, texts = captioned
    target = f"{captions}::{tower}"
    result = run.similar(cache, target, pool="example", neighbours=3,
                         measures=["asif", "relative search", "cka"], **FEW)  # fmt: skip
    embedded = load_towers(activations_cache.ModelConfig(path=str(tower), dtype="float32"))
    [(names, figures)] = result.pairs.items()
    assert names[1] == "captions.jsonl::clip"
    assert 0 <= figures["asif"].chance < 0.3
    rows, n = embedded.texts(texts), result.n_rows
    assert n == len(texts)
    numbers = cache.rows()
    example = cache.refs(numbers).example
    x = cache["encoder.layers.0:out"][numbers]
    mean = torch.stack([x[example == i].mean(0) for i in range(n)])
    assert figures["cka"].value == pytest.approx(cka(mean, rows), abs=1e-6)
    assert command("similar", cache.path, target) == 2
    assert "with --pool example, got --pool row and one such" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(ValueError, match="got --pool example and no such cache"):
        run.similar(target, target.replace("::", "::./"), pool="example")
    captions.write_text(captions.read_text().splitlines()[0])
    with pytest.raises(ValueError, match=f"a record for each of {n} images, got none for {n - 1}"):
        run.similar(cache, target, pool="example")


def test_a_constant_column_is_refused(cache, other, monkeypatch):
    read = type(other["l.0:out"]).gather

    def constant(self, numbers, out):
        read(self, numbers, out)
        out[:, 3] = 2.0

    monkeypatch.setattr(type(other["l.0:out"]), "gather", constant)
    with pytest.raises(ValueError, match="must vary in every column, got 1 constant ones, the fir"):
        run.similar(cache, other, rows=50)


def test_concepts_in_the_largest_direction_of_one_place_leave_their_signature(
    cache, tmp_path, capsys
):
    """The label of a row is the side on which it lies along the largest direction of l.0:out."""
    rows = cache.rows()
    x, refs = cache["l.0:out"][rows].double(), cache.refs(rows)
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    along = ((x - x.mean(0)) @ v[0]).tolist()
    records = [
        {"example": e, "position": p, "label": "high" if size > 0 else "low"}
        for e, p, size in zip(refs.example.tolist(), refs.position.tolist(), along, strict=True)
        if abs(size) > 0.3
    ]
    file = tmp_path / "labels.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    result = run.similar(cache, rows=2000, measures=["cka"], labels=file, **FEW)
    here, there = (result.signatures[name] for name in ("l.0:out", "l.1:out"))
    assert here.n_rows == len(records) < len(rows)
    assert (here.n_concepts, here.unique, here.per_direction) == (2, 1, 2.0)
    assert there.unique == 0
    assert here.accuracy[0.9].smallest > 0.97
    assert here.accuracy[0.9].largest < here.floor + 0.1
    assert there.accuracy[0.0].smallest < here.accuracy[0.0].smallest - 0.2
    out = tmp_path / "out"
    options = ("--measure", "cka", "--labels", file, "--permutations", "19", "--draws", "20")
    assert command("similar", cache.path, *options, "--out", out) == 0
    assert (
        json.loads((out / FILE).read_text())["signatures"] == as_json(result.record)["signatures"]
    )
    assert "1 of 2" in capsys.readouterr().out
    assert "without largest" in (out / PAGE).read_text()


def test_labels_of_the_cache_and_of_examples_and_labels_that_say_nothing(cache, tmp_path, capsys):
    own = run.similar(cache, rows=300, measures=["cka"], labels="cache", **FEW).signatures
    assert {one.n_concepts for one in own.values()} == {len(cache.label_names)}
    of_examples = tmp_path / "examples.jsonl"
    lines = [{"example": n, "label": "ab"[n % 2]} for n in range(40)]
    of_examples.write_text("\n".join(map(json.dumps, lines)))
    pooled = run.similar(cache, measures=["cka"], pool="example", labels=of_examples, **FEW)
    assert {one.n_rows for one in pooled.signatures.values()} == {40}
    one = tmp_path / "one.jsonl"
    one.write_text('{"example": 0, "label": "a"}')
    assert command("similar", cache.path, "--labels", one) == 1
    error = capsys.readouterr().err
    assert "must have at least 2 labels of --labels" in error
    assert "got 1; give a file, or build the cache from labelled data" in error
    assert command("similar", cache.path, "--labels", tmp_path / "none.jsonl") == 1
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(("labelled", "got"), [(0, "got 0 there and 30"), (1, "got 2 there and 0")])
def test_labels_in_one_half_of_the_examples_are_refused_in_one_line(labelled, got):
    fitted = torch.arange(60) % 2 == 0
    concept = torch.where(fitted == bool(labelled), torch.arange(60) // 2 % 2, -1)
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MonosemaError, match=got) as e:
        signature_of(x, concept, fitted)
    assert "\n" not in str(e.value)
    assert "label more of them" in str(e.value)

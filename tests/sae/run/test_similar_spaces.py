"""`sae similar`: what is read, what is refused, and that the command gives the same numbers."""

import json
import math

import pytest
import torch

from activations_cache.testing import synthetic_plan, write_synthetic
from sae import run
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.run.spaces import FILE, PICTURE
from tests.sae.run.test_jobs import as_json, command

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
    assert len(result.pairs["l.0:out", "l.1:out"]) == 8
    matrix = result.matrix("cka")
    assert matrix[0, 1] == matrix[1, 0] < matrix[0, 0] == 1


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


def test_a_constant_column_is_refused(cache, other, monkeypatch):
    read = type(other["l.0:out"]).gather

    def constant(self, numbers):
        rows = read(self, numbers)
        rows[:, 3] = 2.0
        return rows

    monkeypatch.setattr(type(other["l.0:out"]), "gather", constant)
    with pytest.raises(ValueError, match="must vary in every column, got 1 constant ones, the fir"):
        run.similar(cache, other, rows=50)

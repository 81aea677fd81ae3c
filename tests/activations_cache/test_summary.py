"""The page about a cache: known ranks, planted massive dimensions, every row in the histogram."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from activations_cache.importing import import_array
from activations_cache.summary import (
    MassiveDimension,
    RowDataset,
    as_dataset,
    effective_rank,
    summarise,
)
from activations_cache.testing import synthetic_plan, write_synthetic


@pytest.mark.parametrize("rank", [1, 5, 13])
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int):
    made = torch.Generator().manual_seed(rank)
    left = torch.linalg.qr(torch.randn(31, rank, generator=made, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(17, rank, generator=made, dtype=torch.float64)).Q
    x = 3 * left @ right.T
    assert effective_rank(x.T @ x) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_by_its_definition():
    x = torch.randn(31, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.linalg.svdvals(x) / torch.linalg.svdvals(x).sum()
    assert effective_rank(x.T @ x) == pytest.approx(float(torch.exp(-(share * share.log()).sum())))


@pytest.fixture
def rows() -> np.ndarray:
    made = np.random.default_rng(3).standard_normal((499, 13)).astype(np.float32)
    made[:, 5] *= 41
    return made


def test_a_planted_dimension_is_found_and_every_row_counted(tmp_path: Path, rows):
    np.save(tmp_path / "rows.npy", rows)
    cache = import_array(tmp_path / "rows.npy", tmp_path / "cache", hook_point="a.b:out")
    result = summarise(cache, "a.b:out")
    training = rows[cache.rows(("explain", "score")).numpy()]
    assert result.n_sampled == len(training) == sum(result.norm_counts)
    rms = np.sqrt(np.square(training).mean(0))
    (massive,) = result.massive
    assert isinstance(massive, MassiveDimension)
    assert massive.dimension == 5
    assert massive.rms == pytest.approx(rms[5], rel=1e-5)
    assert massive.ratio == pytest.approx(rms[5] / np.median(rms), rel=1e-5)
    norms = np.linalg.norm(training, axis=1)
    assert result.norm_edges[0] <= norms.min() < norms.max() <= result.norm_edges[-1] * (1 + 1e-6)
    mean = training.mean(0)
    assert result.mean_share == pytest.approx(
        np.square(mean).sum() / np.square(training).sum(1).mean(), rel=1e-4
    )


def test_rows_of_zeros_have_a_page(tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.zeros((23, 5), np.float32))
    cache = import_array(tmp_path / "rows.npy", tmp_path / "cache")
    result = summarise(cache, "embedding:out")
    assert result.norm_counts == (result.n_sampled,)
    assert result.massive == ()


def test_a_dataloader_of_torch_gives_each_row_once(tmp_path):
    """With workers, shuffled by torch; a batch is read at once."""
    plan = synthetic_plan({"a:out": 5, "b:out": 3}, n_examples=23)
    cache = write_synthetic(tmp_path / "cache", plan)
    view = RowDataset(cache, ("b:out", "a:out"), splits=("explain", "score"))
    loader = DataLoader(view, batch_size=7, shuffle=True, num_workers=2)
    found = torch.cat([*loader])
    rows = cache.rows(("explain", "score"))
    expected = torch.cat([cache["b:out"][rows], cache["a:out"][rows]], dim=1)
    assert view[3].equal(expected[3])
    assert not found.equal(expected)
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_a_cache_is_a_dataset_of_hugging_face(tmp_path):
    cache = write_synthetic(tmp_path / "cache", synthetic_plan({"a:out": 5}, n_examples=23))
    view = as_dataset(cache, splits=("score",))
    rows = cache.rows(("score",))
    assert len(view) == len(rows)
    refs, some = cache.refs(rows), view[3:6]
    assert torch.tensor(some["a:out"]).equal(cache["a:out"][rows[3:6]])
    for name in ("example", "position", "token"):
        assert some[name] == getattr(refs, name)[3:6].tolist()
    numbers = cache.token_labels(rows)[3:6].tolist()
    assert some["label"] == [cache.label_names[n] if n >= 0 else None for n in numbers]
    assert set(view[:]["split"]) == {"score"}
    kept = view.filter(lambda row: row["position"] == 2, load_from_cache_file=False)
    assert {int(p) for p in kept[:]["position"]} == {2}

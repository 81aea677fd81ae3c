"""Nearest directions, and what descends from what across widths."""

import pytest
import torch

from sae.neighbours import nearest, splitting


def clusters(n: int = 13, size: int = 5, d: int = 31, noise: float = 0.1) -> torch.Tensor:
    made = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(n, d, generator=made), dim=1)
    rows = centres.repeat_interleave(size, 0)
    return rows + noise * torch.randn(rows.shape, generator=made) / d**0.5


def test_neighbours_of_planted_clusters_are_their_cluster(monkeypatch):
    rows = clusters() * torch.rand(65, 1) * 7 + 0
    result = nearest(rows, rows, 4, excluded=torch.arange(65))
    assert (result.latent // 5 == torch.arange(65)[:, None] // 5).all()
    assert (result.latent != torch.arange(65)[:, None]).all()
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert result.cosine[:, 0] == pytest.approx(
        ((unit @ unit.T) - 2 * torch.eye(65)).amax(1).tolist(), abs=1e-5
    )
    monkeypatch.setattr("sae.neighbours._CELLS", 65 * 7)  # chunks of 7
    chunked = nearest(rows, rows, 4, excluded=torch.arange(65))
    assert (chunked.latent == result.latent).all()
    with pytest.raises(ValueError, match="k must lie between 1 and 64, got 65"):
        nearest(rows, rows, 65, excluded=torch.arange(65))
    with pytest.raises(ValueError, match="rows must be as wide as among, 31, got 30"):
        nearest(rows[:, 1:], rows, 1)


def test_children_have_their_planted_parent_and_new_concepts_none():
    narrow = torch.nn.functional.normalize(clusters(size=1, noise=0.0), dim=1)
    made = torch.Generator().manual_seed(1)
    new = torch.randn(3, 31, generator=made)
    new -= new @ torch.linalg.pinv(narrow) @ narrow  # orthogonal to all parents
    wide = torch.cat([clusters(size=2), new])
    result = splitting(narrow, wide)
    assert result.parent[:26].tolist() == [i // 2 for i in range(26)]
    assert result.n_children.tolist() == [2] * 13
    assert result.parent[26:].tolist() == [-1] * 3
    assert result.novel == 3 / len(wide)
    assert result.split == 1.0

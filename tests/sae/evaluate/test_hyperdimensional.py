"""The hyperdimensional probe: its algebra, planted roles, and the tokens of a model's stream."""

import pytest
import torch

import activations_cache
from activations_cache.manifest import Plan
from activations_cache.reader import open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.writer import CacheWriter
from sae.evaluate.hyperdimensional import (
    Codebook,
    ProbeFit,
    hyperdimensional_probe,
    text_roles,
)
from sae.evaluate.probe_tasks import RowLabels

POINTS = ("h.0:out", "h.1:out", "h.2:out")
N, CONTEXT, WIDTH = 211, 13, 23
SMALL = ProbeFit(width=256, steps=150)


def made(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_unbinding_undoes_binding_and_recall_falls_with_the_load():
    book = Codebook.draw([7, 7, 7], 512, made(0))
    assert all(torch.equal(one.abs(), torch.ones_like(one)) for one in (book.roles, *book.fillers))
    filler = torch.randint(7, (101, 3), generator=made(1))
    assert torch.equal(book.unbind(book.bundle(filler)), filler)
    pair = Codebook(book.roles[:1], book.fillers[:1])
    assert torch.equal(pair.bundle(filler[:, :1]) * book.roles[0], book.fillers[0][filler[:, 0]])
    many = Codebook.draw([7] * 101, 128, made(2))
    load = torch.randint(7, (53, 101), generator=made(3))
    share = float((many.unbind(many.bundle(load)) == load).float().mean())
    assert 0.15 < share < 0.6


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Streams that hold the colour and the shape at each place; the last layer is another one."""
    colour = torch.randint(5, (N, CONTEXT), generator=made(4))
    shape = torch.randint(3, (N, CONTEXT), generator=made(5))
    directions = torch.randn(8, WIDTH, generator=made(6))
    stream = directions[colour] + directions[5 + shape]
    stream = stream + 0.3 * torch.randn(stream.shape, generator=made(7))
    noise = torch.randn(2, *stream.shape, generator=made(8))
    layers = (stream, 2 * stream + 0.1 * noise[0], noise[1])
    streams = dict(zip(POINTS, layers, strict=True))
    none = torch.zeros(N, dtype=torch.int64)
    tokens = torch.arange(N * CONTEXT).reshape(N, CONTEXT)
    examples = Examples(tokens, torch.arange(N) % 5 % 3, none, ("made",))
    plan = Plan(
        made_from={"model": "tiny"}, hook_points=dict.fromkeys(POINTS, WIDTH), dtype="float32",
        context=CONTEXT, skip_positions=0, rows_per_shard=997, n_examples=N,
        source_names=("made",),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("planted")
    with CacheWriter(path, plan) as writer:
        for shard in writer.claims():
            buffer, numbers = ShardBuffer(plan, shard, examples), plan.examples_of(shard)
            rows = {p: s[numbers.start : numbers.stop] for p, s in streams.items()}
            buffer.add(numbers, rows)
            writer.commit(buffer)
        writer.finish({})
    colour[3] = -1  # rows without a role are left out
    names = tuple("abcde"), tuple("xyz")
    return open_cache(path), {
        "colour": RowLabels(names[0], colour), "shape": RowLabels(names[1], shape)
    }  # fmt: skip


def test_planted_roles_are_told_and_exchanged_bundles_teach_nothing(planted):
    cache, roles = planted
    result = hyperdimensional_probe(cache, POINTS[:2], roles, SMALL)
    assert list(result.roles) == ["colour", "shape"]
    for name, one in result.roles.items():
        assert one.recall.value > 0.95, name
        assert one.recall.low <= one.recall.value <= one.recall.high
        assert one.linear > 0.95
        assert one.ceiling == 1.0
        assert one.control == pytest.approx(1 / one.n_fillers, abs=0.15)
        assert one.floor == pytest.approx(1 / one.n_fillers, abs=0.1)
    n_rows = sum(len(cache.rows((split,))) for split in ("score", "hold"))
    assert result.n_test == min(n_rows, SMALL.n_rows // 4)
    assert hyperdimensional_probe(cache, POINTS[:2], roles, SMALL) == result


def test_layers_that_are_alike_make_a_cluster(planted):
    cache, roles = planted
    config = ProbeFit(width=128, steps=1)
    result = hyperdimensional_probe(cache, POINTS, roles, config)
    assert sorted(result.clusters, key=len) == [POINTS[2:], POINTS[:2]]


def test_the_stream_of_a_model_holds_its_token(tiny_cache_config, tmp_path):
    cache = activations_cache.build(tiny_cache_config, tmp_path / "cache")
    roles = text_roles(cache, n_fillers=11)
    assert list(roles)[:2] == ["token", "token before"]
    refs = cache.refs(cache.rows(("explain",)))
    counts = refs.token.bincount()
    assert roles["token"].names == tuple(
        map(str, counts.argsort(descending=True, stable=True)[:11].tolist())
    )
    before = roles["token before"].label
    tokens = cache.examples.tokens
    number = {int(name): i for i, name in enumerate(roles["token before"].names)}
    assert before[2, 5] == number.get(int(tokens[2, 4]), -1)
    assert (before[:, 0] == -1).all()
    every = text_roles(cache, n_fillers=60)
    used = {name: every[name] for name in ("token", "token before")}
    result = hyperdimensional_probe(cache, cache.hook_points, used, SMALL)
    assert result.roles["token"].recall.low > 2 * result.roles["token"].floor


@pytest.mark.parametrize(
    ("points", "change", "message"),
    [
        ((), {}, r"hook_points must be some of one width, beside roles, got \[\] and 2 roles"),
        (POINTS[:1], None, "beside roles, got .* and 0 roles"),
        (("h.9:out",), {}, "must hold the hook point h.9:out"),
        (POINTS[:1], {"colour": -1}, "256 rows of explain must have all of colour, shape, got 0"),
    ],
)
def test_what_cannot_be_probed_costs_one_line(planted, points, change, message):
    cache, roles = planted
    given = {} if change is None else dict(roles)
    for name in change or ():
        given[name] = RowLabels(roles[name].names, torch.full((N, CONTEXT), -1))
    with pytest.raises(ValueError, match=message) as error:
        hyperdimensional_probe(cache, points, given, SMALL)
    assert "\n" not in str(error.value)

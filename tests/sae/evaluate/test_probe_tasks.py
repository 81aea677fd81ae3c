import json

import numpy as np
import pytest
import torch

from activations_cache.manifest import Plan
from activations_cache.reader import open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.writer import CacheWriter
from sae.evaluate.probe_tasks import (
    check_hook_point,
    common_labels,
    labels_of,
    read_labels,
    task_of,
)

NAMES = ("noun.animal", "noun.plant", "verb.motion", "verb.rare")
HOOK = "h.0:out"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """60 examples of 7 tokens; example i has label i % 3, a few tokens none; 3 is never there."""
    split = torch.arange(60) % 5 % 3  # explain, score, hold
    tokens = torch.arange(60 * 7).reshape(60, 7)
    label = (torch.arange(60) % 3)[:, None].repeat(1, 7)
    label[:, 2] = -1
    examples = Examples(
        tokens, split, torch.zeros(60, dtype=torch.int64), ("glosses",), label, NAMES
    )
    plan = Plan(
        made_from={"model": "tiny"}, hook_points={HOOK: 3}, dtype="float32", context=7,
        skip_positions=1, rows_per_shard=101, n_examples=60, source_names=("glosses",),
        label_names=NAMES,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("labelled")
    with CacheWriter(path, plan) as writer:
        for shard in writer.claims():
            buffer = ShardBuffer(plan, shard, examples)
            numbers = plan.examples_of(shard)
            rows = tokens[numbers.start : numbers.stop, :, None].float().expand(-1, -1, 3)
            buffer.add(numbers, {HOOK: rows})
            writer.commit(buffer)
        writer.finish({})
    return open_cache(path)


def test_a_task_is_balanced_and_its_sides_share_no_document(labelled):
    task = task_of(labelled, HOOK, "noun.plant", n_train=40, n_test=10_000)
    assert len(task.train_y) == 40
    for x, y in ((task.train_x, task.train_y), (task.test_x, task.test_y)):
        assert y.mean() == 0.5
        example = (x[:, 0].long() // 7).numpy()
        assert np.array_equal(example % 3 == 1, y)
        assert not bool((x[:, 0].long() % 7 == 2).any())  # tokens without a label
    train, test = (set((x[:, 0].long() // 7).tolist()) for x in (task.train_x, task.test_x))
    assert train & test == set()
    assert np.array_equal(task.test_group, (task.test_x[:, 0].long() // 7).numpy())


def test_the_seed_chooses_the_rows(labelled):
    first, again = (task_of(labelled, HOOK, NAMES[0], n_train=20).train_x for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, task_of(labelled, HOOK, NAMES[0], n_train=20, seed=1).train_x)


def test_labels_with_rows_on_both_sides_are_the_common_ones(labelled):
    assert set(common_labels(labelled)) == set(NAMES[:3])
    with pytest.raises(ValueError, match=r"two labels with 500 rows in explain.*got 0; build"):
        common_labels(labelled, 500)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("noun.anmal", "label must be one of those of .*, got 'noun.anmal' of noun.animal, noun"),
        ("verb.rare", "'verb.rare' in the split explain must have both classes, got 0 positive"),
    ],
)
def test_labels_that_are_not_there_are_refused(labelled, label, message):
    with pytest.raises(ValueError, match=message):
        task_of(labelled, HOOK, label)


def test_caches_of_other_places_and_without_labels_are_refused(labelled, cache, hook_point):
    with pytest.raises(ValueError, match=r"must hold the hook point h\.1:out, got h\.0:out; build"):
        check_hook_point(labelled, "h.1:out")
    with pytest.raises(ValueError, match=r"got 'x' of none; build a cache from labelled data"):
        task_of(cache, hook_point, "x")
    with pytest.raises(ValueError, match="must have two labels"):
        common_labels(cache)


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_labels_of_a_file_stand_in_the_place_of_the_cache_s(labelled, tmp_path):
    """Even examples, and one token of an odd one, which stands above its example's label."""
    records = [{"example": i, "label": ["even", "odd"][i % 2], "page": 3} for i in range(60)]
    records.insert(0, {"example": 5, "position": 4, "label": "even"})
    labels = read_labels(lines(tmp_path / "labels.jsonl", *records), labelled)
    assert set(labels.names) == {"even", "odd"}
    even = labels.names.index("even")
    assert (labels.label[5] == even).nonzero().flatten().tolist() == [4]
    assert set(common_labels(labelled, labels=labels)) == {"odd", "even"}
    task = task_of(labelled, HOOK, "even", labels=labels, n_train=10_000, n_test=10_000)
    tokens = task.train_x[:, 0].long()
    assert np.array_equal(task.train_y, ((tokens // 7 % 2 == 0) | (tokens == 39)).numpy())
    assert np.array_equal(task.types[0], tokens.numpy())


def test_the_cache_s_own_labels_are_those_of_its_tokens(labelled):
    rows = labelled.rows()
    assert torch.equal(labels_of(labelled).of(labelled, rows), labelled.token_labels(rows).long())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("example,label", "must be such as"),
        ("[3]", "must be such as"),
        ('{"example": "x", "label": "a"}', "must be such as"),
        ('{"example": 60, "label": "a"}', "must name an example below 60 and a position below 7"),
        ('{"example": 3, "position": 7, "label": "a"}', "got 3 and 7"),
        ('{"example": 3, "position": "1", "label": "a"}', "got 3 and 1"),
        ('{"example": -1, "label": "a"}', "got -1 and None"),
        ("\xff\x00", "must be such as"),
    ],
)
def test_a_wrong_line_of_labels_is_named(labelled, tmp_path, text, message):
    path = tmp_path / "labels.jsonl"
    path.write_text('{"example": 1, "label": "fine"}\n' + text)
    with pytest.raises(ValueError, match=message) as error:
        read_labels(path, labelled)
    assert str(error.value).startswith(f"{path}:2 ")
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(labelled, tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be JSON lines in UTF-8"):
        read_labels(tmp_path / "x", labelled)

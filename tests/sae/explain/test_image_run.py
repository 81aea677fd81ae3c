"""Labels of image latents: planted classes come back, knowing nothing scores as chance does."""

import dataclasses
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from sae.explain.config import ExplainConfig, ImageLabelConfig, WordsConfig
from sae.explain.image_labels import concepts_of
from sae.explain.image_run import Captions, ImageUnits, ImageWords
from sae.explain.image_run import by_words as made_by_words
from sae.explain.image_summary import aucs, held_out, with_interval
from sae.explain.run import explain
from sae.explain.tables import EXAMPLES, LATENTS, SUMMARY, read_examples, read_latents
from sae.statistics import auc

HOOK = "encoder.layer.1:out"
CONFIG = ExplainConfig(
    n_baseline=7, images=ImageLabelConfig(group_separator="-", permutations=199, top_images=3)
)


@pytest.fixture
def explained(image_cache, identity_dictionary, tmp_path):
    def run(config=CONFIG, **options):
        cache = image_cache(**options)
        names = [f"{n}.jpg" for n in range(len(cache.split))]
        dictionary = identity_dictionary(cache.acts.shape[2])
        result = explain(dictionary, ImageUnits(cache, HOOK, config, names, 6), tmp_path)
        return cache, result, read_latents(tmp_path / LATENTS)

    return run


def test_planted_classes_and_groups_are_the_labels(explained):
    cache, result, records = explained()
    assert [r.label for r in records[:6]] == [*cache.label_names, "animals"]
    assert [r.kind for r in records[:6]] == ["class"] * 5 + ["group"]
    assert [r.status for r in records[:8]] == ["scored"] * 6 + ["insufficient", "dead"]
    for record in records[:6]:
        assert record.auc > 0.75
        assert record.low < record.auc <= record.high
        assert record.p_held_out == pytest.approx(1 / 200)
        assert record.curve[-1] == 1.0
        assert record.npmi[0] > 0.4
    summary = result.summary
    counts = (summary.n_scored, summary.n_unlabelled, summary.n_insufficient, summary.n_dead)
    assert sum(counts) == summary.n_latents == 39
    assert summary.best_of_class.mean > 0.75
    assert summary.by_method["soft_wpmi"]["n_scored"] == summary.n_scored + summary.n_unlabelled


def test_latents_that_know_nothing_are_not_labelled_and_get_chance(explained):
    open_minded = dataclasses.replace(CONFIG.images, max_p=1.0)
    config = dataclasses.replace(CONFIG, images=open_minded)
    _, result, records = explained(config, n_random=211)
    unlabelled = [r for r in explained(CONFIG, n_random=211)[2][8:] if r.status == "unlabelled"]
    assert len(unlabelled) >= 190
    assert all(r.label == "" and r.auc is None for r in unlabelled)
    noise = [r.auc for r in records[8:]]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.015)
    assert np.mean([r.p_held_out <= 0.01 for r in records[8:]]) <= 0.03
    assert result.summary.control_auc.mean == pytest.approx(0.5, abs=0.03)
    assert result.summary.beats_null_shuffled.value <= 0.03
    assert set(result.baselines) == {"random directions", "raw neurons"}
    assert all(arm.n_latents == 7 for arm in result.baselines.values())


def test_soft_wpmi_labels_by_classes_alone(explained):
    images = dataclasses.replace(CONFIG.images, method="soft_wpmi")
    cache, _, records = explained(dataclasses.replace(CONFIG, images=images))
    assert [r.label for r in records[:5]] == list(cache.label_names)
    assert records[5].label in cache.label_names[:2]


def words_for(cache, known=True, noise=0.3) -> ImageWords:
    """A word for each class and six that say nothing; images lie near the word of their class."""
    made = torch.Generator().manual_seed(3)
    names = (*(cache.label_names if known else [f"it is {n}" for n in range(5)]), *"uvwxyz")
    near = torch.eye(11)[cache.label] + noise * torch.randn(len(cache.label), 11, generator=made)
    unit = torch.nn.functional.normalize
    gap = 0.5 * torch.ones(11)  # between the two kinds of embeddings
    return ImageWords(
        names, unit(torch.eye(11) - gap, dim=1), unit(near, dim=1), {"tower": "planted"}
    )


def by_words(method: Any = "clip_dissect", **options) -> ExplainConfig:
    words = WordsConfig(tower="planted", method=method, share=0.2, **options)
    images = ImageLabelConfig(words=words, permutations=199, top_images=3)
    return dataclasses.replace(CONFIG, images=images)


@pytest.mark.parametrize("method", ["clip_dissect", "text_direction", "splice"])
def test_planted_words_are_the_labels_and_exchanged_ones_are_not(
    image_cache, identity_dictionary, tmp_path, method
):
    cache = image_cache()
    config = by_words(method, penalty=0.1)
    pictures = ImageUnits(cache, HOOK, config, [""] * 499, 6, words_for(cache))
    result = explain(identity_dictionary(39), pictures, tmp_path)
    records, summary = read_latents(tmp_path / LATENTS), result.summary
    assert [r.label for r in records[:5]] == list(cache.label_names)
    assert {r.kind for r in records[:5]} == {"image word"}
    assert records[5].label in cache.label_names[:2]
    assert [r.status for r in records[6:8]] == ["insufficient", "dead"]
    for record in records[:5]:
        assert record.words[0] == record.label
        assert record.auc is not None
        assert record.auc > 0.7
        assert record.p_held_out == pytest.approx(1 / 200)
    assert set(summary.by_method) == {"clip_dissect", "text_direction", method}
    assert summary.by_folders.mean > 0.5
    assert summary.control_auc.mean == pytest.approx(0.5, abs=0.06)
    assert summary.over_exchanged.mean == pytest.approx(summary.auc.mean - summary.control_auc.mean)
    assert summary.over_exchanged.low > 0
    assert summary.by_folders_over_exchanged.low > 0
    assert set(result.baselines) == {"random directions", "raw neurons"}
    written = json.loads((tmp_path / SUMMARY).read_text())
    assert written["words"] == {"tower": "planted", "n_concepts": 11}


def test_words_need_no_classes_and_nothing_planted_is_chance(image_cache, identity_dictionary):
    cache = image_cache(997, n_random=101)
    words = words_for(cache, known=False)
    cache.label[:] = -1
    pictures = ImageUnits(cache, HOOK, by_words(), [""] * 997, 6, words)
    result = explain(identity_dictionary(109), pictures, None).summary
    assert result.n_images_explain == int((cache.split == 0).sum())
    assert np.isnan(result.by_folders.mean)
    assert result.over_exchanged.low > 0
    noise = dataclasses.replace(pictures, words=words._replace(images=words.images.roll(7, dims=0)))
    chance = explain(identity_dictionary(109), noise, None).summary
    assert chance.auc.mean == pytest.approx(0.5, abs=0.012)
    assert chance.over_exchanged.low < 0 < chance.over_exchanged.high
    assert chance.beats_null_shuffled.value <= 0.05


def test_words_of_captions_are_the_labels(image_cache, identity_dictionary, tmp_path):
    cache = image_cache()
    what = [f"Number {i}, {cache.label_names[n]}." for i, n in enumerate(cache.label.tolist())]
    cache.label[:] = -1
    images = ImageLabelConfig(captions="captions.jsonl", permutations=199)
    config = dataclasses.replace(CONFIG, images=images)
    captions = Captions(what, {"captions": "captions.jsonl"})
    pictures = ImageUnits(cache, HOOK, config, [""] * 499, 6, captions)
    result = explain(identity_dictionary(39), pictures, tmp_path)
    records = read_latents(tmp_path / LATENTS)
    assert [r.label for r in records[:6]] == ["birds", "bugs", "cakes", "fruit", "stars", "animals"]
    assert {r.kind for r in records[:6]} == {"image word"}
    assert result.summary.over_exchanged.low > 0
    # "number" is in all captions and tells nothing, 1 to 498 are in too few
    assert result.words == {"captions": "captions.jsonl", "n_concepts": 7}
    nothing = dataclasses.replace(pictures, words=Captions(["one", "two"] + [""] * 497, {}))
    with pytest.raises(ValueError, match=r"two words that 5 to 132 of the images .*, got 0; write"):
        explain(identity_dictionary(39), nothing, None)
    with pytest.raises(ValueError, match=r"must be absent where images\.captions is given"):
        ImageLabelConfig(captions="a", group_separator="-")


def test_exchanged_images_take_their_words_along(image_cache):
    """What chance gives: in each split images keep their words, and lose their latents."""
    cache = image_cache(211)
    numbers = tuple((cache.split == split).nonzero().flatten().numpy() for split in (0, 1))
    folders = (cache.label[numbers[1]].numpy(), cache.label_names)
    said = made_by_words(words_for(cache), numbers, folders, by_words().images, 3)
    assert said.folders is not None
    assert (said.folders[:, :5] == (folders[0][:, None] == np.arange(5))).all()
    assert not said.folders[:, 5:].any()
    assert (said.has[0].sum(axis=0) == round(0.2 * len(numbers[0]))).all()
    other = said.exchanged(np.random.default_rng(0))
    order = [int((said.images == row).all(dim=1).nonzero()) for row in other.images]
    assert sorted(order) == list(range(len(order)))
    assert order != sorted(order)
    assert (other.has[0] == said.has[0][order]).all()


def test_pictures_are_the_strongest_with_their_patches(explained, tmp_path):
    cache, _, records = explained()
    latent = 2
    top = read_examples(tmp_path / EXAMPLES, latent)
    peaks = cache.acts[:, :, latent].amax(1)
    peaks[cache.split == 2] = 0  # held out
    order = peaks.argsort(descending=True, stable=True)[:3].tolist()
    assert [c.example for c in top[:3]] == order
    for context in top:
        assert context.tokens == ()
        assert context.activations == pytest.approx(
            cache.acts[context.example, 1:, latent].tolist()
        )
        assert context.peak == int(np.argmax(context.activations))
        assert context.source == f"{context.example}.jpg"
    fifths = [int(np.ceil(5 * c.activation / top[0].activation)) for c in top[3:]]
    assert fifths == sorted(fifths, reverse=True)
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert summary["auc"]["mean"] == pytest.approx(np.mean([r.auc for r in records if r.auc]))
    assert summary["n_rows_explain"] == 7 * int((cache.split == 0).sum())


def test_scores_are_those_of_the_definition_and_the_interval_is_over_images():
    made = np.random.default_rng(0)
    peaks = made.integers(0, 4, (101, 5)).astype(np.float32)
    has = np.stack([made.random(101) < 0.3, made.random(101) < 0.5], axis=1)
    concept = np.array([0, 1, 1, -1, 0])
    result = held_out(peaks, has, concept, 99, made)
    for latent, which in enumerate(concept):
        if which < 0:
            assert np.isnan(result.auc[latent])
            continue
        expected = auc(
            peaks[has[:, which], latent].astype(float), peaks[~has[:, which], latent].astype(float)
        )
        assert result.auc[latent] == pytest.approx(expected.value)
        assert aucs(peaks, has)[latent, which] == pytest.approx(expected.value)
    assert result.influence.sum() == pytest.approx(0, abs=1e-9)
    bootstrapped = []
    for _ in range(300):
        pick = made.integers(0, 101, 101)
        bootstrapped.append(np.nanmean(held_out(peaks[pick], has[pick], concept, 1, made).auc))
    half = (result.mean.high - result.mean.low) / 2
    assert half == pytest.approx(1.96 * np.std(bootstrapped), rel=0.2)
    assert with_interval(0.0, result.influence - result.influence).high == 0.0


def test_the_null_has_its_level():
    """Labels that say nothing beat it at 5 % about 5 times in 100."""
    made = np.random.default_rng(1)
    peaks = np.maximum(made.standard_normal((83, 2000)), 0).astype(np.float32)
    has = (made.random((83, 1)) < 0.2).repeat(2, axis=1)
    result = held_out(peaks, has, np.zeros(2000, np.int64), 199, made)
    assert 0.03 < result.beats(0.05).mean() < 0.07


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("birds",), r"images must be of two classes or more to be labelled, got 1 \(birds\); put"),
        ((), "images must be of two classes or more to be labelled, got none; put"),
    ],
)
def test_one_class_is_refused(image_cache, identity_dictionary, names, message):
    cache = image_cache(101)
    cache.label_names = names
    pictures = ImageUnits(cache, HOOK, CONFIG, [""] * 101, 6)
    with pytest.raises(ValueError, match=message):
        explain(identity_dictionary(39), pictures, None)


def test_groups_are_shared_beginnings():
    result = concepts_of(("a-x", "a-y", "b-x", "c"), "-")
    assert result.names == ("a-x", "a-y", "b-x", "c", "a")
    assert result.has(np.array([1, 3])).tolist() == [
        [False, True, False, False, True],
        [False, False, False, True, False],
    ]
    assert concepts_of(("a-x", "a-y"), "-").names == ("a-x", "a-y")
    assert concepts_of(("a-x", "a-y", "b"), None).names == ("a-x", "a-y", "b")


def test_images_without_a_class_are_left_out(image_cache, identity_dictionary):
    cache = image_cache(301)
    cache.label[::3] = -1
    result = explain(identity_dictionary(39), ImageUnits(cache, HOOK, CONFIG, [""] * 301, 6), None)
    labelled = cache.label >= 0
    assert result.summary.n_images_explain == int((labelled & (cache.split == 0)).sum())
    cache.label[torch.isin(cache.split, torch.tensor([1]))] = -1
    pictures = ImageUnits(cache, HOOK, CONFIG, [""] * 301, 6)
    with pytest.raises(ValueError, match="split 'score' must have images with a class, got none"):
        explain(identity_dictionary(39), pictures, None)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("min_images", 1, "min_images must be at least 2, got 1"),
        ("permutations", 98, "permutations must be at least 99"),
        ("max_p", 0.0, "max_p must lie above 0"),
        ("group_separator", "", "group_separator must not be empty"),
        ("words", {"tower": ""}, "tower must not be empty"),
        ("words", {"share": 0.6}, "share must lie above 0 and be at most 0.5, got"),
        ("words", {"penalty": 0.0}, "penalty must be a positive number"),
        ("words", {"templates": ("a photo",)}, "templates must be texts with one {}"),
    ],
)
def test_wrong_settings_are_named(field, value, rule):
    config = ImageLabelConfig
    if field == "words":
        config, (field, value) = partial(WordsConfig, tower="t"), next(iter(value.items()))
    with pytest.raises(ValueError, match=rule):
        config(**{field: value})


@pytest.mark.parametrize(
    "unread",
    [{"method": "soft_wpmi"}, {"group_separator": "-"}, {"max_p": 0.01}, {"captions": "a"}],
)
def test_what_is_of_classes_is_refused_beside_words(unread):
    rule = rf"{next(iter(unread))} must be absent where images\.words is given, got"
    with pytest.raises(ValueError, match=rule):
        ImageLabelConfig(words=WordsConfig(tower="t"), **unread)

"""One pass keeps what brute force would: counts, strata with probabilities, true negatives."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.explain.assemble import Assembler
from sae.explain.collect import collect, read_windows, write_windows
from sae.explain.config import WindowConfig
from sae.explain.reservoir import Reservoir, WindowRows, half_octave

HOOK = "model.layers.3:out"
WIDTH = 7
CONFIG = WindowConfig(
    tokens=WIDTH, n_top=3, n_steps=4, per_step=3, n_negatives=5, pool=211, rows_per_chunk=503,
    n_neighbours=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def result(planted, identity_dictionary):
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    state = collect(dictionary, planted.cache, HOOK, CONFIG)
    return state, Assembler(state, planted.cache.examples.tokens.numpy(), planted.strings)


def peaks_of(cache, latent: int) -> np.ndarray:
    """Largest activation of every window, (example, window); position 0 gives no row."""
    acts = cache.acts[..., latent].clone()
    acts[:, 0] = 0
    pad = -acts.shape[1] % WIDTH
    acts = torch.nn.functional.pad(acts, (0, pad)).clamp_min(0)
    return acts.unflatten(1, (-1, WIDTH)).amax(2).numpy()


def test_counts_are_those_of_brute_force(planted, result):
    state, assembler = result
    seen = planted.cache.split < 2
    acts = planted.cache.acts[seen][:, 1:].clamp_min(0)
    assert (state.counts["n_fired"] == (acts > 0).sum((0, 1)).numpy()).all()
    assert (state.counts["n_examples"] == (acts > 0).any(1).sum(0).numpy()).all()
    assert state.counts["max_activation"] == pytest.approx(acts.amax((0, 1)).numpy())
    assert (state.counts["histogram"].sum(1) == state.counts["n_fired"]).all()
    assert state.n_done == acts.shape[0] * acts.shape[1]
    windows = (peaks_of(planted.cache, 3)[planted.cache.split == 1] > 0).sum()
    assert state.counts["n_windows"][3, 1].sum() == windows
    density = assembler.density(3)
    share = (acts[..., 3] > 0).double().mean(1)
    error = float(share.std() / math.sqrt(len(share)))
    assert density.value == pytest.approx(float(share.mean()))
    assert density.high - density.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_top_windows_are_the_largest(planted, result):
    _, assembler = result
    for latent in (0, 5, planted.rare):
        peaks = peaks_of(planted.cache, latent)
        for split, windows in enumerate((assembler.of(latent).explain, assembler.of(latent).score)):
            top = [w.peak for w in windows if w.source == "active" and w.inclusion == 1.0][:3]
            best = np.sort(peaks[planted.cache.split == split].ravel())[::-1][:3]
            assert top == pytest.approx([p for p in best.tolist() if p > 0], rel=1e-3)


def test_every_window_shows_what_the_latent_does_there(planted, result):
    _, assembler = result
    for latent in range(planted.n_topics + 3):
        known = assembler.of(latent)
        for window in known.explain + known.score:
            part = slice(window.start, window.start + WIDTH)
            acts = planted.cache.acts[window.example, part, latent].clone()
            acts[0] = acts[0] if window.start else 0.0
            assert window.activations == pytest.approx(acts.tolist(), rel=2e-3, abs=1e-5)
            ids = planted.cache.tokens[window.example, part]
            assert window.tokens == tuple(planted.strings[int(i)] for i in ids)


def test_negatives_are_verified_and_come_from_their_source(planted, result):
    _, assembler = result
    for latent in range(planted.n_topics):
        known = assembler.of(latent)
        by_source = {s: known.of("score", s) for s in ("random", "lexical", "similar", "weak")}
        assert len(by_source["random"]) == 5
        assert by_source["lexical"]
        for source in ("random", "lexical", "similar"):
            assert all(window.peak == 0 for window in by_source[source]), source
        assert all(0 < w.peak <= 0.1 * known.max_activation * 1.001 for w in by_source["weak"])
        silent = [w for s in ("random", "lexical", "similar") for w in by_source[s]]
        assert len({(w.example, w.start) for w in silent}) == len(silent)
        active = known.of("score", "active")
        assert all(w.peak > 0.1 * known.max_activation * 0.999 for w in active)


def test_windows_called_negative_without_looking_would_be_wrong(planted, result):
    """The known fault of others: a dense latent fires in most windows that are drawn blindly."""
    state, _ = result
    peaks = peaks_of(planted.cache, 0)[planted.cache.split == 1]
    blind = np.random.default_rng(0).choice((peaks > 0).ravel(), 200)
    assert blind.mean() > 0.03
    assert (state.counts["n_windows"][0, 1].sum()) == (peaks > 0).sum()


def test_inclusion_probabilities_count_the_windows_right(planted, identity_dictionary):
    """Horvitz and Thompson: the sum of 1 / p over what is kept estimates how many there are."""
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    latents = range(planted.n_topics)
    estimates, truth = [], []
    for latent in latents:
        peaks = peaks_of(planted.cache, latent)[planted.cache.split == 0]
        truth.append(
            (peaks > 0.1 * peaks_of(planted.cache, latent)[planted.cache.split < 2].max()).sum()
        )
    for seed in range(4):
        state = collect(dictionary, planted.cache, HOOK, dataclasses.replace(CONFIG, seed=seed))
        assembler = Assembler(state, planted.cache.tokens.numpy(), planted.strings)
        estimates.append([
            sum(1 / w.inclusion for w in assembler.of(i).of("explain", "active")) for i in latents
        ])
    assert np.mean(estimates) == pytest.approx(np.mean(truth), rel=0.05)
    assert np.ptp([np.mean(e) for e in estimates]) > 0


def test_the_result_does_not_depend_on_chunks_or_interruptions(
    planted, result, identity_dictionary, tmp_path
):
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    path = tmp_path / "state.safetensors"

    class StopError(Exception):
        pass

    def stop(done: int, total: int, unit: str) -> None:
        if done > 9000:
            raise StopError

    config = dataclasses.replace(CONFIG, save_every=3)
    with pytest.raises(StopError):
        collect(dictionary, planted.cache, HOOK, config, state_path=path, progress=stop)
    planted.cache.read_ids.clear()
    resumed = collect(dictionary, planted.cache, HOOK, config, state_path=path)
    assert len(planted.cache.read_ids) < resumed.n_done - 8000
    coarse = dataclasses.replace(CONFIG, rows_per_chunk=100_000)
    other = collect(dictionary, planted.cache, HOOK, coarse)
    tokens = planted.cache.tokens.numpy()
    base = result[1]
    for state in (resumed, other):
        again = Assembler(state, tokens, planted.strings)
        for latent in range(planted.n_topics + 3):
            assert again.of(latent) == base.of(latent)
            assert again.density(latent) == pytest.approx(base.density(latent))
    changed = dataclasses.replace(CONFIG, save_every=3, seed=9)
    planted.cache.read_ids.clear()
    collect(dictionary, planted.cache, HOOK, changed, state_path=path)
    assert len(planted.cache.read_ids) == resumed.n_done  # another request begins anew


def test_hold_is_never_read_and_splits_share_no_example(planted, result):
    _, assembler = result
    split = planted.cache.split
    for latent in range(planted.n_topics + 3):
        known = assembler.of(latent)
        assert {int(split[w.example]) for w in known.explain} <= {0}
        assert {int(split[w.example]) for w in known.score} <= {1}


@settings(max_examples=25)
@given(st.integers(20, 400), st.integers(0, 2**31), st.floats(0.01, 0.3))
def test_splits_are_disjoint_for_any_corpus_and_naive_sampling_leaks(n_windows, seed, rate):
    """By document nothing is shared; one seed for both draws, as others have it, shares all."""
    made = np.random.default_rng(seed)
    document = np.sort(made.integers(0, max(n_windows // 3, 2), n_windows))
    active = np.flatnonzero(made.random(n_windows) < rate + 10 / n_windows)
    split = made.integers(0, 2, document.max() + 1)[document]
    explain, score = active[split[active] == 0], active[split[active] == 1]
    assert not set(document[explain]) & set(document[score])
    n = min(5, len(active))
    shown = np.random.default_rng(22).permutation(active)[: 8 * n]
    tested = np.random.default_rng(22).permutation(active)[:n]
    assert set(tested) <= set(shown)  # every tested window was shown


def test_together_is_jaccards_index(planted, result):
    _, assembler = result
    pool = set(assembler._state.pool_windows[0].tolist())
    per_example = assembler.texts.per_example
    acts = planted.cache.acts
    rows = [
        acts[w // per_example, p]
        for w in sorted(pool)
        for p in range(w % per_example * WIDTH, min((w % per_example + 1) * WIDTH, acts.shape[1]))
        if p
    ]
    fires = torch.stack(rows) > 0
    a, b = 0, int(assembler.neighbours.latent[0, 0])
    both, either = (fires[:, a] & fires[:, b]).sum(), (fires[:, a] | fires[:, b]).sum()
    assert assembler.neighbours.jaccard[0, 0] == pytest.approx(float(both / either))
    assert (np.diff(assembler.neighbours.jaccard, axis=1) <= 0).all()
    assert a not in assembler.neighbours.latent[0]


def test_files_are_read_by_latent(planted, result, tmp_path):
    state, assembler = result
    write_windows(tmp_path, state, assembler)
    for latent, read in zip((5, 0), read_windows(tmp_path, [5, 0]), strict=True):
        known = assembler.of(latent)
        assert [w.tokens for w in read.explain] == [w.tokens for w in known.explain]
        assert [w.source for w in read.score] == [w.source for w in known.score]
        assert [w.inclusion for w in read.score] == [w.inclusion for w in known.score]
        assert read.max_activation == known.max_activation
    with pytest.raises(ValueError, match=r"latent must be in .*, got 999"):
        next(read_windows(tmp_path, [999]))
    with pytest.raises(FileNotFoundError, match="must be a file; run `sae explain`"):
        next(read_windows(tmp_path / "none", [0]))


def test_images_are_whole_examples_without_words(planted, identity_dictionary):
    dictionary = identity_dictionary(planted.cache.acts.shape[2])
    config = dataclasses.replace(CONFIG, tokens=0, pool=53)
    state = collect(dictionary, planted.cache, HOOK, config)
    known = Assembler(state, planted.cache.tokens.numpy(), None).of(2)
    assert {len(w.activations) for w in known.score} == {61}
    assert {w.start for w in known.score} == {0}
    assert {token for w in known.score for token in w.tokens} == {""}
    assert not known.of("score", "lexical")


def test_an_empty_split_is_refused(planted, fake_cache, identity_dictionary):
    cache = planted.cache
    copy = fake_cache(cache.tokens, cache.acts, torch.zeros_like(cache.split), cache.source)
    with pytest.raises(ValueError, match="split 'score' must have rows, got none"):
        collect(identity_dictionary(cache.acts.shape[2]), copy, HOOK, CONFIG)


def test_kept_is_the_smallest_of_each_group_however_offered():
    made = np.random.default_rng(0)
    group, priority = made.integers(0, 5, 1009), made.random(1009)
    k = np.array([3, 1, 0, 7, 2])
    reservoir = Reservoir(k, 2)
    for part in np.array_split(np.arange(1009), 13):
        part = part[reservoir.wanted(group[part], priority[part])]
        reservoir.offer(
            WindowRows(
                group[part], priority[part], part, np.ones(len(part), np.float32),
                np.zeros((len(part), 2), np.float16),
            )
        )  # fmt: skip
        reservoir.merge()
    for number in range(5):
        best = np.sort(priority[group == number])[: k[number]]
        assert reservoir.rows.priority[reservoir.rows.group == number].tolist() == best.tolist()


def test_half_octaves():
    values = np.array([1.0, 1.4, 1.5, 2.0, 1e-9, 1e9], np.float32)
    assert half_octave(values).tolist() == [32, 32, 33, 34, 0, 63]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"tokens": -1}, "tokens must be at least 0"), ({"pool": 0}, "pool must be at least 1"),
     ({"weak_share": 1.0}, "weak_share must lie in")],
)  # fmt: skip
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        WindowConfig(**wrong)

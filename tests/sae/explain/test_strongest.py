"""How often the images on which latents fire most have their labels."""

import numpy as np
import pytest

from sae.explain.image_summary import N_STRONGEST, strongest

N_IMAGES, N_CONCEPTS = 211, 3


@pytest.fixture
def has() -> np.ndarray:
    classes = np.arange(N_IMAGES) % N_CONCEPTS
    return classes[:, None] == np.arange(N_CONCEPTS)


def brute(peaks: np.ndarray, has: np.ndarray, concept: np.ndarray) -> float:
    results = []
    for latent, which in enumerate(concept):
        if which < 0:
            continue
        order = sorted(range(len(peaks)), key=lambda i: -peaks[i, latent])[:N_STRONGEST]
        firing = [i for i in order if peaks[i, latent] > 0]
        right = np.mean([has[i, which] for i in firing]) if firing else 0.0
        results.append(right - has[:, which].mean())
    return float(np.mean(results))


def test_it_is_the_share_of_the_strongest_less_that_of_all(has):
    made = np.random.default_rng(3)
    peaks = np.maximum(made.normal(size=(N_IMAGES, 17)), 0).astype(np.float32)
    peaks[:, 5:] *= made.random((N_IMAGES, 12)) < 0.02  # fires on fewer images than are looked at
    concept = made.integers(-1, N_CONCEPTS, 17)
    result = strongest(peaks, has, concept, seed=0)
    assert result.mean.mean == pytest.approx(brute(peaks, has, concept), abs=1e-9)
    assert result.mean.low < result.mean.mean < result.mean.high


def test_a_perfect_latent_has_all_there_is_to_have_and_a_random_one_nothing(has):
    made = np.random.default_rng(4)
    noise = made.random((N_IMAGES, 2 * N_CONCEPTS)).astype(np.float32)
    noise[:, :N_CONCEPTS] *= has
    concept = np.arange(2 * N_CONCEPTS) % N_CONCEPTS
    perfect, random = (
        np.where(np.arange(6) < 3, concept, -1),
        np.where(np.arange(6) < 3, -1, concept),
    )
    result = strongest(noise, has, perfect, seed=0)
    assert result.mean.mean == pytest.approx(1 - 1 / N_CONCEPTS, abs=1e-2)
    assert abs(strongest(noise, has, random, seed=0).mean.mean) < 0.35


def test_an_interval_over_images_is_as_wide_as_the_figure_varies():
    def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
        made = np.random.default_rng(seed)
        has = made.random((101, 1)) < 0.3
        return (made.random((101, 31)) + 0.3 * has).astype(np.float32), has

    concept = np.zeros(31, np.int64)
    results = [strongest(*drawn(seed), concept, seed=0).mean for seed in range(40)]
    spread = np.std([one.mean for one in results], ddof=1)
    half_width = np.mean([(one.high - one.low) / 2 / 1.96 for one in results])
    assert 0.6 < half_width / spread < 1.7


def test_resamples_are_of_the_same_images_for_every_dictionary(has):
    peaks = np.random.default_rng(5).random((N_IMAGES, 7)).astype(np.float32)
    concept = np.zeros(7, np.int64)
    once, again = (strongest(peaks, has, concept, seed=2).resampled for _ in range(2))
    assert np.array_equal(once, again)
    assert len(strongest(peaks, has, concept - 1, seed=2).resampled) == 0
    assert np.isnan(strongest(peaks, has, concept - 1, seed=2).mean.mean)

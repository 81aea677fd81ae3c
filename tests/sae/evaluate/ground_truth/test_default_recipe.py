"""The default recipe finds most of a small world in 150,000 rows: a guard against regressions."""

from benchmarks.ground_truth_recipes import new_step, others, recipe
from sae.evaluate.ground_truth import GroundTruthConfig, batches, evaluate, make_world
from sae.evaluate.ground_truth.config import Zipf
from sae.train.config import DictionaryConfig

BATCH, STEPS, K = 128, 1200, 2
WORLD = GroundTruthConfig(
    n_features=31, d_model=19, firing=Zipf(highest=0.15, lowest=0.03), noise=0.05, n_rows=4001
)


def test_it_finds_as_much_of_a_small_world_as_it_did():
    world = make_world(WORLD, 0)
    entry = recipe("default", "default", world.n_features, K, BATCH)
    step = new_step(world, entry, STEPS)
    for made in batches(world, BATCH, STEPS):
        step(made.x)
    report = evaluate(step.autoencoder, world)
    # It was .964, .903, .809 and 0.
    assert report.directions.mmcs > 0.95
    assert report.directions.recovered > 0.85
    assert report.firing.f1 > 0.78
    assert report.dead < 0.1


def test_recipes_are_brought_to_size():
    entry = recipe("default", "default", 211, 3, 256)
    assert isinstance(entry, DictionaryConfig)
    assert (entry.d_sae, entry.activation.k) == (211, 3)
    assert entry.matryoshka.ends == (13, 26, 52, 105)
    assert entry.dead_after_tokens == 5 * 256
    assert ("openai_topk_auxk", "topk") in set(others())

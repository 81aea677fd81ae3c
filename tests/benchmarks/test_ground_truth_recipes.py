from benchmarks.ground_truth_recipes import others, recipe
from sae.train.loss_config import NestedK


def test_the_recipes_are_those_of_a_single_stream():
    found = [*others()]
    assert ("batchtopk", "batchtopk") in found
    assert ("msae_clip", "msae-uw") in found
    several = {"transcoder_skip", "crosscoder", "cross_layer"}
    not_here = {"default", "demo", "demo_vision", "end_to_end", *several}
    assert not {file for file, _ in found} & not_here
    for file, name in found:
        entry = recipe(file, name, d_sae=211, k=3, batch=256)
        assert (entry.d_sae, entry.inputs, entry.outputs) == (211, (), ())


def test_nested_levels_become_as_large_a_share():
    entry = recipe("msae_clip", "msae-uw", d_sae=211, k=64, batch=256)
    assert isinstance(entry.matryoshka, NestedK)
    assert (entry.matryoshka.ks, entry.activation.k) == ((4, 8, 16, 32), 64)
    small = recipe("msae_clip", "msae-uw", d_sae=211, k=3, batch=256)
    assert small.matryoshka.ks == (1,)

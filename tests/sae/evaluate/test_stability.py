import pytest
import torch

from sae.evaluate import structure as module
from sae.evaluate.structure import chance, cosines, likeness, stability


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


def test_a_permuted_rescaled_copy_is_the_same_dictionary(draw_float32, relu_dictionary, generator):
    rows = draw_float32(43, 11)
    order = torch.randperm(43, generator=generator)
    scale = torch.linspace(0.5, 3, 43)[:, None]
    result = stability(relu_dictionary(rows), relu_dictionary((rows * scale)[order]), generator)
    for side in (result.decoder, result.encoder):
        assert side.mcc == pytest.approx(1, abs=1e-6)
        assert side.mmcs_forward == pytest.approx(1, abs=1e-6)
        assert (side.matched, side.exact) == (1.0, True)
    assert result.matched_both == 1.0
    assert 0.3 < result.chance.mcc < 0.75


def test_random_dictionaries_are_at_the_floor(draw_float32, relu_dictionary, generator):
    a, b = relu_dictionary(draw_float32(307, 29)), relu_dictionary(draw_float32(307, 29, seed=1))
    result = stability(a, b, generator)
    assert result.decoder.mcc == pytest.approx(result.chance.mcc, abs=0.02)
    assert result.decoder.mmcs_backward == pytest.approx(result.chance.mmcs_backward, abs=0.02)
    assert result.matched_both < 0.05


def test_a_matched_decoder_alone_is_not_matched_in_both(draw_float32, relu_dictionary, generator):
    dec = draw_float32(31, 23)
    a = relu_dictionary(draw_float32(31, 23, seed=1), dec)
    b = relu_dictionary(draw_float32(31, 23, seed=2), dec)
    result = stability(a, b, generator)
    assert result.decoder.matched == 1.0
    assert result.matched_both == 0.0


@pytest.mark.parametrize(("d", "n", "published"), [(64, 512, 0.372), (256, 2048, 0.213)])
def test_the_chance_floors_are_those_published(d, n, published, generator, monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    result = chance((n, n), d, generator)
    assert result.mmcs_forward == pytest.approx(published, abs=0.005)
    assert result.mmcs_backward == pytest.approx(published, abs=0.005)


def test_duplicates_show_in_one_direction_alone(draw_float32):
    """100 of 1,100 features, 11 times each: published 1.000 one way, 0.239 the other."""
    truth = draw_float32(1100, 256)
    result = likeness(cosines(truth[:100].repeat(11, 1), truth))
    assert result.mmcs_forward == pytest.approx(1.0, abs=1e-6)
    assert result.mmcs_backward < 0.35
    assert result.mcc < 0.35


def test_the_bound_for_wide_dictionaries_is_below_the_exact_figure(draw_float32, monkeypatch):
    cosine = cosines(draw_float32(53, 7), draw_float32(61, 7, seed=1))
    exact = likeness(cosine)
    monkeypatch.setattr(module, "EXACT", 10)
    bound = likeness(cosine)
    assert (exact.exact, bound.exact) == (True, False)
    assert bound.mcc <= exact.mcc + 1e-9
    same = cosines(draw_float32(53, 7), draw_float32(53, 7))
    assert likeness(same).mcc == pytest.approx(1, abs=1e-6)


def test_dictionaries_of_different_models_are_refused(draw_float32, relu_dictionary, generator):
    with pytest.raises(ValueError, match=r"of one stream, got widths \(7, 7\) and \(5, 5\)"):
        stability(
            relu_dictionary(draw_float32(13, 7)), relu_dictionary(draw_float32(13, 5)), generator
        )

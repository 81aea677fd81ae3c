"""Splicing, patching, pushing, and the tokens of a vision model."""

from copy import deepcopy

import pytest
import torch

from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.pretrained.origin import require_model
from sae.steer.attribution import mean_difference, random_direction, stream_of
from sae.steer.edits import Calibrate, Edit, EditedRows, Patch, Push, Splice
from sae.steer.generation import Patches, generate
from sae.steer.steering import Steering
from tests.families import custom_hooks

IDS = torch.randint(1, 37, (3, 7), generator=torch.Generator().manual_seed(2))


def test_patching_from_the_same_prompt_changes_nothing_and_from_another_does(model, hook_point):
    base = model(IDS[:1]).logits
    same = Patch(hook_point, stream_of(model, hook_point, IDS[:1])[0])
    with Steering(model, [same], first_position=0):
        assert torch.equal(model(IDS[:1]).logits, base)
    other = Patch(hook_point, stream_of(model, hook_point, IDS[1:2])[0])
    with Steering(model, [other], positions="last") as steering:
        result = model(IDS[:1]).logits
    assert steering.n_tokens == 1
    assert torch.equal(result[:, :-1], base[:, :-1])
    assert not torch.equal(result[:, -1], base[:, -1])


def test_vectors_without_a_dictionary(model, tokenizer, hook_point):
    positives, negatives = IDS[:1], IDS[1:, 2:]
    vector = mean_difference(model, hook_point, positives, negatives, first_position=2)
    rows = [stream_of(model, hook_point, ids)[:, 2:] for ids in (positives, negatives)]
    torch.testing.assert_close(vector, rows[0].mean((0, 1)) - rows[1].mean((0, 1)))
    random = random_direction(vector, torch.Generator().manual_seed(0))
    torch.testing.assert_close(random.norm(), vector.norm())
    assert abs(torch.nn.functional.cosine_similarity(random, vector, dim=0)) < 0.7
    base = generate(model, tokenizer, "w3 w7", max_new_tokens=11)
    with Steering(model, [Push(hook_point, 30 * vector)], positions="generated") as steering:
        assert generate(model, tokenizer, "w3 w7", max_new_tokens=11).tokens != base.tokens
    assert steering.n_tokens == 10


def test_splicing_with_the_error_keeps_the_model(model, placed):
    base = model(IDS).logits
    with Steering(model, [Splice(placed, keep_error=True)]):
        torch.testing.assert_close(model(IDS).logits, base, rtol=1e-4, atol=1e-4)
    with Steering(model, [Splice(placed)]):
        assert not torch.allclose(model(IDS).logits, base, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("policy", ["class", "patches"])
def test_a_vision_model_is_steered_on_its_class_token_or_on_its_patches(vit_model, policy):
    block = next(n for n, m in vit_model.named_modules() if type(m).__name__ == "ViTLayer")
    dictionary = SparseAutoencoder(SAEConfig(d_in=22, d_sae=53, activation=TopK(k=7)))
    initialise(dictionary, torch.Generator().manual_seed(1))
    placed = dictionary.requires_grad_(False).at(f"{block}:out")
    pixels = torch.randn(2, 3, 21, 21, generator=torch.Generator().manual_seed(0))
    positions = "class" if policy == "class" else Patches(n_prefix=1)
    base = stream_of(vit_model, f"{block}:out", pixels)
    with Steering(vit_model, [Edit(placed, latent=5, clamp=9.0)], positions=positions) as steering:
        result = stream_of(vit_model, f"{block}:out", pixels)
    where = (result != base).any(-1)
    expected = torch.arange(10) == 0 if policy == "class" else torch.arange(10) > 0
    assert torch.equal(where, expected.expand(2, 10))
    assert steering.n_tokens == 2 * int(expected.sum())


@pytest.mark.parametrize("policy", ["prompt", "generated", "last"])
def test_a_vision_model_has_no_prompt(vit_model, policy):
    push = Push("layers.0:out", torch.ones(22))
    with (
        pytest.raises(
            ValueError, match=rf"positions must be all, class or Patches .* got {policy}"
        ),
        Steering(vit_model, [push], positions=policy),
    ):
        vit_model(torch.zeros(2, 3, 21, 21))


def test_wrong_edits_are_refused(placed, dictionary, hook_point):
    def refused(message, **words):
        with pytest.raises(ValueError, match=message):
            Edit(placed, **words)

    refused(r"^latent must be below d_sae=23, got 23$", latent=23, ablate=True)
    refused(r"^latent must be below d_sae=23, got -1$", latent=-1, ablate=True)
    refused(r"must have one of clamp, .* got none$", latent=3)
    refused(r"must have one of clamp, .* got clamp and ablate$", latent=3, clamp=1.0, ablate=True)
    refused(r"units of max or norm .* got '10x mean'$", latent=3, clamp="10x mean")
    refused(r"^latent 22 must have fired .* silent in 101 rows", latent=22, add="1x max")
    refused(r"^along must be d_out=8 wide, got \(5,\)$", latent=3, clamp=1.0, along=torch.ones(5))
    bare = deepcopy(dictionary)
    bare.stats = None
    with pytest.raises(ValueError, match=r"stats must be given .* run `sae evaluate DICT"):
        Edit(bare, latent=3, clamp="10x max")
    assert Edit(bare, latent=3, clamp="10x norm").value == 10


def test_wrong_places_are_refused(model, placed, stats, dictionary, hook_point):
    config = SAEConfig(d_in=8, d_sae=23, d_out=5, activation=TopK(k=5), b_in="none")
    with pytest.raises(ValueError, match=r"d_out must be d_in=8 .* got 5; say where a transcoder"):
        Steering(model, [Edit(SparseAutoencoder(config).at(hook_point), latent=3, ablate=True)])
    stats.max_activation = torch.ones(19)
    with pytest.raises(ValueError, match=r"stats must be of a dictionary with d_sae=23, got 19"):
        dictionary.stats = stats
    with pytest.raises(ValueError, match=r"hook_point must be model.layers.1:out, .* got other"):
        placed.at("other")
    bare = SparseAutoencoder(SAEConfig(d_in=8, d_sae=23, activation=TopK(k=5)))
    nowhere = Edit(bare.at("model.layers.9:out"), latent=3, ablate=True)
    with (
        pytest.raises(
            ValueError,
            match=r"the middle of its 4 blocks is model.layers.2:out; the nearest are model.layers",
        ),
        Steering(model, [nowhere]),
    ):
        pass
    wide = SparseAutoencoder(SAEConfig(d_in=11, d_sae=23, activation=TopK(k=5)))
    edit = Edit(wide.at(hook_point), latent=3, ablate=True)
    with (
        pytest.raises(
            ValueError, match=r"width, 8 in this model, got one for 11; .* another model"
        ),
        Steering(model, [edit]),
    ):
        model(IDS)
    assert not custom_hooks(model)


def test_wrong_requests_are_refused(model, placed):
    with pytest.raises(ValueError, match="changes must name at least one edit, got none"):
        Steering(model, [])
    edit = Edit(placed, latent=3, ablate=True)
    with pytest.raises(ValueError, match=r"positions must be one of all, .* got 'promt'"):
        Steering(model, [edit], positions="promt")
    with pytest.raises(ValueError, match=r"edits must name a latent once, got \[3, 3\]"):
        Steering(model, [edit, edit])
    mask = torch.ones(2, 7, dtype=torch.bool)
    with (
        pytest.raises(
            ValueError, match=r"mask of positions must have a row for each of 3 .* got 2"
        ),
        Steering(model, [edit], positions=mask),
    ):
        model(IDS)


def test_another_model_is_refused(dictionary):
    dictionary.provenance = {"model": {"model_sha256": "aa", "dtype": "bfloat16"}}
    assert require_model(dictionary, {"model_sha256": "aa", "dtype": "float32"}) == ()
    with pytest.raises(ValueError, match="with model aa, got bb"):
        require_model(dictionary, {"model_sha256": "bb"})
    differs = require_model(dictionary, {"model_sha256": "bb"}, force=True)
    assert differs == ("model: trained on aa, used on bb",)


def calibrated(target, latents=(0, 1, 3)):
    """Three rows, calibrated by a dictionary whose decoder is its encoder."""
    config = SAEConfig(d_in=3, d_sae=4, activation=ReLU(), b_in="b_dec")
    dictionary = SparseAutoencoder(config).double().requires_grad_(False)
    rows = [[0.5, -1.0, 0.25], [1.0, 0.5, 0.0], [0.0, -0.5, 1.0], [-0.75, 0.25, 0.5]]
    for given in (dictionary.enc_rows, dictionary.dec_rows):
        given.copy_(torch.tensor(rows))
    dictionary.b_enc.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3], dtype=torch.float64))
    dictionary.b_dec.copy_(torch.tensor([0.2, 0.0, -0.1], dtype=torch.float64))
    x = torch.tensor([[1.0, 2, 3], [-1, 0.5, 2], [4, -3, 6]], dtype=torch.float64)
    placed = dictionary.at("here")
    return x, Calibrate(placed, latents, target)(EditedRows(x, x, torch.arange(3)))


def test_calibration_is_the_released_one():
    """Of the code beside arXiv 2502.15576 (`edit_generate`), run on these weights and rows."""
    released = [
        [1.7076436275661468, 0.4878981793046134, 3.2933127103061404],
        [0.13050528790174099, 0.13050528790174099, 2.2838425382804672],
        [2.881650824978153, -2.631072492371357, 6.765614980383489],
    ]
    x, changed = calibrated(1.5)
    assert changed.h.tolist() == [pytest.approx(row, abs=1e-6) for row in released]
    torch.testing.assert_close(changed.h.norm(dim=1), x.norm(dim=1))


def test_what_fires_enough_is_not_calibrated():
    """Latent 3 has 1.75 and 2.375 in the first rows, and nothing in the last."""
    x, changed = calibrated(1.75, (3,))
    assert changed.is_changed.tolist() == [False, False, True]
    assert torch.equal(changed.h[:2], x[:2])


@pytest.mark.parametrize("latents", [(), (1, 1)])
def test_calibration_needs_latents_each_once(latents):
    with pytest.raises(ValueError, match="latents must be some, each once, got"):
        calibrated(1.0, latents)

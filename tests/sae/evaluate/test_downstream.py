import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.downstream import Images, downstream, features

HOOK = "layers.1:out"


@pytest.fixture
def images():
    """Two classes: the upper or the lower half is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(46) % 2
    pixels = 0.3 * torch.randn(46, 3, 21, 21, generator=generator)
    pixels[labels == 0, :, :11] += 2
    pixels[labels == 1, :, 11:] += 2
    return Images(pixels[:29], labels[:29], pixels[29:], labels[29:])


def dictionary(directions):
    d = directions.shape[1]
    found = SparseAutoencoder(SAEConfig(d_in=d, d_sae=len(directions), activation=ReLU()))
    found.enc_rows.data.copy_(directions)
    found.dec_rows.data.copy_(directions)
    return found.requires_grad_(False)


def test_a_perfect_dictionary_costs_nothing_and_ablations_all(vit_model, images):
    both = torch.cat([torch.eye(22), -torch.eye(22)])
    seen = []
    found = downstream(
        {"perfect": dictionary(both), "nothing": dictionary(0 * both)}, vit_model, HOOK, images,
        progress=lambda *told: seen.append(told),
    )  # fmt: skip
    assert list(found) == ["as it is", "zero", "mean", "perfect", "nothing"]
    assert found["as it is"].linear == 1.0
    assert found["as it is"].knn == 1.0
    assert found["perfect"] == found["as it is"]
    chance = float((images.test_labels == 0).double().mean())
    for name in ("zero", "mean", "nothing"):
        assert abs(found[name].linear - 0.5) == pytest.approx(abs(chance - 0.5))
    assert seen[-1] == (5, 5, "streams")


def test_features_are_those_of_the_model(vit_model, images):
    found = features(vit_model, HOOK, images.test, lambda stream: stream)
    output = vit_model(images.test)
    assert torch.allclose(found, output.pooler_output, atol=1e-5)


def test_one_class_and_taken_names_are_refused(vit_model, images):
    one = images._replace(test_labels=torch.zeros(17, dtype=torch.int64))
    with pytest.raises(ValueError, match="images to score on must have two classes, got 1"):
        downstream({}, vit_model, HOOK, one)
    with pytest.raises(ValueError, match="must not be named 'mean'; rename it"):
        downstream({"mean": dictionary(torch.eye(22))}, vit_model, HOOK, images)

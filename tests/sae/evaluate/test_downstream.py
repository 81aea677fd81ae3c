import json

import pytest
import torch

from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.evaluate.config import EvaluateConfig
from sae.evaluate.downstream import AS_IT_IS, Images, ReplacedStream, downstream, features
from sae.evaluate.report import EvaluationReport, read_json, write_json

HOOK = "layers.1:out"
CONFIG = EvaluateConfig(n_resamples=97)


@pytest.fixture
def images():
    """Two classes: the upper or the lower half is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(46) % 2
    pixels = 0.3 * torch.randn(46, 3, 21, 21, generator=generator)
    pixels[labels == 0, :, :11] += 2
    pixels[labels == 1, :, 11:] += 2
    numbers = torch.arange(46)
    return Images(pixels.__getitem__, numbers[:29], labels[:29], numbers[29:], labels[29:])


def place(model, n_intact=1):
    return ReplacedStream(model, HOOK, torch.zeros(22), n_intact)


def dictionary(directions):
    d = directions.shape[1]
    result = SparseAutoencoder(SAEConfig(d_in=d, d_sae=len(directions), activation=ReLU()))
    result.enc_rows.data.copy_(directions)
    result.dec_rows.data.copy_(directions)
    return result.requires_grad_(False)


def test_a_perfect_dictionary_costs_nothing_and_ablations_all(vit_model, images):
    both = torch.cat([torch.eye(22), -torch.eye(22)])
    seen = []
    result = downstream(
        {"perfect": dictionary(both), "nothing": dictionary(0 * both)}, place(vit_model), images,
        CONFIG, progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    side = result.spliced
    assert list(side) == [AS_IT_IS, "zero", "mean", "perfect", "nothing"]
    assert list(result.intact) == [AS_IT_IS, "zero", "mean"]
    assert side[AS_IT_IS].linear.value == side[AS_IT_IS].knn.value == 1.0
    assert side["perfect"] == side[AS_IT_IS] == result.intact[AS_IT_IS]
    assert side["perfect"].knn_change.low == side["perfect"].knn_change.high == 0
    chance = float((images.test_labels == 0).double().mean())
    for name in ("zero", "mean", "nothing"):
        accuracy = result.spliced[name]
        assert abs(accuracy.linear.value - 0.5) == pytest.approx(abs(chance - 0.5))
        assert accuracy.linear.low < accuracy.linear.value < accuracy.linear.high
        assert accuracy.linear_change.value == pytest.approx(accuracy.linear.value - 1)
    # What the class token has read before the hook point survives where it is left intact.
    for name in ("zero", "mean"):
        assert result.intact[name].linear.value > result.spliced[name].linear.value
    assert (result.n_train, result.n_test, result.n_classes) == (29, 17, 2)
    assert seen[-1] == (8, 8, "features fitted")
    assert (46, 46, "spliced images") in seen


def test_without_a_position_to_leave_there_is_one_treatment(vit_model, images):
    result = downstream({}, place(vit_model, n_intact=0), images, CONFIG)
    assert result.intact == {}
    assert list(result.spliced) == [AS_IT_IS, "zero", "mean"]


def test_features_are_those_of_the_model(vit_model, images):
    streams = {AS_IT_IS: lambda stream: stream, "mean": lambda stream: 2 * stream}
    result = features(place(vit_model), images.pixels, images.test, streams)
    output = vit_model(images.pixels(images.test))
    for n in (0, 1):
        assert torch.allclose(result[n, AS_IT_IS], output.pooler_output, atol=1e-5)
    assert not torch.allclose(result[0, "mean"], result[1, "mean"], atol=1e-3)


def test_a_report_with_accuracies_is_read_as_it_was_written(vit_model, images, tmp_path):
    result = downstream({}, place(vit_model), images, CONFIG)
    report = EvaluationReport(
        hook_point=HOOK, cache_fingerprint="", skip_positions=1, reconstruction={}, firing={},
        substitution={}, config={}, downstream=result,
    )  # fmt: skip
    write_json(report, tmp_path / "report.json")
    assert read_json(tmp_path / "report.json") == report
    older = json.loads((tmp_path / "report.json").read_text())
    del older["downstream"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert read_json(tmp_path / "older.json").downstream is None


def test_one_class_and_taken_names_are_refused(vit_model, images):
    one = images._replace(test_labels=torch.zeros(17, dtype=torch.int64))
    with pytest.raises(ValueError, match="images to score on must have two classes, got 1"):
        downstream({}, place(vit_model), one, CONFIG)
    with pytest.raises(ValueError, match="must not be named 'mean'; rename it"):
        downstream({"mean": dictionary(torch.eye(22))}, place(vit_model), images, CONFIG)

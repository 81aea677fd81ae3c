import numpy as np
import pytest
import torch

import sae
from sae.architecture import ReLU, SAEConfig
from sae.autoencoder import SparseAutoencoder
from sae.pretrained import DictionaryFormatError, verify
from sae.pretrained.loading import load_readings
from sae.pretrained.verify import Published, ReadingFigures

D, ACTIVE, THETA = 24, 6, 0.5


@pytest.fixture
def release(tmp_path, peer):
    """A Llama Scope file of a known world: orthogonal directions, half of them short.

    With s_in = s_out = 1, h is the code itself; h times the decoder's norm passes the threshold
    for the long half alone.
    """
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((D, D)))[0]
    n = np.where(np.arange(D) % 2, 0.1, 2.0)
    codes = np.zeros((301, D))
    for row in codes:
        row[rng.choice(D // 2, ACTIVE // 2, replace=False) * 2] = rng.uniform(1, 2, ACTIVE // 2)
        row[rng.choice(D // 2, ACTIVE // 2, replace=False) * 2 + 1] = rng.uniform(1, 2, ACTIVE // 2)
    norm = float(np.sqrt(D))
    record = {
        "d_model": D, "d_sae": D, "act_fn": "jumprelu", "jump_relu_threshold": THETA,
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "use_decoder_bias": False, "apply_decoder_bias_to_pre_encoder": False,
    }  # fmt: skip
    peer.write(tmp_path / "hyperparams.json", record)
    weights = {
        "encoder.weight": (q / n[:, None]).astype(np.float32),
        "encoder.bias": np.zeros(D, np.float32),
        "decoder.weight": (q * n[:, None]).T.astype(np.float32),
    }
    peer.tensors(tmp_path / "checkpoints" / "final.safetensors", weights)
    x = torch.from_numpy((codes * n) @ q).float()
    return tmp_path, [(x, x)], codes


def measured(release):
    path, pairs, _ = release
    dictionaries = load_readings(path).dictionaries
    return {name: verify.measure(name, made, pairs) for name, made in dictionaries.items()}


def test_both_gates_are_measured(release):
    result = measured(release)
    assert list(result) == ["gate by decoder norms", "gate by h alone"]
    both, alone = result.values()
    assert (both.l0, alone.l0) == (ACTIVE / 2, ACTIVE)
    assert alone.fvu < 1e-9
    assert 1e-4 < both.fvu < 0.1
    assert both.fvu_permuted > 0.8
    assert alone.n_rows == 301


def test_the_published_l0_tells_the_reading(release):
    both, alone = measured(release).values()
    for l0, met in ((ACTIVE, (False, True)), (ACTIVE / 2, (True, False)), (50, (False, False))):
        assert tuple(verify.meets(m, Published(l0=l0)) for m in (both, alone)) == met
    assert not verify.meets(both, Published(l0=ACTIVE / 2, fvu=1e-6))


def test_other_formats_have_one_reading(tmp_path):
    sae.save(SparseAutoencoder(SAEConfig(d_in=D, d_sae=D, activation=ReLU())), tmp_path)
    assert list(load_readings(tmp_path).dictionaries) == ["as loaded"]


@pytest.mark.parametrize(
    ("l0", "fvu", "permuted", "answer"),
    [
        (50.0, 0.2, 1.0, True),
        (64.9, 0.2, 1.0, True),
        (65.1, 0.2, 1.0, False),
        (34.9, 0.2, 1.0, False),
        (50.0, 0.25, 1.0, True),
        (50.0, 0.27, 1.0, False),
        (50.0, 0.2, 0.39, False),
    ],
)
def test_the_bounds(l0, fvu, permuted, answer):
    result = ReadingFigures("x", l0, fvu, permuted, 7)
    assert verify.meets(result, Published(l0=50.0, fvu=0.2)) is answer


def test_figures_are_given_or_stated():
    assert verify.published({"average_l0": "71"}, None) == Published(l0=71.0)
    assert verify.published({"l0": "60"}, "l0=50,fvu=0.2") == Published(l0=50.0, fvu=0.2)
    for site, text in (({}, None), ({"l0": "many"}, None), ({}, "l0"), ({}, "x=3"), ({}, "l0=-1")):
        with pytest.raises(DictionaryFormatError, match="published figures must be positive"):
            verify.published(site, text)


def test_rows_of_another_width_are_refused(release):
    made = next(iter(load_readings(release[0]).dictionaries.values()))
    for pairs in ([], [(torch.zeros(3, 5), torch.zeros(3, 5))]):
        with pytest.raises(DictionaryFormatError, match=r"must be \(24, 24\) wide, got"):
            verify.measure("x", made, pairs)

"""A cross-layer transcoder is the sum of its sources, and its step one on the joint loss."""

import pytest
import torch

from sae.architecture import BatchTopK, ReLU, Slice, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.cross_layer import CrossLayerTranscoder
from sae.pretrained.foreign import DictionaryFormatError
from sae.pretrained.loading import load_cross_layer, save_cross_layer
from sae.train.config import Adam, DictionaryConfig
from sae.train.cross_layer import CrossLayerStep
from sae.train.loss_config import L1

BATCH, WIDTH, D_SAE, N = 31, 7, 23, 3
SCALES = (0.5, 1.3, 2.0)
IN = [f"blocks.{i}.mlp:in" for i in range(N)]
OUT = [f"blocks.{i}.mlp:out" for i in range(N)]


def entry(activation, **fields) -> DictionaryConfig:
    base = {"b_in": "none", "unit_norm": False, "optimizer": Adam(lr=1e-2, clip=None)}
    return DictionaryConfig(d_sae=D_SAE, activation=activation, **{**base, **fields})


RELU = entry(ReLU(), l1=L1(coefficient=0.3, ramp=0.0))


def source(layer: int, config: DictionaryConfig = RELU, scales=SCALES) -> SparseAutoencoder:
    outputs = tuple(Slice(hook_point=OUT[i], width=WIDTH, scale=scales[i]) for i in range(layer, N))
    form = config.architecture(
        WIDTH,
        0.8,
        d_out=WIDTH * (N - layer),
        output_scale=1.0,
        inputs=(Slice(hook_point=IN[layer], width=WIDTH),),
        outputs=outputs,
    )
    made = SparseAutoencoder(form)
    initialise(made, torch.Generator().manual_seed(layer), decoder_norm=0.5)
    return made


def transcoder(config: DictionaryConfig = RELU) -> CrossLayerTranscoder:
    return CrossLayerTranscoder([source(layer, config) for layer in range(N)])


def rows(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is read, and what follows from it through one fixed map per pair of layers."""
    maps = torch.Generator().manual_seed(5)
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(BATCH, WIDTH, generator=generator) for _ in range(N)]
    targets = [torch.zeros(BATCH, WIDTH) for _ in range(N)]
    for read in range(N):
        for place in range(read, N):
            targets[place] += x[read].relu() @ torch.randn(WIDTH, WIDTH, generator=maps)
    return x, targets


def test_a_place_gets_what_all_sources_up_to_it_decode():
    made, (x, _) = transcoder(), rows()
    one, two, three = (s(r) for s, r in zip(made.autoencoders, x, strict=True))
    a, b, c = made(x)
    torch.testing.assert_close(a, one[:, :7])
    torch.testing.assert_close(b, one[:, 7:14] + two[:, :7])
    torch.testing.assert_close(c, one[:, 14:] + two[:, 7:] + three)
    assert [latents.values.shape[0] for latents in made.encode(x)] == [BATCH] * N


@pytest.mark.parametrize("config", [RELU, entry(TopK(k=3))], ids=["relu", "topk"])
def test_the_step_has_the_gradients_of_the_joint_loss(config):
    made, (x, targets) = transcoder(config), rows()
    joint = 0.0
    for place, (x_hat, v) in enumerate(zip(made(x), targets, strict=True)):
        joint = joint + (SCALES[place] * (x_hat - v)).square().sum(dim=1).mean()
    if config.l1 is not None:
        for one, read in zip(made.autoencoders, x, strict=True):
            parts = one.dec_rows.split(WIDTH, dim=1)
            norms = sum(part.norm(dim=1) for part in parts)
            joint = joint + 0.3 * (one.encode_dense(read) * norms).sum(dim=1).mean()
    expected = torch.autograd.grad(joint, list(made.parameters()))
    CrossLayerStep(made, config, 5)(x, targets)
    for parameter, grad in zip(made.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


def test_it_learns_what_no_single_layer_gives_and_resumes_bit_equal():
    step = CrossLayerStep(transcoder(), RELU, 60)
    found = [step(*rows(i)) for i in range(30)]
    state = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    found += [step(*rows(i)) for i in range(30, 60)]
    assert float(found[-1].fvu) < 0.5 * float(found[0].fvu)
    assert float(found[-1].l0) == pytest.approx(sum(float(m.l0) for m in found[-1].sources))
    resumed = CrossLayerStep(transcoder(), RELU, 60)
    resumed.load_state_dict(state)
    again = [resumed(*rows(i)) for i in range(30, 60)]
    assert [float(m.fvu) for m in again] == [float(m.fvu) for m in found[30:]]


def test_it_is_saved_and_loaded_bit_equal(tmp_path):
    made, (x, _) = transcoder(), rows()
    back = load_cross_layer(save_cross_layer(made, tmp_path / "clt"))
    assert all(torch.equal(a, b) for a, b in zip(back(x), made(x), strict=True))
    assert [s.config for s in back.autoencoders] == [s.config for s in made.autoencoders]
    (tmp_path / "clt" / "source-001" / "config.json").unlink()
    with pytest.raises(DictionaryFormatError, match="must be a cross-layer transcoder, got"):
        load_cross_layer(tmp_path / "clt")


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="sources must be at least one, got none"):
        CrossLayerTranscoder([])
    with pytest.raises(ValueError, match="sources must be one for each of 3 places, got 2"):
        CrossLayerTranscoder([source(0), source(1)])
    with pytest.raises(ValueError, match="source 1 must predict the places"):
        CrossLayerTranscoder([source(0), source(2), source(2)])
    with pytest.raises(ValueError, match="source 1 must predict the places"):
        CrossLayerTranscoder([source(0), source(1, scales=(1.0, 1.0, 1.0)), source(2)])
    with pytest.raises(ValueError, match=r"activation\.kind must not be 'batchtopk' across layers"):
        CrossLayerStep(transcoder(), entry(BatchTopK(k=3)), 5)

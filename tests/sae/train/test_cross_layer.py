"""A cross-layer transcoder is the sum of its sources, and its step one on the joint loss."""

from dataclasses import replace

import pytest
import torch

from activations_cache.testing import synthetic_plan, write_synthetic
from sae.architecture import BatchTopK, JumpReLU, ReLU, Slice, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.cross_layer import CrossLayerTranscoder
from sae.pretrained.foreign import DictionaryFormatError
from sae.pretrained.loading import load, load_cross_layer, save_cross_layer
from sae.train.config import L0, Adam, AuxK, DictionaryConfig, TrainConfig
from sae.train.cross_layer import CrossLayerStep
from sae.train.fit import train
from sae.train.loss_config import L1
from sae.train.optim_config import Muon
from sae.train.step import TrainStep
from sae.train.weights import blank_, elsewhere

BATCH, WIDTH, D_SAE, N = 31, 7, 23, 3
SCALES = (0.5, 1.3, 2.0)
IN = [f"blocks.{i}.mlp:in" for i in range(N)]
OUT = [f"blocks.{i}.mlp:out" for i in range(N)]


def entry(activation, **fields) -> DictionaryConfig:
    base = {"b_in": "none", "unit_norm": False, "optimizer": Adam(lr=1e-2, clip=None)}
    return DictionaryConfig(activation=activation, **{"d_sae": D_SAE, **base, **fields})


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


ALIKE = (1.0, 1.0, 1.0)


def whole_entry(activation, **fields) -> DictionaryConfig:
    points = {"inputs": tuple(IN), "outputs": tuple(OUT)}
    return entry(activation, cross_layer=True, d_sae=N * D_SAE, **points, **fields)


def whole_of(made: CrossLayerTranscoder, config: DictionaryConfig) -> SparseAutoencoder:
    """The sources as the blocks of one dictionary."""
    slices = [tuple(Slice(hook_point=p, width=WIDTH) for p in points) for points in (IN, OUT)]
    form = config.architecture(
        N * WIDTH, 0.8, d_out=N * WIDTH, output_scale=1.0, inputs=slices[0], outputs=slices[1]
    )
    whole = SparseAutoencoder(form)
    with torch.no_grad():
        for rows in (whole.enc_rows, whole.dec_rows):
            rows.zero_()
        for layer, source in enumerate(made.autoencoders):
            block, first = slice(layer * D_SAE, (layer + 1) * D_SAE), layer * WIDTH
            whole.enc_rows[block, first : first + WIDTH] = source.enc_rows
            whole.dec_rows[block, first:] = source.dec_rows
    return whole


def test_by_config_it_is_one_dictionary_of_blocks_with_the_gradients_of_its_sources():
    config = replace(RELU, optimizer=Adam(lr=1e-2, clip=None))
    made = CrossLayerTranscoder([source(layer, config, ALIKE) for layer in range(N)])
    by_config = whole_entry(ReLU(), l1=config.l1, optimizer=config.optimizer)
    whole = whole_of(made, by_config)
    x, targets = rows()
    beside = torch.cat(x, dim=1)
    torch.testing.assert_close(whole(beside), torch.cat(made(x), dim=1), rtol=1e-4, atol=1e-4)
    found = TrainStep(whole, by_config, 20)(beside, torch.cat(targets, dim=1))
    expected = CrossLayerStep(made, config, 20)(x, targets)
    torch.testing.assert_close(found.fvu, expected.fvu)
    torch.testing.assert_close(found.l0, expected.l0)
    near = {"rtol": 1e-3, "atol": 1e-4}
    for layer, one in enumerate(made.autoencoders):
        block, first = slice(layer * D_SAE, (layer + 1) * D_SAE), layer * WIDTH
        read = whole.enc_rows.grad[block, first : first + WIDTH]
        torch.testing.assert_close(read, one.enc_rows.grad, **near)
        torch.testing.assert_close(whole.dec_rows.grad[block, first:], one.dec_rows.grad, **near)
        torch.testing.assert_close(whole.b_enc.grad[block], one.b_enc.grad, **near)


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        (TopK(k=5), {"auxk": AuxK(), "dead_after_tokens": 3 * BATCH}),
        (BatchTopK(k=5), {"gate_by_decoder_norm": True}),
        (JumpReLU(threshold=0.1), {"l0": L0(coefficient=0.1)}),
        (ReLU(), {"l1": L1(coefficient=0.3)}),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_what_a_block_has_not_stays_0_and_the_rest_learns(activation, fields):
    config = whole_entry(activation, ema=0.9, **fields)
    form = whole_of(transcoder(), config).config
    whole = SparseAutoencoder(form)
    initialise(whole, torch.Generator().manual_seed(0), decoder_norm=0.5)
    step = TrainStep(whole, config, 40)
    torch.testing.assert_close(whole.dec_rows.norm(dim=1), torch.full((N * D_SAE,), 0.5))
    fvu = []
    for i in range(40):
        x, targets = rows(i)
        fvu.append(float(step(torch.cat(x, dim=1), torch.cat(targets, dim=1)).fvu))
    for made in (whole, step.whole()):
        parts = list(elsewhere(form, made.enc_rows, made.dec_rows))
        assert len(parts) == N * (N - 1) + N * (N - 1) // 2
        assert not any(bool(part.any()) for part in parts)
    assert int((whole.enc_rows != 0).sum()) > 0.9 * N * D_SAE * WIDTH
    assert fvu[-1] < 0.9 * fvu[0]


def test_blanking_keeps_norms_and_what_is_blank_already():
    whole = whole_of(transcoder(), whole_entry(TopK(k=5)))
    before = [whole.enc_rows.clone(), whole.dec_rows.clone()]
    blank_(whole)
    torch.testing.assert_close([whole.enc_rows.data, whole.dec_rows.data], before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": tuple(OUT[:2])}, "outputs must name as many hook points as inputs"),
        ({"d_sae": N * D_SAE + 1}, "d_sae must be a multiple of its 3 inputs for cross_layer"),
        ({"skip": True}, "skip must be False beside cross_layer"),
        ({"unit_norm": True}, "unit_norm must be False beside cross_layer"),
        ({"frozen": "decoder"}, "frozen must be 'none' beside cross_layer"),
        ({"optimizer": Muon()}, r"optimizer\.kind must not be 'muon' beside cross_layer"),
    ],
)
def test_what_blocks_cannot_have_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(whole_entry(TopK(k=5)), **fields)


def test_it_is_trained_saved_and_measured_as_any_dictionary(tmp_path):
    plan = synthetic_plan(dict.fromkeys((*IN, *OUT), WIDTH), n_examples=101, dtype="float32")
    cache = write_synthetic(tmp_path / "cache", plan)
    config = TrainConfig(saes={"clt": whole_entry(TopK(k=5))}, batch=53, precision="fp32")
    path = train(cache, config, tmp_path / "run")["clt"]
    made = load(path)
    parts = list(elsewhere(made.config, made.enc_rows, made.dec_rows))
    assert not any(bool(part.any()) for part in parts)
    assert [part.hook_point for part in made.config.inputs] == IN
    assert [part.hook_point for part in made.config.outputs] == OUT

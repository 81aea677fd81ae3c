"""Which hook points are read and predicted: alone and together, in the config and in the loss."""

import pytest
import torch

from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from sae.architecture import BatchTopK, Gated, JumpReLU, ReLU, SAEConfig, Slice, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.run.config import RunConfig
from sae.train.config import DictionaryConfig, TrainConfig
from sae.train.data_module import reads
from sae.train.forward.common import Moment, Rows
from sae.train.forward.run import forward
from sae.train.hook_points import HookPoints, hook_points_of
from sae.train.loss_config import L1, FixedPrefixes, PAnneal, Tanh
from sae.train.step import TrainStep

WIDTHS, D_SAE, D_OUT, BATCH = (3, 7), 23, 5, 11
D_IN = sum(WIDTHS)
A, B, C = "blocks.0:out", "blocks.1:out", "blocks.1.mlp:in"
CROSS = {"inputs": (A, B), "b_in": "own", "unit_norm": False}
TRANS = {"inputs": (A, B), "outputs": (C,), "skip": True, "b_in": "own", "unit_norm": False}


def config(activation, **fields) -> DictionaryConfig:
    return DictionaryConfig(d_sae=D_SAE, activation=activation, **fields)


def form(entry: DictionaryConfig) -> SAEConfig:
    parts = (
        Slice(hook_point=A, width=WIDTHS[0], scale=0.4),
        Slice(hook_point=B, width=WIDTHS[1], scale=1.7),
    )
    if not entry.outputs:
        return entry.architecture(D_IN, 1.0, inputs=parts)
    return entry.architecture(
        D_IN,
        1.0,
        d_out=D_OUT,
        output_scale=0.6,
        inputs=parts,
        outputs=(Slice(hook_point=C, width=D_OUT),),
    )


def filled(entry: DictionaryConfig) -> SparseAutoencoder:
    made, generator = SparseAutoencoder(form(entry)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
            if name == "threshold":
                parameter.abs_()
    return made.double()


def normal(width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, width, generator=generator, dtype=torch.float64)


def sq(residual):
    return residual.square().sum(dim=1).mean()


def acts_of(d: SparseAutoencoder, u: torch.Tensor) -> torch.Tensor:
    return d.encode_dense_scaled(u)


def y_of(d, a, u, end=D_SAE):
    y = a[:, :end] @ d.dec_rows[:end] + d.b_dec
    return y + u @ d.skip_rows.T if d.config.skip else y


def norms_of(d):
    if d.config.outputs:
        return d.dec_rows.norm(dim=1)
    return d.dec_rows[:, :3].norm(dim=1) + d.dec_rows[:, 3:].norm(dim=1)


def l1_loss(d, u, v, c):
    a = acts_of(d, u)
    return sq(v - y_of(d, a, u)) + 0.7 * (a * norms_of(d)).sum(1).mean()


def p_loss(d, u, v, c):
    a = acts_of(d, u)
    sizes = (a * norms_of(d))[a > 0]
    return sq(v - y_of(d, a, u)) + 0.7 * sizes.sum() / BATCH


def plain_loss(d, u, v, c):
    return sq(v - y_of(d, acts_of(d, u), u))


def prefixes_loss(d, u, v, c):
    a = acts_of(d, u)
    return sum(sq(v - y_of(d, a, u, end)) for end in (5, 13, D_SAE)) / 3


def gated_loss(d, u, v, c):
    b_in = d.b_in if d.config.b_in == "own" else 0.0
    gates = torch.relu((u - b_in) @ d.enc_rows.T + d.b_gate)
    guess = gates @ d.dec_rows.detach() + d.b_dec.detach()
    guess = guess + (u @ d.skip_rows.T).detach() if d.config.skip else guess
    penalty = (gates * norms_of(d)).sum(1).mean()
    return plain_loss(d, u, v, c) + 0.7 * penalty + sq(v - guess)


def tanh_loss(d, u, v, c):
    a = acts_of(d, u)
    return plain_loss(d, u, v, c) + 0.9 * torch.tanh(4 * a * norms_of(d)).sum(1).mean()


NOW = {"coefficient": 0.7, "ramp": 0.0}
KINDS = {
    "relu": (ReLU(), {"l1": L1(**NOW)}, l1_loss),
    "p_anneal": (ReLU(), {"p_anneal": PAnneal(**NOW, start=1.0)}, p_loss),
    "topk": (TopK(k=3), {}, plain_loss),
    "prefixes": (TopK(k=3), {"matryoshka": FixedPrefixes(ends=(5, 13))}, prefixes_loss),
    "gated": (Gated(), {"l1": L1(**NOW)}, gated_loss),
    "jumprelu": (JumpReLU(bandwidth=0.5), {"tanh": Tanh(coefficient=0.9, ramp=0.0)}, tanh_loss),
}
every_kind = pytest.mark.parametrize(("kind", "terms", "formula"), KINDS.values(), ids=KINDS)
every_form = pytest.mark.parametrize("sides", [CROSS, TRANS], ids=["crosscoder", "transcoder"])


@every_form
@every_kind
def test_loss_and_gradients_equal_the_formula(kind, terms, formula, sides):
    entry = config(kind, **sides, **terms)
    d, u = filled(entry), normal(D_IN)
    v = normal(D_OUT, 1) if entry.outputs else u
    moment = Moment(3, 10, torch.zeros(D_SAE, dtype=torch.bool), False)
    found = forward(d, entry, Rows(u, v), moment)
    expected = formula(d, u, v, entry)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.error, sq(v - y_of(d, acts_of(d, u), u)))
    names = [n for n, _ in d.named_parameters() if n != "threshold"]
    parameters = [d.get_parameter(n) for n in names]
    got = torch.autograd.grad(found.loss, parameters, allow_unused=True)
    for name, one, other in zip(names, got, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, n=name: f"{n}: {text}")
        assert one is not None
        assert one.abs().max() > 0


@every_form
def test_each_hook_point_has_its_own_scale_in_and_out(sides):
    d, x = filled(config(TopK(k=3), **sides)), normal(D_IN)
    u = torch.cat([x[:, :3] * 0.4, x[:, 3:] * 1.7], dim=1)
    torch.testing.assert_close(d.scaled(x), u)
    y = y_of(d, acts_of(d, u), u)
    if d.config.outputs:
        torch.testing.assert_close(d(x), y / 0.6)
        torch.testing.assert_close(d.direction(4), d.dec_rows[4] / 0.6)
    else:
        torch.testing.assert_close(d(x), torch.cat([y[:, :3] / 0.4, y[:, 3:] / 1.7], dim=1))
        assert torch.equal(d.scaled_out(x), d.scaled(x))


@pytest.mark.parametrize("norm", ["rms", "layer_norm"])
def test_each_hook_point_has_its_own_norm(norm):
    entry = config(TopK(k=3), input_norm=norm, **CROSS)
    whole = SparseAutoencoder(form(entry)).double()
    x = normal(D_IN)
    alike = {"d_sae": D_SAE, "activation": ReLU(), "input_norm": norm}
    sizes = zip(WIDTHS, (0.4, 1.7), strict=True)
    forms = [SAEConfig(d_in=width, input_scale=scale, **alike) for width, scale in sizes]
    parts = [SparseAutoencoder(form).double() for form in forms]
    apart = [d.scaled(p) for d, p in zip(parts, x.split(WIDTHS, dim=1), strict=True)]
    torch.testing.assert_close(whole.scaled(x), torch.cat(apart, dim=1))
    with torch.no_grad():  # what has no latents gives back what the norm took
        whole.b_dec.fill_(0.3)
        for d in parts:
            d.b_dec.fill_(0.3)
    back = [d(p) for d, p in zip(parts, x.split(WIDTHS, dim=1), strict=True)]
    torch.testing.assert_close(whole(x), torch.cat(back, dim=1))


def test_a_gate_by_decoder_norm_sums_the_norms_of_the_hook_points():
    d, x = filled(config(BatchTopK(k=3), gate_by_decoder_norm=True, **CROSS)), normal(D_IN)
    d.threshold.fill_(0.7)
    h = (d.scaled(x) - d.b_in) @ d.enc_rows.T + d.b_enc
    torch.testing.assert_close(d.encode_dense(x), h * (h * norms_of(d) > 0.7))


def test_columns_come_in_the_order_of_the_entry_and_memory_of_their_own():
    where = {"ba": HookPoints((B, A), ()), "ac": HookPoints((A,), (C,))}
    found = reads(where, {A: 2, "unused:out": 9, B: 3, C: 1})
    assert found.hook_points == (A, B, C)
    x = torch.arange(12.0).view(2, 6)
    [one] = found.columns["ba"].pick(x)
    assert one.tolist() == [[2, 3, 4, 0, 1], [8, 9, 10, 6, 7]]
    read, predicted = found.columns["ac"].pick(x)
    assert (read.tolist(), predicted.tolist()) == ([[0, 1], [6, 7]], [[5], [11]])
    assert all(part.is_contiguous() for part in (one, read, predicted))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"saes.x.inputs must name hook points of the cache \(a:out, b:out\), got \(\)"),
        ({"inputs": ("c:out",)}, r"saes.x.inputs must name hook points .*, got 'c:out'"),
        (
            {"inputs": ("a:out",), "outputs": ("c:in",), "b_in": "none"},
            r"saes.x.outputs must name hook points .*, got 'c:in'",
        ),
    ],
)
def test_hook_points_that_the_cache_has_not_cost_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        hook_points_of({"x": DictionaryConfig(d_sae=53, **fields)}, ("a:out", "b:out"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": (A, A)}, "inputs must name each hook point once"),
        ({"skip": True}, "skip must be false where what is read is predicted, got True"),
        ({"outputs": (B,)}, "b_in must be 'none' or 'own' beside outputs, got 'b_dec'"),
        ({"inputs": (A,), "outputs": (A,), "b_in": "own"}, "outputs must differ from inputs"),
        (
            {"outputs": (B,), "b_in": "own", "input_norm": "rms"},
            "input_norm must be 'none' beside outputs, got 'rms'",
        ),
    ],
)
def test_entries_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DictionaryConfig(d_sae=53, **fields)


def test_slices_fill_the_rows():
    part = Slice(hook_point=A, width=4)
    with pytest.raises(ValueError, match=r"inputs must fill d_in=5, got \[4\]"):
        SAEConfig(d_in=5, d_sae=7, inputs=(part,))
    with pytest.raises(ValueError, match=r"outputs must fill d_out=5, got \[4\]"):
        SAEConfig(d_in=5, d_sae=7, outputs=(part,))


def test_a_run_refuses_hook_points_that_its_cache_will_not_have():
    made = CacheConfig(
        model=ModelConfig(path="m"),
        text=TextConfig(sources=(TextSource(path="t.txt"),)),
        hook_points=(A,),
        n_rows=2000,
    )
    saes = {"x": DictionaryConfig(d_sae=53, inputs=(B,))}
    with pytest.raises(ValueError, match=r"train.saes.x.inputs must name hook points of the cache"):
        RunConfig(output="o", cache=made, train=TrainConfig(saes=saes))


def test_a_step_gets_a_target_exactly_where_others_are_predicted():
    entry = config(TopK(k=3), **TRANS)
    made = SparseAutoencoder(form(entry))
    initialise(made, torch.Generator().manual_seed(0))
    step, x = TrainStep(made, entry, 7), normal(D_IN).float()
    with pytest.raises(ValueError, match="step must get a target with outputs="):
        step(x)
    with pytest.raises(ValueError, match=r"predicted rows must be d_out=5 wide, got \(11, 10\)"):
        step(x, x)
    with pytest.raises(ValueError, match=r"rows must be d_in=10 wide, got \(11, 9\)"):
        step(x[:, 1:], normal(D_OUT).float())
    crossed = SparseAutoencoder(form(config(TopK(k=3), **CROSS)))
    initialise(crossed, torch.Generator().manual_seed(0))
    other = TrainStep(crossed, config(TopK(k=3), **CROSS), 7)
    with pytest.raises(ValueError, match="step must get no target with outputs="):
        other(x, x)

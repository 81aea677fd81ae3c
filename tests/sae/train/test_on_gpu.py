"""Training on a CUDA device: `make gpu`. What of it a CPU can show is in test_device.py."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from sae.architecture import TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.checkpoint import Snapshot
from sae.train.config import Adam, DictionaryConfig
from sae.train.step import TrainStep
from sae.train.throughput import StepGraph
from sae_kernels.fused import StepWeights, fused_topk_step
from tests.golden.recipes import rows
from tests.sae.train import test_recipes

pytestmark = pytest.mark.gpu
every_recipe = pytest.mark.parametrize(
    "config", test_recipes.ENTRIES.values(), ids=test_recipes.ENTRIES
)


@contextmanager
def without_waits():
    """Let torch refuse whatever waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(config: DictionaryConfig, precision: str = "bf16") -> TrainStep:
    made = test_recipes.step_of(config)
    return TrainStep(made.autoencoder.cuda(), config, made.total_steps, precision=precision)


def given(config: DictionaryConfig) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    return lambda x: tuple(part.cuda() for part in test_recipes.given(config, x))


@every_recipe
def test_a_step_waits_for_nothing(config):
    step, parts = on_gpu(config), [given(config)(x) for x in rows()]
    for part in parts[:8]:
        step(*part)
    step.bound.until = 1 << 30  # the host looks once in a while, and not now
    with without_waits():
        for part in parts[8:12]:
            metrics = step(*part)
    assert bool(metrics.finite)


@every_recipe
def test_it_learns_as_on_a_cpu_and_goes_on_from_a_checkpoint(config):
    there, here = on_gpu(config, "fp32"), test_recipes.step_of(config)
    again = on_gpu(config, "fp32")
    for number, x in enumerate(rows()[:12]):
        if number == 6:
            again.load_state_dict({name: t.cpu() for name, t in there.state_dict().items()})
        found, right = there(*given(config)(x)), here(*test_recipes.given(config, x))
        if number < 3:  # later on what was rounded otherwise has grown
            assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-2)
        if number >= 6:
            assert torch.equal(again(*given(config)(x)).loss, found.loss)


@every_recipe
def test_a_replayed_step_is_the_step_and_waits_for_nothing(config):
    plain, step = (on_gpu(config) for _ in range(2))
    graph = StepGraph(step)
    parts = [given(config)(x) for x in rows()]
    for part in parts[:12]:
        found, right = graph(*part), plain(*part)
        assert float(found.loss) == pytest.approx(float(right.loss), rel=1e-3)
    step.bound.until = 1 << 30
    with without_waits():
        graph(*parts[12])


@every_recipe
def test_a_batch_that_is_not_finite_changes_nothing_but_the_count(config):
    step, parts = on_gpu(config), [given(config)(x) for x in rows()[:3]]
    for part in parts[:2]:
        step(*part)
    before = {name: value.clone() for name, value in step.state_dict().items()}
    metrics = step(*(torch.full_like(part, torch.nan) for part in parts[2]))
    assert not bool(metrics.finite)
    after = step.state_dict()
    assert [n for n, v in before.items() if not torch.equal(v, after[n])] == ["n_steps"]


@every_recipe
def test_a_checkpoint_s_copy_is_the_state_behind_its_step_and_nobody_waits_for_it(config):
    step, parts, snapshot = on_gpu(config), [given(config)(x) for x in rows()], Snapshot()
    for part in parts[:8]:
        step(*part)
    assert snapshot.take(step.state_dict()) is not None  # which makes the room
    step.bound.until = 1 << 30
    state = {name: value.clone() for name, value in step.state_dict().items()}
    with without_waits():
        copy = snapshot.take(step.state_dict())
        step(*parts[8])
    assert copy is not None
    assert copy.whole() > 0
    assert all(value.is_pinned() for value in copy.state.values())
    assert {n for n, value in state.items() if not value.cpu().equal(copy.state[n])} == set()


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("width", [768, 2304])
def test_rows_of_16_bits_give_the_gradients_of_float64(width, of_batch):
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = ((509, width), (8192, width), (8192,), (8192, width), (width,))
    x, enc_rows, b_enc, dec_rows, b_dec = (
        torch.randn(shape, generator=draw, device="cuda") * (1 if n in (0, 2) else width**-0.5)
        for n, shape in enumerate(shapes)
    )
    x, low = x.bfloat16().float(), (enc_rows.bfloat16(), dec_rows.bfloat16())
    found = fused_topk_step(
        x, x, StepWeights(low[0], b_enc, None, low[1], b_dec), 32, scale=1 / 509, of_batch=of_batch
    )
    leaves = [t.double().requires_grad_() for t in (low[0], b_enc, low[1], b_dec)]
    pre = x.double() @ leaves[0].T + leaves[1]
    least = pre.detach().flatten().topk(32 * 509).values[-1] if of_batch else None
    least = pre.detach().topk(32, dim=1).values[:, -1:] if least is None else least
    x_hat = (pre.relu() * (pre >= least)) @ leaves[2] + leaves[3]
    loss = (x_hat - x).square().sum() / 509
    right = torch.autograd.grad(loss, leaves)
    for got, want in zip(
        (found.enc_rows, found.b_enc, found.dec_rows, found.b_dec), right, strict=True
    ):
        assert (got.double() - want).norm() < 2e-2 * want.norm()


def test_rows_wider_than_a_program_are_trained():
    config = DictionaryConfig(d_sae=64, activation=TopK(k=3), optimizer=Adam(states="bfloat16"))
    for entry in (config, DictionaryConfig(d_sae=64, activation=TopK(k=3))):
        dictionary = SparseAutoencoder(entry.architecture(20_480))
        initialise(dictionary, torch.Generator().manual_seed(0))
        step = TrainStep(dictionary.cuda(), entry, 9, precision="bf16")
        assert bool(step(torch.randn(32, 20_480, device="cuda")).finite)

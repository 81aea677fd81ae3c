"""End-to-end fine-tuning: the KL is the model's, and its gradient reaches the dictionary."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from activations_cache.hooks import capture, edit
from sae.architecture import ReLU
from sae.autoencoder import SparseAutoencoder, initialise
from sae.train.config import Adam, DictionaryConfig
from sae.train.end_to_end import EndToEndStep
from sae.train.loss_config import L1
from sae.train.step import TrainStep

HOOK, WIDTH, VOCAB, SKIP = "model.layers.0:out", 8, 37, 2
RELU = DictionaryConfig(
    d_sae=2 * WIDTH,
    activation=ReLU(),
    b_in="none",
    unit_norm=False,
    l1=L1(coefficient=0.0),
    optimizer=Adam(lr=3e-3, clip=None),
)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=19, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64,
        initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tokens(seed: int = 0) -> torch.Tensor:
    ids = torch.randint(VOCAB, (11, 13), generator=torch.Generator().manual_seed(seed))
    ids[3, 7:] = -1
    return ids


def identity() -> SparseAutoencoder:
    made = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    with torch.no_grad():
        for rows in (made.enc_rows, made.dec_rows):
            rows.copy_(torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]))
    return made


def test_a_dictionary_that_gives_back_what_it_reads_costs_nothing(model):
    step = EndToEndStep(TrainStep(identity(), RELU, 7), model, HOOK, skip_positions=SKIP)
    found = step(tokens())
    assert float(found.kl) == pytest.approx(0, abs=1e-5)
    assert float(found.rows.fvu) == pytest.approx(0, abs=1e-9)


def test_loss_and_gradients_are_those_of_the_definition(model):
    made = identity()
    with torch.no_grad():
        made.dec_rows += 0.3 * torch.randn(
            made.dec_rows.shape, generator=torch.Generator().manual_seed(1)
        )
    ids = tokens()
    mask = (ids >= 0) & (torch.arange(13) >= SKIP)
    with capture(model, [HOOK]) as run:
        stream = run(ids.clamp_min(0))[HOOK]
    x_hat = made(stream.flatten(0, 1)).view(stream.shape)
    new = torch.where(mask[..., None], x_hat, stream)
    base = model(input_ids=ids.clamp_min(0)).logits.log_softmax(-1)[mask]
    with edit(model, {HOOK: lambda _stream, _positions: new}):
        spliced = model(input_ids=ids.clamp_min(0)).logits.log_softmax(-1)[mask]
    kl = torch.nn.functional.kl_div(spliced, base, log_target=True, reduction="sum") / mask.sum()
    error = (0.5 * (x_hat - stream)[mask]).square().sum(dim=1).mean()
    grads = torch.autograd.grad(error + 0.7 * kl, [made.enc_rows, made.dec_rows, made.b_dec])
    step = TrainStep(made, RELU, 7)
    found = EndToEndStep(step, model, HOOK, coefficient=0.7, skip_positions=SKIP)(ids)
    torch.testing.assert_close(found.kl, kl.detach())
    torch.testing.assert_close(found.rows.loss, (error + 0.7 * kl).detach())
    assert float(kl.detach()) > 0.01
    for name, grad in zip(("enc_rows", "dec_rows", "b_dec"), grads, strict=True):
        torch.testing.assert_close(made.get_parameter(name).grad, grad, rtol=1e-3, atol=1e-5)


def test_the_kl_is_as_large_as_the_loss_on_rows_by_default(model):
    made = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    initialise(made, torch.Generator().manual_seed(0))
    found = EndToEndStep(TrainStep(made, RELU, 7), model, HOOK)(tokens())
    alone = SparseAutoencoder(RELU.architecture(WIDTH, 0.5))
    initialise(alone, torch.Generator().manual_seed(0))
    fixed = EndToEndStep(TrainStep(alone, RELU, 7), model, HOOK, coefficient=0.0)(tokens())
    assert float(found.rows.loss) == pytest.approx(2 * float(fixed.rows.loss), rel=1e-5)


def test_a_model_that_would_learn_is_refused(model):
    other = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match="model must have weights without gradients"):
        EndToEndStep(TrainStep(identity(), RELU, 7), other, HOOK)

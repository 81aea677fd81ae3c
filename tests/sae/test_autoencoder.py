import pytest
import torch

from sae.activations import encode_batch, pad_silent, to_dense, to_latents
from sae.architecture import BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from sae.autoencoder import Latents, SparseAutoencoder, initialise

D_IN, D_SAE, BATCH, K = 7, 23, 5, 3


TOPK = TopK(k=K)


def dictionary(activation=TOPK, **fields) -> SparseAutoencoder:
    config = SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=activation, input_scale=0.31, **fields)
    made = SparseAutoencoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        if isinstance(activation, BatchTopK):
            made.threshold.fill_(0.7)
        if isinstance(activation, JumpReLU):
            made.threshold.abs_()
    return made


def rows(seed=0) -> torch.Tensor:
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed)) * 4


def by_hand(made: SparseAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense activations and reconstruction straight from the definition, in float64."""
    enc, dec, b_enc, b_dec = (
        t.detach().double() for t in (made.enc_rows, made.dec_rows, made.b_enc, made.b_dec)
    )
    u = x.double() * made.config.input_scale
    h = (u - (b_dec if made.config.b_in == "b_dec" else 0)) @ enc.T + b_enc
    if isinstance(made.config.activation, BatchTopK | JumpReLU):
        h = h.where(h > made.threshold.detach().double(), torch.zeros(()).double())
    if isinstance(made.config.activation, TopK):
        kth = h.sort(dim=1, descending=True).values[:, K - 1 : K]
        h = h.where(h >= kth, torch.zeros(()).double())
    acts = h.clamp(min=0)
    return acts, (acts @ dec + b_dec) / made.config.input_scale


@pytest.mark.parametrize("activation", [TopK(k=K), ReLU(), BatchTopK(k=K), JumpReLU()])
@pytest.mark.parametrize("b_in", ["none", "b_dec"])
def test_encode_and_decode_equal_the_definition(activation, b_in):
    made, x = dictionary(activation, b_in=b_in), rows()
    acts, x_hat = by_hand(made, x)
    latents = made.encode(x)
    torch.testing.assert_close(to_dense(latents, D_SAE).double(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.encode_dense(x).double(), acts, rtol=1e-5, atol=1e-5)
    for got in (made(x), made.decode(latents), made.decode(made.encode_dense(x))):
        torch.testing.assert_close(got.double(), x_hat, rtol=1e-5, atol=1e-5)


def test_a_batchtopk_dictionary_encodes_no_row_before_it_has_a_threshold():
    made = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=BatchTopK(k=K)))
    with pytest.raises(ValueError, match="must have a threshold to encode, got none; train it"):
        made.encode(rows())
    with pytest.raises(ValueError, match="must have a threshold"):
        made(rows())


def test_batchtopk_keeps_k_times_the_batch_in_training_whatever_a_row_gets():
    made = dictionary(BatchTopK(k=K), b_in="none")
    u = made.scaled(rows() * torch.tensor([0.1, 1, 1, 1, 10])[:, None])
    result = encode_batch(made.config.activation, u, made.encoder())
    fires = result.values > 0
    assert fires.sum() == K * BATCH
    assert len(fires.sum(dim=1).unique()) > 1
    dense = (u @ made.enc_rows.T + made.b_enc).detach()
    kth = dense.flatten().sort(descending=True).values[K * BATCH - 1]
    expected = dense.where(dense >= kth, torch.zeros(()))
    torch.testing.assert_close(to_dense(result, D_SAE), expected)


def test_reconstruction_is_in_the_units_of_the_model():
    made = dictionary(ReLU(), b_in="none")
    before = made(torch.zeros(1, D_IN))
    with torch.no_grad():
        made.b_dec.add_(1.0)
    torch.testing.assert_close(made(torch.zeros(1, D_IN)) - before, torch.full((1, D_IN), 1 / 0.31))
    torch.testing.assert_close(made.direction(4), made.W_dec[4] / 0.31)


def test_padding_is_value_0_at_index_0_and_indices_ascend():
    made = dictionary()
    with torch.no_grad():
        made.b_enc.fill_(-100.0)
        made.b_enc[11] = 100.0
    latents = made.encode(rows())
    assert latents.indices.tolist() == [[0, 0, 11]] * BATCH
    assert latents.values[:, :2].eq(0).all()
    assert latents.values[:, 2].gt(0).all()


def test_padding_keeps_a_firing_latent_0():
    raw = Latents(torch.tensor([[2.0, 0.0, 3.0]]), torch.tensor([[0, 5, 9]]))
    padded = pad_silent(raw)
    assert padded.indices.tolist() == [[0, 0, 9]]
    assert to_dense(padded, D_SAE)[0, [0, 5, 9]].tolist() == [2.0, 0.0, 3.0]


def test_relu_latents_are_as_wide_as_the_fullest_row():
    acts = torch.tensor([[0.0, 2.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0, 7.0], [0.0] * 5])
    latents = to_latents(acts)
    assert latents.values.tolist() == [[2.0, 1.0, 3.0], [0.0, 0.0, 7.0], [0.0, 0.0, 0.0]]
    assert latents.indices.tolist() == [[1, 3, 4], [0, 0, 4], [0, 0, 0]]
    assert torch.equal(to_dense(latents, 5), acts)


@pytest.mark.parametrize("b_in", ["none", "b_dec"])
def test_dense_gradients_equal_plain_autograd(b_in):
    made, x = dictionary(ReLU(), b_in=b_in).double(), rows().double()
    made.decode(made.encode_dense(x)).square().sum().backward()
    got = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    u = x * 0.31
    h = (u - (made.b_dec if b_in == "b_dec" else 0)) @ made.enc_rows.T + made.b_enc
    ((torch.relu(h) @ made.dec_rows + made.b_dec) / 0.31).square().sum().backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


def test_wrong_width_and_wrong_configs_are_refused():
    with pytest.raises(ValueError, match=r"rows must be d_in=7 wide, got \(5, 8\)"):
        dictionary()(torch.zeros(BATCH, 8))
    with pytest.raises(ValueError, match=r"activation\.k must be at most d_sae=23, got 24"):
        SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=TopK(k=24))
    with pytest.raises(ValueError, match="input_scale must be a positive number, got nan"):
        SAEConfig(d_in=D_IN, d_sae=D_SAE, activation=ReLU(), input_scale=float("nan"))
    with pytest.raises(ValueError, match="b_in must not be 'b_dec' where d_out=11"):
        SAEConfig(d_in=D_IN, d_sae=D_SAE, d_out=11, activation=ReLU())


def test_initialise_ties_the_encoder_and_puts_the_mean_into_the_decoder_bias():
    made = dictionary()
    mean = torch.arange(float(D_IN))
    initialise(made, torch.Generator().manual_seed(1), mean=mean, decoder_norm=0.1)
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))
    assert torch.equal(made.enc_rows, made.dec_rows)
    torch.testing.assert_close(made.decode(torch.zeros(1, D_SAE))[0], mean)
    first = made.dec_rows.detach().clone()
    initialise(made, torch.Generator().manual_seed(1), decoder_norm=0.1)
    assert torch.equal(made.dec_rows, first)
    initialise(made, torch.Generator().manual_seed(2), decoder_norm=0.1)
    assert not torch.equal(made.dec_rows, first)

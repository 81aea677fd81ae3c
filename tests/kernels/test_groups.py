import pytest
import torch

from sae_kernels import encode_group_max, product
from sae_kernels.encode import encode_group_max_reference

BATCH, D_IN, K, SIZE = 13, 7, 5, 11
D_SAE = K * SIZE


@pytest.fixture
def tensors(normal):
    """x, enc_rows, b_enc, b_in in float64; some of the maxima are negative."""
    return (
        normal(BATCH, D_IN, seed=1, dtype=torch.float64),
        normal(D_SAE, D_IN, seed=2, dtype=torch.float64),
        normal(D_SAE, seed=3, dtype=torch.float64) - 4.0,
        normal(D_IN, seed=4, dtype=torch.float64),
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_known_answer_and_the_first_of_equal_values(backend):
    result = encode_group_max(
        torch.tensor([[3.0], [-1.0]]),
        torch.tensor([[1.0], [1.0], [0.0], [2.0], [0.0], [-1.0]]),
        torch.tensor([0.0, 0.0, 2.0, 0.0, 9.0, 0.0]),
        2,
        backend=backend,
    )
    assert result.indices.tolist() == [[0, 4], [2, 4]]
    assert result.values.tolist() == [[3.0, 9.0], [2.0, 9.0]]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_values_and_gradients_equal_the_definition(tensors, normal, relu, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(product, "WORKSPACE_BYTES", 3 * D_SAE * 8)
    weights = normal(BATCH, K, seed=5, dtype=torch.float64)
    inputs = [[t.clone().requires_grad_() for t in tensors] for _ in range(3)]
    x, enc_rows, b_enc, b_in = inputs[0]
    pre = ((x - b_in) @ enc_rows.T + b_enc).unflatten(1, (K, SIZE))
    expected = pre.amax(dim=2)
    assert (expected < 0).any()
    assert (expected > 0).any()
    grads = torch.autograd.grad(
        ((expected.relu() if relu else expected) * weights).sum(), inputs[0]
    )
    for (x, enc_rows, b_enc, b_in), run in (
        (inputs[1], encode_group_max),
        (inputs[2], encode_group_max_reference),
    ):
        result = run(x, enc_rows, b_enc, K, b_in=b_in, relu=relu)
        assert torch.equal(result.indices, pre.argmax(2) + torch.arange(K) * SIZE)
        torch.testing.assert_close(result.values, expected.relu() if relu else expected)
        got = torch.autograd.grad((result.values * weights).sum(), (x, enc_rows, b_enc, b_in))
        for one, other in zip(got, grads, strict=True):
            torch.testing.assert_close(one, other)


def test_groups_are_equal(tensors):
    x, enc_rows, b_enc, _ = tensors
    with pytest.raises(ValueError, match="k must divide d_sae=55 into equal groups, got 3"):
        encode_group_max(x, enc_rows, b_enc, 3)

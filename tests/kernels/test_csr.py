import pytest
import torch

from sae_kernels import encode_threshold, sparse_decode

BACKENDS = ["reference", "torch"]
BATCH, D_IN, D_SAE = 13, 7, 104


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_csr_decodes_with_gradients(backend, normal):
    """Encoder, decoder and all gradients against dense autograd, with rows that keep nothing."""
    shapes = ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_IN,))
    tensors = [normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes, 1)]
    threshold = normal(D_SAE, seed=9, dtype=torch.float64) * 3.0
    scale = torch.linspace(0.0, 1.0, BATCH, dtype=torch.float64)[:, None]
    tensors[0] = tensors[3] + scale * (tensors[0] - tensors[3])
    limit = threshold.abs() + 2.0
    dec_rows = normal(D_SAE, 11, seed=6, dtype=torch.float64)
    bias = normal(11, seed=7, dtype=torch.float64)
    weights = normal(BATCH, 11, seed=8, dtype=torch.float64)
    results = []
    for sparse in (True, False):
        inputs = [t.clone().requires_grad_() for t in (*tensors, dec_rows, bias)]
        if sparse:
            x, enc_rows, b_enc, b_in = inputs[:4]
            values, indices, row_ptr = encode_threshold(
                x, enc_rows, b_enc, limit, b_in=b_in, backend=backend
            )
            out = sparse_decode(
                values, indices, inputs[4], inputs[5], row_ptr=row_ptr, backend=backend
            )
            assert (row_ptr.diff() == 0).any()
            assert len(values) > BATCH
        else:
            pre = (inputs[0] - inputs[3]) @ inputs[1].T + inputs[2]
            out = (pre * (pre.detach() > limit)) @ inputs[4] + inputs[5]
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() < 1e-12


def test_bad_bounds_are_refused(shipped, normal):
    bare = shipped(sparse_decode)
    values, indices, rows = normal(5), torch.arange(5), normal(7, 3)
    for bounds in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="row_ptr must rise from 0 to the number of entries"):
            bare(values, indices, rows, row_ptr=torch.tensor(bounds))
    with pytest.raises(TypeError, match=r"row_ptr must be integers, got torch\.float32"):
        bare(values, indices, rows, row_ptr=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match="one bound more than there are rows, got none"):
        bare(values[:0], indices[:0], rows, row_ptr=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values must have the shape \(any\), got \(5, 1\)"):
        bare(values[:, None], indices, rows, row_ptr=torch.tensor([0, 5]))

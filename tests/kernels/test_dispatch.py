"""Each op with `backend="triton"` against its reference, values and gradients."""

import subprocess
import sys

import pytest
import torch

from sae_kernels import (
    encode_threshold,
    encode_topk,
    latent_adam_,
    sparse_decode,
    sparse_decode_mse,
    sparse_weight_grads,
    topk_select,
)

BATCH, D_IN, D_OUT, D_SAE, K = 11, 19, 23, 67, 5


@pytest.fixture
def tensors(normal):
    """x, enc_rows, b_enc, b_in, dec_rows, b_dec."""
    shapes = ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_IN,), (D_SAE, D_OUT), (D_OUT,))
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes, 1)]


def encode(backend, x, enc_rows, b_enc, b_in, *_):
    return encode_topk(x, enc_rows, b_enc, K, b_in=b_in, backend=backend)


def select(backend, x, enc_rows, *_):
    return topk_select(x @ enc_rows.T, K, sorted=True, backend=backend)


def decode(backend, *tensors):
    values, indices = encode("torch", *tensors)
    return (sparse_decode(values, indices, *tensors[4:], backend=backend),)


def decode_csr(backend, x, enc_rows, b_enc, b_in, dec_rows, b_dec):
    values, indices, row_ptr = encode_threshold(
        x, enc_rows, b_enc, 11.0, b_in=b_in, backend="torch"
    )
    assert (row_ptr.diff() == 0).any()
    out = sparse_decode(values, indices, dec_rows, b_dec, row_ptr=row_ptr, backend=backend)
    return (out,)


def threshold(backend, x, enc_rows, b_enc, b_in, *_):
    return encode_threshold(x, enc_rows, b_enc, 2.0, b_in=b_in, backend=backend)


def mse(backend, *tensors, prefixes=None):
    values, indices = encode("torch", *tensors)
    target = tensors[0] @ torch.ones(D_IN, D_OUT)
    return sparse_decode_mse(
        values, indices, *tensors[4:], target, scale=0.3, prefixes=prefixes, backend=backend
    )


def matryoshka(backend, *tensors):
    return mse(backend, *tensors, prefixes=(7, 31, D_SAE))


@pytest.mark.parametrize(
    "op",
    [encode, select, decode, decode_csr, threshold, mse, matryoshka],
    ids=lambda op: op.__name__,
)
def test_triton_equals_the_reference(op, tensors):
    results = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in tensors]
        outputs = op(backend, *inputs)
        loss = outputs[0].square().sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        results.append([*outputs, *(g for g in gradients if g is not None)])
        assert not any(t.requires_grad for t in outputs[1:])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).double().norm() <= 1e-5 * want.double().norm()


def test_triton_weight_grads_equal_the_reference(tensors, normal):
    values, indices = encode("torch", *tensors)
    grad_out, d_values = normal(BATCH, D_OUT, seed=7), normal(BATCH, K, seed=8)
    results = [
        sparse_weight_grads(values, d_values, indices, grad_out, tensors[0], D_SAE, backend=b)
        for b in ("triton", "reference")
    ]
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).double().norm() <= 1e-5 * want.double().norm()


@pytest.mark.parametrize("norm", ["none", "unit", "max"])
def test_triton_adam_equals_the_reference(norm, normal):
    results = []
    for backend in ("triton", "reference"):
        rows = normal(D_SAE, D_OUT)
        states = torch.zeros_like(rows), torch.zeros_like(rows)
        shadow = torch.zeros(D_SAE, D_OUT, dtype=torch.bfloat16)
        for step in (1, 2):
            options = {"weight_decay": 0.1, "clip": torch.tensor(0.5), "shadow": shadow}
            options |= {"project": True, "norm": norm, "backend": backend}
            latent_adam_(rows, normal(D_SAE, D_OUT, seed=step), *states, step, lr=0.1, **options)
        results.append((rows, *states, shadow.float()))
    for got, want in zip(*results, strict=True):
        tolerance = 1e-2 if got is results[0][-1] else 1e-6  # the interpreter cuts bfloat16 off
        assert (got - want).norm() <= tolerance * want.norm()


def test_importing_the_package_imports_no_triton():
    code = "import sys, sae_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")

"""Checks of the compiled ops, run by test_library.py in a process of its own.

The annotation checks of the test run wrap every function in code that torch cannot compile.
"""

import pytest
import torch

from sae_kernels import decode as decoding
from sae_kernels import encode as encoding
from sae_kernels import encode_topk, sparse_decode, topk_select
from sae_kernels import select as selecting

BATCH, D_IN, D_OUT, D_SAE, K = 13, 7, 11, 61, 5


def tensors() -> list[torch.Tensor]:
    """x, enc_rows, b_enc, b_in, dec_rows, b_dec."""
    shapes = ((BATCH, D_IN), (D_SAE, D_IN), (D_SAE,), (D_IN,), (D_SAE, D_OUT), (D_OUT,))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def autoencode(x, enc_rows, b_enc, b_in, dec_rows, b_dec):
    values, indices = encode_topk(x, enc_rows, b_enc, K, b_in=b_in)
    return sparse_decode(values, indices, dec_rows, b_dec), values, indices


def select(x, enc_rows, *_):
    return topk_select(x @ enc_rows.T, K, sorted=True)


def results(function, needed):
    inputs = [t.requires_grad_(n) for t, n in zip(tensors(), needed, strict=True)]
    outputs = function(*inputs)
    (outputs[0].square().sum() + outputs[-2].sin().sum()).backward()
    return [*outputs, *(t.grad for t in inputs)]


def one_graph_gives_the_same(function, backend, needed):
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    pairs = zip(results(compiled, needed), results(function, needed), strict=True)
    for got, want in pairs:
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got, want)


def the_batch_may_vary():
    torch._dynamo.reset()
    compiled = torch.compile(autoencode, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (13, 11, 7):
        inputs = [tensors()[0][:batch], *tensors()[1:]]
        assert torch.equal(compiled(*inputs)[0], autoencode(*inputs)[0])


def autocast_is_that_of_the_call():
    torch._dynamo.reset()
    compiled = torch.compile(autoencode, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(*tensors()), autoencode(*tensors())
    assert torch.equal(got[1], want[1])
    assert not torch.equal(want[1], autoencode(*tensors())[1])


def arguments_are_checked_when_it_runs():
    torch._dynamo.reset()
    compiled = torch.compile(sparse_decode, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.60, got values from 61 to 61"):
        compiled(torch.ones(BATCH, K), torch.full((BATCH, K), D_SAE), tensors()[4])


def operators_keep_the_rules_of_torch():
    x, enc_rows, b_enc, b_in, dec_rows, _ = (t.requires_grad_() for t in tensors())
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    encode = (x, enc_rows, b_enc, b_in, K, True, None, torch.float32)
    torch.library.opcheck(encoding._encode_op, encode, test_utils=rules)
    indices, values = torch.arange(K).repeat(BATCH, 1), torch.ones(BATCH, K, requires_grad=True)
    torch.library.opcheck(decoding._decode_op, (values, indices, dec_rows, None), test_utils=rules)
    torch.library.opcheck(selecting._select_op, (x.detach(), 3, False, None), test_utils=rules)


def main() -> None:
    for backend in ("eager", "aot_eager"):
        for needed in ([True] * 6, [False, True, True, False, True, True]):
            one_graph_gives_the_same(autoencode, backend, needed)
        one_graph_gives_the_same(select, backend, [True, False, False, False, False, False])
    the_batch_may_vary()
    autocast_is_that_of_the_call()
    arguments_are_checked_when_it_runs()
    operators_keep_the_rules_of_torch()


if __name__ == "__main__":
    main()

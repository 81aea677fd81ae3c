import pytest
import torch

from sae.train.config import Adam
from sae.train.loss_config import FixedPrefixes, KAnneal, MultiTopK, PreAct, RandomPrefixes

CASES = {
    "topk": ("topk", {"multi_topk": MultiTopK(), "k_anneal": KAnneal(start=7)}),
    "auxk": ("topk", {"dead_after_tokens": 1}),
    "matryoshka": ("topk", {"matryoshka": FixedPrefixes(ends=(5, 17))}),
    "random prefixes": ("topk", {"matryoshka": RandomPrefixes(n=3)}),
    "relu": ("relu", {}),
    "jumprelu": ("jumprelu", {"preact": PreAct(coefficient=0.1), "dead_after_tokens": 1}),
    "gated": ("gated", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_give_the_gradients_and_figures_of_the_whole(
    case, entry, step_of, planted
):
    kind, fields = CASES[case]
    adam = Adam(lr=1e-2, eps=1e-3)  # so that where a gradient is 0 its rounding is no step
    whole = step_of(entry(kind, optimizer=adam, **fields))
    parts = step_of(entry(kind, optimizer=adam, accumulate=7, **fields))
    for x in planted(4):
        one, other = whole(x), parts(x)
        for figure, expected in zip(other, one, strict=True):
            torch.testing.assert_close(figure, expected, rtol=1e-5, atol=1e-6)
    state = parts.state_dict()
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    first, second = whole.autoencoder.parameters(), parts.autoencoder.parameters()
    for p, q in zip(first, second, strict=True):
        assert float((p.grad - q.grad).norm()) <= 1e-6 * float(p.grad.norm()) + 1e-9

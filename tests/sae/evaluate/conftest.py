""""""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from activations_cache.hooks import capture
from activations_cache.manifest import Plan
from activations_cache.reader import open_cache
from activations_cache.shard import Examples, ShardBuffer
from activations_cache.writer import CacheWriter
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise

HOOK = "model.layers.1:out"
D_MODEL, VOCAB, CONTEXT, SKIP = 8, 37, 13, 1


@pytest.fixture(scope="session")
def hook_point():
    return HOOK


@pytest.fixture(scope="session")
def model():
    """A random Llama of four blocks, with weights large enough that the stream matters."""
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=19, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=VOCAB, max_position_embeddings=64,
        initializer_range=0.5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tokens():
    return torch.randint(VOCAB, (23, CONTEXT), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def stream(model, tokens):
    with capture(model, [HOOK]) as run:
        return run(tokens)[HOOK]


@pytest.fixture(scope="session")
def cache(tmp_path_factory, model, tokens, stream):
    """A cache of the model's stream: 11 examples explain, 5 score, 7 hold, in turn."""
    split = torch.tensor([(0, 1, 2, 0, 2)[i % 5] if i < 20 else 0 for i in range(23)])
    examples = Examples(tokens, split, torch.zeros(23, dtype=torch.int64), ("random",))
    plan = Plan(
        made_from={"model": "tiny"}, hook_points={HOOK: D_MODEL}, dtype="float32", context=CONTEXT,
        skip_positions=SKIP, rows_per_shard=101, n_examples=23, source_names=("random",),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("cache")
    with CacheWriter(path, plan) as writer:
        for shard in writer.claims():
            buffer = ShardBuffer(plan, shard, examples)
            numbers = plan.examples_of(shard)
            buffer.add(numbers, {HOOK: stream[numbers.start : numbers.stop]})
            writer.commit(buffer)
        writer.finish({})
    return open_cache(path)


@pytest.fixture
def identity():
    """Reconstructs every row: a pair of ReLU latents for each direction of each dimension."""
    dictionary = SparseAutoencoder(SAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, activation=ReLU()))
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    dictionary.enc_rows.data.copy_(both)
    dictionary.dec_rows.data.copy_(both)
    return dictionary.requires_grad_(False)


@pytest.fixture
def constant():
    """Makes a dictionary that predicts one row, whatever it reads."""

    def make(row):
        config = SAEConfig(d_in=D_MODEL, d_sae=17, activation=TopK(k=3), input_scale=0.25)
        dictionary = SparseAutoencoder(config)
        dictionary.b_dec.data.copy_(row * 0.25)
        return dictionary.requires_grad_(False)

    return make


@pytest.fixture
def random_dictionary():
    config = SAEConfig(d_in=D_MODEL, d_sae=17, activation=TopK(k=3), input_scale=0.5)
    dictionary = SparseAutoencoder(config)
    initialise(dictionary, torch.Generator().manual_seed(7))
    return dictionary.requires_grad_(False)


@pytest.fixture
def draw():
    """Standard normal rows in float64."""

    def rows(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return rows


@pytest.fixture
def rotation(draw):
    """A random orthogonal matrix."""
    return lambda d, seed=9: torch.linalg.qr(draw(d, d, seed)).Q


@pytest.fixture
def draw_float32():
    def rows(n, d, seed=0):
        return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))

    return rows


@pytest.fixture
def relu_dictionary():
    """A ReLU dictionary with the given rows."""

    def make(enc_rows, dec_rows=None, b_enc=None):
        d_sae, d_in = enc_rows.shape
        config = SAEConfig(d_in=d_in, d_sae=d_sae, activation=ReLU(), b_in="none")
        dictionary = SparseAutoencoder(config)
        dictionary.enc_rows.data.copy_(enc_rows)
        dictionary.dec_rows.data.copy_(enc_rows if dec_rows is None else dec_rows)
        if b_enc is not None:
            dictionary.b_enc.data.copy_(b_enc)
        return dictionary.requires_grad_(False)

    return make

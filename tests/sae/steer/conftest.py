import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.metrics import Firing
from sae.steer.place import Placed

HOOK = "model.layers.1:out"
D_MODEL = 8
WORDS = ["<end>", *(f"w{i}" for i in range(33)), "milk", "Milk", "butter"]


@pytest.fixture(scope="session")
def hook_point():
    return HOOK


@pytest.fixture(scope="session")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w32"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="w32")


@pytest.fixture(scope="session")
def model():
    """A random Llama of four blocks whose greedy text does not fall into one token."""
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=19, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(WORDS), max_position_embeddings=64,
        initializer_range=0.7, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def smollm2_float32(smollm2):
    """In bfloat16 the two ways of attention round apart, whatever is steered."""
    return copy.deepcopy(smollm2.model).float(), smollm2.tokenizer


@pytest.fixture(params=["topk", "relu"])
def dictionary(request):
    activation = TopK(k=5) if request.param == "topk" else ReLU()
    config = SAEConfig(d_in=D_MODEL, d_sae=23, activation=activation, input_scale=0.5)
    dictionary = SparseAutoencoder(config)
    initialise(dictionary, torch.Generator().manual_seed(1))
    dictionary.b_dec.data += 0.1
    return dictionary.requires_grad_(False)


@pytest.fixture
def stats():
    stats = Firing(23)
    stats.n_rows = 101
    stats.max_activation = torch.linspace(0.5, 3, 23)
    stats.max_activation[22] = 0
    return stats


@pytest.fixture
def placed(dictionary, hook_point, stats):
    return Placed(dictionary, hook_point, stats=stats)


@pytest.fixture
def stream():
    return torch.randn(3, 7, D_MODEL, generator=torch.Generator().manual_seed(4)) * 3


@pytest.fixture
def positions():
    return torch.arange(7).expand(3, 7)

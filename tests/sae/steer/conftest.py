import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from activations_cache.hooks import capture
from sae.architecture import ReLU, SAEConfig, TopK
from sae.autoencoder import SparseAutoencoder, initialise
from sae.metrics import Firing
from sae.train import DictionaryConfig, TrainStep
from sae.train.config import Adam, AuxK

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
    dictionary.stats = stats
    return dictionary.at(hook_point)


@pytest.fixture
def stream():
    return torch.randn(3, 7, D_MODEL, generator=torch.Generator().manual_seed(4)) * 3


@pytest.fixture
def positions():
    return torch.arange(7).expand(3, 7)


class Grammar:
    """A small Llama trained on sentences about one topic, and a dictionary of its stream.

    A sentence is its topic's word (or that of no topic), then verbs and nouns in turn; verbs are
    uniform, nouns follow `planted[topic]`: each topic has five of its own.
    """

    NONE, d_model, n_pairs = 4, 32, 6

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        weights = torch.tensor([8.0, 5, 3, 2, 1])
        embedding = torch.zeros(4, 20)
        for topic in range(4):
            embedding[topic, 5 * topic : 5 * topic + 5] = weights[
                torch.randperm(5, generator=generator)
            ]
        planted = embedding / embedding.sum(dim=1, keepdim=True)
        self.planted = torch.cat([planted, planted.mean(dim=0, keepdim=True)])
        self.nouns = torch.arange(8, 28)
        self.tokenizer = self._tokenizer()
        self.model = self._model()
        self.placed = self._placed()

    def sentences(self, topics, generator):
        """Token ids: topic (0..4), then verbs (5..7) and nouns (8..27) in turn."""
        verbs = torch.randint(5, 8, (len(topics), self.n_pairs), generator=generator)
        p = self.planted[topics]
        nouns = torch.multinomial(p, self.n_pairs, replacement=True, generator=generator) + 8
        return torch.cat([topics[:, None], torch.stack([verbs, nouns], 2).flatten(1)], dim=1)

    def prompts(self, topic, seed):
        """Seven sentences of a topic that end in a verb; without a topic their nouns are mixed."""
        generator = torch.Generator().manual_seed(seed)
        return self.sentences(torch.full((7,), topic), generator)[:, : 2 * self.n_pairs]

    def text(self, topic, seed):
        return self.tokenizer.decode(self.prompts(topic, seed)[0])

    def activations(self, ids):
        with capture(self.model, [HOOK0]) as run:
            return self.placed.encode_dense(run(ids)[HOOK0].flatten(0, 1))

    def _tokenizer(self):
        words = [f"topic{i}" for i in range(4)] + ["plain"] + [f"verb{i}" for i in range(3)]
        words += [f"noun{i}" for i in range(20)] + ["<end>"]
        made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<end>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<end>")

    def _model(self):
        config = LlamaConfig(
            hidden_size=self.d_model, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=29,
            max_position_embeddings=64, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(5)
        model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
        n_steps = 300
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, n_steps)
        for _ in range(n_steps):
            ids = self.sentences(torch.randint(5, (64,), generator=generator), generator)
            logits = model(ids, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval().requires_grad_(False)

    def _placed(self):
        generator = torch.Generator().manual_seed(2)
        ids = self.sentences(torch.randint(5, (2000,), generator=generator), generator)
        with capture(self.model, [HOOK0]) as run:
            rows = run(ids)[HOOK0].flatten(0, 1)
        scale = float(self.d_model**0.5 / (rows - rows.mean(0)).square().sum(1).mean().sqrt())
        config = DictionaryConfig(
            d_sae=48, activation=TopK(k=2), auxk=AuxK(coefficient=0.5), dead_after_tokens=4000,
            optimizer=Adam(lr=5e-3, decay=0.5),
        )  # fmt: skip
        dictionary = SparseAutoencoder(config.architecture(self.d_model, scale))
        initialise(dictionary, generator, mean=rows.mean(0))
        step = TrainStep(dictionary, config, total_steps=300)
        for _ in range(300):
            step(rows[torch.randint(len(rows), (512,), generator=generator)])
        dictionary.requires_grad_(False)
        stats = Firing(48)
        stats.update(dictionary.encode(rows))
        dictionary.stats = stats
        return dictionary.at(HOOK0)


HOOK0 = "model.layers.0:out"


@pytest.fixture(scope="session")
def grammar():
    return Grammar()

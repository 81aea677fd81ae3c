"""What the tutorials take where nothing is given: tiny models, texts, drawings, an endpoint.

Nothing here knows anything of the world; it only lets every line of a tutorial run in seconds.
"""

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sae.explain.llm.corpus_text import read_items

WORDS = ("river", "stone", "letter", "winter", "garden", "sister", "carriage", "music", "supper",
         "window", "horse", "promise", "the", "a", "was", "and", "of", "to", "in")  # fmt: skip


def arguments() -> list[str]:
    """What a tutorial was called with; nothing in a notebook, whose arguments are Jupyter's."""
    return [] if "ipykernel" in sys.argv[0] else sys.argv[1:]


def text(path: str = "text.txt", n_chapters: int = 60) -> str:
    """A file of made-up chapters, each begun by a line `CHAPTER n`."""
    dice = np.random.default_rng(0)
    chapters = [
        f"CHAPTER {i}\n" + ". ".join(" ".join(dice.choice(WORDS, 9)) for _ in range(40)) + ".\n"
        for i in range(n_chapters)
    ]
    Path(path).write_text("".join(chapters))
    return path


def language_model(path: str = "model") -> str:
    """A Llama of 4 layers and width 48 with random weights, saved as `transformers` saves."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["?", "<end>"], show_progress=False)
    tokenizer.train([text()], trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=48, intermediate_size=96,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(path)
    return path


def folder_of_texts(sets: dict[str, list[str]], path: str = "concepts") -> str:
    """A folder with a file for each concept, a text in each line."""
    Path(path).mkdir(exist_ok=True)
    for name, texts in sets.items():
        (Path(path) / f"{name}.txt").write_text("\n".join(texts))
    return path


def vision_model(path: str = "vit") -> str:
    """A DINOv2 of 3 layers and width 48 with random weights, for images of 56 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=7
    )
    Dinov2Model(config).save_pretrained(path)
    preprocessing = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True,
        "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (Path(path) / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return path


def towers(path: str = "clip", words: str = "words.txt") -> str:
    """A CLIP of random weights for images of 56 pixels and the words that it writes to a file."""
    names = ["disc", "square", "red", "green", "dark", "bright", "small", "large"]
    Path(words).write_text("\n".join(names))
    vocab = ("<pad>", "<unk>", "<s>", "</s>", "a", "drawing", "of", *names)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)  # fmt: skip
    wide: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**wide, "vocab_size": len(vocab), "max_position_embeddings": 16,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    eyes = {**wide, "image_size": 56, "patch_size": 7}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=eyes, projection_dim=32)
    CLIPModel(config).save_pretrained(path)
    half = [0.5] * 3
    size = {"size": {"height": 56, "width": 56}, "image_mean": half, "image_std": half}
    (Path(path) / "preprocessor_config.json").write_text(json.dumps({**size, "resample": 3}))
    return path


def drawings(path: str = "drawings", n: int = 60) -> str:
    """Discs and squares of any place and colour, a folder for each."""
    for number in range(n):
        dice, kind = np.random.default_rng(number), ("disc", "square")[number % 2]
        image = Image.new("RGB", (56, 56), tuple(dice.integers(150, 256, 3).tolist()))
        x, y = dice.integers(4, 24, 2).tolist()
        pen, fill = ImageDraw.Draw(image), tuple(dice.integers(0, 110, 3).tolist())
        (pen.ellipse if kind == "disc" else pen.rectangle)((x, y, x + 24, y + 24), fill)
        (Path(path) / kind).mkdir(parents=True, exist_ok=True)
        image.save(Path(path) / kind / f"{number}.png")
    return path


def gemma_scope(root: str = "release", d_in: int = 48, d_sae: int = 1024) -> str:
    """A directory as `google/gemma-scope-2b-pt-res` has them, with random weights."""
    dice = np.random.default_rng(0)
    rows = dice.standard_normal((d_sae, d_in)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    path = Path(root) / "layer_1" / "width_1k" / "average_l0_20"
    path.mkdir(parents=True, exist_ok=True)
    np.savez(
        path / "params.npz", W_enc=rows.T, W_dec=rows, b_enc=np.zeros(d_sae, np.float32),
        b_dec=np.zeros(d_in, np.float32), threshold=np.full(d_sae, 0.02, np.float32),
    )  # fmt: skip
    return str(path)


class RandomStudy:
    """A study as Optuna has it, whose choices are drawn at random."""

    def __init__(self, seed: int) -> None:
        self.dice = np.random.default_rng(seed)
        self.trials: list[tuple[float, dict[str, float]]] = []

    def optimize(self, objective: Callable[["RandomTrial"], float], n_trials: int) -> None:
        """Try so many choices."""
        for _ in range(n_trials):
            trial = RandomTrial(self.dice)
            self.trials.append((objective(trial), trial.params))

    @property
    def best_value(self) -> float:
        """The smallest value."""
        return min(value for value, _ in self.trials)

    @property
    def best_params(self) -> dict[str, float]:
        """The choice that gave it."""
        return next(params for value, params in self.trials if value == self.best_value)


class RandomTrial:
    """One choice."""

    def __init__(self, dice: np.random.Generator) -> None:
        self.dice, self.params = dice, dict[str, float]()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number between two others."""
        ends = np.log([low, high]) if log else np.array([low, high])
        drawn = float(self.dice.uniform(*ends))
        self.params[name] = float(np.exp(drawn)) if log else drawn
        return self.params[name]


@contextmanager
def endpoint() -> Iterator[str]:
    """An OpenAI-compatible endpoint that labels by the most frequent marked word; its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Chat(BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer one question."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": _answer(body["messages"][-1]["content"])}
        data = json.dumps({
            "id": "0", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }).encode()  # fmt: skip
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _answer(question: str) -> str:
    items, first = read_items(question), question.split("\n", 1)[0]
    if first.startswith("Label: "):
        word = first.removeprefix("Label: ")
        return json.dumps([int(word in item.text) for item in items])
    marked = Counter(piece.strip() for item in items for piece in item.marked)
    return f"LABEL: {marked.most_common(1)[0][0] if marked else 'nothing'}"

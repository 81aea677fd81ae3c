"""Tiny pairs of towers, CLIP and SigLIP, with tokenizers that know a few words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

SIDE, PATCH = 28, 7
WIDE: dict[str, Any] = {"hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 11,
        "intermediate_size": 29}  # fmt: skip
EYES: dict[str, Any] = {**WIDE, "image_size": SIDE, "patch_size": PATCH}


def word_tokenizer(words: Iterable[str], path: Path, *, begins: bool) -> PreTrainedTokenizerFast:
    """A token for each word; CLIP's texts begin and end with one, SigLIP's only end with one."""
    known = sorted({part for word in words for part in word.split()})
    vocab = {name: i for i, name in enumerate(("<pad>", "<unk>", "<s>", "</s>", *known))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>",
        special_tokens=[("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])],
    )
    names = ["input_ids", "attention_mask"] if begins else ["input_ids"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>" if begins else "</s>", unk_token="<unk>",
        bos_token="<s>", eos_token="</s>", model_input_names=names,
    )  # fmt: skip
    fast.save_pretrained(path)
    return fast


def image_settings(path: Path, side: int = SIDE) -> None:
    """What the images of a pair are made into: squeezed to a square, from -1 to 1."""
    settings = {
        "size": {"height": side, "width": side}, "resample": 3,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(settings))


def clip(path: Path, words: Iterable[str], *, context: int = 13, **eyes: int) -> Path:
    """Write a CLIP of random weights, whose texts are pooled at their end token."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(words, path, begins=True)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    text = {**WIDE, **size, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(5)
    config = CLIPConfig(text_config=text, vision_config={**EYES, **eyes}, projection_dim=17)
    CLIPModel(config).save_pretrained(path)
    image_settings(path, eyes.get("image_size", SIDE))
    return path


def siglip(path: Path, words: Iterable[str], *, context: int = 13, width: int = 22) -> Path:
    """Write a SigLIP of random weights, whose texts are pooled at their last position."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(words, path, begins=False)
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": context}
    text = {**WIDE, **size, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 3}
    text["projection_size"] = width
    torch.manual_seed(5)
    SiglipModel(SiglipConfig(text_config=text, vision_config=EYES)).save_pretrained(path)
    file = path / "tokenizer_config.json"  # as the published files name it
    entries = {**json.loads(file.read_text()), "tokenizer_class": "SiglipTokenizer"}
    file.write_text(json.dumps(entries))
    image_settings(path)
    return path

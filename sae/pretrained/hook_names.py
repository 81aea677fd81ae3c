"""TransformerLens' words for a place in a model, and the module path that is the same place.

`blocks.12.hook_resid_post` of Llama is `model.layers.12:out` here. A word has a path only where a
module of transformers takes in or gives out just that tensor; the others have none and say so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

SEQUENTIAL = "post_attention_layernorm"
"""The module behind the attention in most families, whose input is the stream in the middle."""


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep what TransformerLens names."""

    classes: tuple[str, ...]
    """Beginnings of transformers' class names, such as Llama of LlamaForCausalLM."""
    blocks: str = "model.layers"
    """Module path of the list of blocks."""
    embedding: str = "model.embed_tokens"
    """Module path of the token embedding."""
    places: Mapping[str, str] = field(default_factory=dict)
    """TransformerLens' word inside a block -> hook point inside a block."""


RESIDUAL = {"hook_resid_pre": ":in", "hook_resid_post": ":out"}
MIDDLE = {"hook_resid_mid": f"{SEQUENTIAL}:in"}
ATTENTION = {"hook_attn_out": "self_attn:out", "attn.hook_z": "self_attn.o_proj:in"}
MLP = {"hook_mlp_out": "mlp:out", "mlp.hook_in": "mlp:in"}
GATED = {"mlp.hook_pre": "mlp.gate_proj:out", "mlp.hook_post": "mlp.down_proj:in"}
LLAMA = RESIDUAL | MIDDLE | ATTENTION | MLP | GATED
GEMMA = LLAMA | {
    # what the norms behind attention and MLP give is what is added to the stream
    "hook_resid_mid": "pre_feedforward_layernorm:in",
    "hook_attn_out": "post_attention_layernorm:out",
    "hook_mlp_out": "post_feedforward_layernorm:out",
}
GPT = {
    "hook_attn_out": "attn:out",
    "attn.hook_z": "attn.c_proj:in",
    "mlp.hook_pre": "mlp.c_fc:out",
    "mlp.hook_post": "mlp.c_proj:in",
}
PHI = ATTENTION | {
    "attn.hook_z": "self_attn.dense:in",
    "mlp.hook_pre": "mlp.fc1:out",
    "mlp.hook_post": "mlp.fc2:in",
}
NEOX = {
    "hook_attn_out": "attention:out",
    "attn.hook_z": "attention.dense:in",
    "mlp.hook_pre": "mlp.dense_h_to_4h:out",
    "mlp.hook_post": "mlp.dense_4h_to_h:in",
}
OPT = {"hook_attn_out": "self_attn:out", "attn.hook_z": "self_attn.out_proj:in"}
"""Its MLP sees the tokens of all examples in one row, which is no stream."""
OLMO = {
    "hook_attn_out": "post_attention_layernorm:out",
    "attn.hook_z": "self_attn.o_proj:in",
    "hook_mlp_out": "post_feedforward_layernorm:out",
    "hook_resid_mid": "mlp:in",
}
EXPERTS = RESIDUAL | MIDDLE | ATTENTION | MLP
"""A mixture has no one place before or behind its activation."""
VISUAL = "model.language_model.layers", "model.language_model.embed_tokens"

FAMILIES: dict[str, Family] = {
    "llama": Family(("Llama",), places=LLAMA),
    "mistral": Family(("Mistral",), places=LLAMA),
    "mixtral": Family(("Mixtral",), places=EXPERTS),
    "qwen2": Family(("Qwen2For", "Qwen2Model"), places=LLAMA),
    "qwen3": Family(("Qwen3For", "Qwen3Model"), places=LLAMA),
    "qwen3_moe": Family(("Qwen3Moe",), places=EXPERTS),
    "qwen3_5": Family(("Qwen3_5ForCond", "Qwen3_5MoeForCond"), *VISUAL, RESIDUAL | MIDDLE | MLP),
    "qwen3_5_text": Family(("Qwen3_5",), places=RESIDUAL | MIDDLE | MLP),
    "gemma": Family(("GemmaFor", "GemmaModel"), places=LLAMA),
    "gemma2": Family(("Gemma2",), places=GEMMA),
    "gemma3": Family(("Gemma3ForCond",), *VISUAL, GEMMA),
    "gemma3_text": Family(("Gemma3ForCausal", "Gemma3Text"), places=GEMMA),
    "gpt_oss": Family(("GptOss",), places=EXPERTS),
    "olmo2": Family(("Olmo2",), places=RESIDUAL | OLMO | GATED),
    "stablelm": Family(("StableLm",), places=LLAMA),
    "phi": Family(("PhiFor", "PhiModel"), places=RESIDUAL | PHI | MLP),
    "phi3": Family(("Phi3",), places=RESIDUAL | MIDDLE | ATTENTION | MLP),
    "gpt2": Family(
        ("GPT2",), "transformer.h", "transformer.wte",
        RESIDUAL | GPT | MLP | {"hook_resid_mid": "ln_2:in"},
    ),
    "gptj": Family(
        ("GPTJ",), "transformer.h", "transformer.wte",
        RESIDUAL | MLP | {
            "hook_attn_out": "attn:out", "attn.hook_z": "attn.out_proj:in",
            "mlp.hook_pre": "mlp.fc_in:out", "mlp.hook_post": "mlp.fc_out:in",
        },
    ),
    "gpt_neox": Family(
        ("GPTNeoX",), "gpt_neox.layers", "gpt_neox.embed_in", RESIDUAL | NEOX | MLP
    ),
    "opt": Family(
        ("OPT",), "model.decoder.layers", "model.decoder.embed_tokens", RESIDUAL | OPT
    ),
}  # fmt: skip
"""By the model_type of config.json; one entry adds a family."""

_WORD = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_POINT = re.compile(r"(?P<blocks>.+?)\.(?P<layer>\d+)(?:\.(?P<inner>[\w.]+))?:(?P<side>in|out)")


@cache
def module_path(word: str, family: str) -> str | None:
    """Return the hook point that is TransformerLens' place.

    Args:
        word: Such as `blocks.12.hook_resid_post`; head indices and suffixes are not understood.
        family: A key of `FAMILIES`.

    Returns:
        Such as `model.layers.12:out`; None where the family is not known or no module has it.
    """
    known = FAMILIES.get(family)
    if known is None:
        return None
    if word == "hook_embed":
        return f"{known.embedding}:out"
    match = _WORD.fullmatch(word)
    place = known.places.get(match[2]) if match else None
    if match is None or place is None:
        return None
    return f"{known.blocks}.{match[1]}{'' if place.startswith(':') else '.'}{place}"


def lens_name(hook_point: str, family: str) -> str | None:
    """Return TransformerLens' word for a hook point; None where it has none.

    Args:
        hook_point: Such as `model.layers.12:out`.
        family: A key of `FAMILIES`; where it is not known, only the stream before and behind a
            block is told.
    """
    known = FAMILIES.get(family)
    if known is not None and hook_point == f"{known.embedding}:out":
        return "hook_embed"
    match = _POINT.fullmatch(hook_point)
    if match is None or (known is not None and match["blocks"] != known.blocks):
        return None
    inner = f"{match['inner'] or ''}:{match['side']}"
    places = RESIDUAL if known is None else known.places
    word = next((word for word, place in places.items() if place == inner), None)
    return None if word is None else f"blocks.{match['layer']}.{word}"


def family_of(model_class: str) -> str:
    """Return the family of a class of transformers, such as LlamaForCausalLM; empty if unknown."""
    fitting = (name for name, family in FAMILIES.items() if model_class.startswith(family.classes))
    return next(fitting, "")

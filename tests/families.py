"""Toy models of many families, what is believed of each, and whether the model itself agrees.

`python -m tests.families` writes the table of docs/models.md; `tests/activations_cache/
test_families.py` holds each family to its row.
"""

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from activations_cache.hooks import capture, hook_points_of
from activations_cache.isolation import pieces_of, read_in_rows
from activations_cache.logits import divided
from activations_cache.probe import ModelRecord, readout, record_of
from sae.steer.edits import Push
from sae.steer.steering import Steering

VOCAB, WIDTH, N_NEW = 67, 24, 4
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {**SPECIAL, "hidden_size": WIDTH, "intermediate_size": 36, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 97}  # fmt: skip
GROUPED = {**WIDE, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 6}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ALL_HEADS = {**WIDE, "num_key_value_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 19, "num_hidden_layers": 5,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama": ("ForCausalLM", GROUPED),
    "Mistral": ("ForCausalLM", {**GROUPED, "sliding_window": 8}),
    "Ministral": ("ForCausalLM", {**HEADS, "sliding_window": 8}),
    "Qwen2": ("ForCausalLM", GROUPED),
    "Qwen3": ("ForCausalLM", HEADS),
    "Gemma": ("ForCausalLM", HEADS),
    "Gemma2": ("ForCausalLM", HEADS),
    "Gemma3Text": ("ForCausalLM@Gemma3", HEADS),
    "GPT2": ("LMHeadModel", {**SPECIAL, "n_embd": WIDTH, "n_layer": 3, "n_head": 4,
                             "n_positions": 97}),
    "GPTNeoX": ("ForCausalLM", WIDE),
    "GPTJ": ("ForCausalLM", {**SPECIAL, "n_embd": WIDTH, "n_layer": 3, "n_head": 4,
                             "rotary_dim": 4, "n_positions": 97}),
    "GPTNeo": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 4,
                               "attention_types": [[["global", "local"], 1]], "window_size": 8,
                               "max_position_embeddings": 97}),
    "GPTBigCode": ("ForCausalLM", {**SPECIAL, "n_embd": WIDTH, "n_layer": 3, "n_head": 4,
                                   "n_positions": 97}),
    "OPT": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "ffn_dim": 37, "num_hidden_layers": 3,
                            "num_attention_heads": 4, "word_embed_proj_dim": WIDTH,
                            "max_position_embeddings": 97}),
    "Bloom": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "n_layer": 3, "n_head": 4}),
    "Falcon": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 3,
                               "num_attention_heads": 4}),
    "Mpt": ("ForCausalLM", {**SPECIAL, "d_model": WIDTH, "n_layers": 3, "n_heads": 4,
                            "max_seq_len": 97}),
    "Phi": ("ForCausalLM", {**WIDE, "num_attention_heads": 3}),
    "Phi3": ("ForCausalLM", GROUPED),
    "StableLm": ("ForCausalLM", GROUPED),
    "Starcoder2": ("ForCausalLM", GROUPED),
    "CodeGen": ("ForCausalLM", {**SPECIAL, "n_embd": 32, "n_layer": 3, "n_head": 4,
                                "rotary_dim": 4, "n_positions": 97}),
    "Olmo": ("ForCausalLM", GROUPED),
    "Olmo2": ("ForCausalLM", GROUPED),
    "Granite": ("ForCausalLM", {**GROUPED, "logits_scaling": 8.0, "residual_multiplier": 0.3}),
    "Cohere": ("ForCausalLM", {**GROUPED, "logit_scale": 0.25}),
    "Cohere2": ("ForCausalLM", {**GROUPED, "logit_scale": 0.25}),
    "Glm": ("ForCausalLM", HEADS),
    "Glm4": ("ForCausalLM", HEADS),
    "Nemotron": ("ForCausalLM", GROUPED),
    "SmolLM3": ("ForCausalLM", GROUPED),
    "Mixtral": ("ForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen2Moe": ("ForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 20}),
    "Qwen3Moe": ("ForCausalLM", {**HEADS, **EXPERTS}),
    "Olmoe": ("ForCausalLM", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "GptOss": ("ForCausalLM", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV3": ("ForCausalLM", {**ALL_HEADS, "moe_intermediate_size": 20, "n_routed_experts": 8,
                                   "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                                   "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                                   "qk_nope_head_dim": 4, "v_head_dim": 6,
                                   "first_k_dense_replace": 1}),
    "Qwen3Next": ("ForCausalLM", {**HEADS, **EXPERTS, "num_hidden_layers": 4,
                                  "shared_expert_intermediate_size": 20,
                                  "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                                  "linear_key_head_dim": 6, "linear_value_head_dim": 6}),
    "Jamba": ("ForCausalLM", {**GROUPED, "num_experts": 2, "attn_layer_period": 2,
                              "attn_layer_offset": 1, "expert_layer_period": 2,
                              "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3,
                              "use_mamba_kernels": False}),
    "Mamba": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 3,
                              "state_size": 4}),
    "Mamba2": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 3,
                               "state_size": 4, "num_heads": 6, "head_dim": 8, "n_groups": 1,
                               "chunk_size": 8}),
    "FalconMamba": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 3,
                                    "state_size": 4}),
    "RecurrentGemma": ("ForCausalLM", {**WIDE, "num_key_value_heads": 2, "lru_width": WIDTH,
                                       "attention_window_size": 8}),
    "Rwkv": ("ForCausalLM", {**SPECIAL, "hidden_size": WIDTH, "num_hidden_layers": 3,
                             "attention_hidden_size": WIDTH, "intermediate_size": 36}),
    "Bert": ("ForMaskedLM", WIDE),
    "Roberta": ("ForMaskedLM", WIDE),
    "DistilBert": ("ForMaskedLM", {**SPECIAL, "dim": WIDTH, "hidden_dim": 37, "n_layers": 3,
                                   "n_heads": 4, "max_position_embeddings": 97}),
    "Electra": ("ForMaskedLM", {**WIDE, "embedding_size": WIDTH}),
    "ModernBert": ("ForMaskedLM", {**WIDE, "cls_token_id": 1, "sep_token_id": 2}),
    "T5": ("ForConditionalGeneration", {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 6,
                                        "d_ff": 37, "num_layers": 3, "num_heads": 4,
                                        "decoder_start_token_id": 0}),
    "Bart": ("ForConditionalGeneration", {**SPECIAL, "d_model": WIDTH, "encoder_layers": 3,
                                          "decoder_layers": 3, "encoder_attention_heads": 4,
                                          "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
                                          "decoder_ffn_dim": 37, "max_position_embeddings": 97}),
    "Qwen2VL": ("ForConditionalGeneration", {
        "text_config": {**GROUPED, "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}},
        "vision_config": {"depth": 5, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2,
                          "patch_size": 4}}),
    "Llava": ("ForConditionalGeneration", {
        "text_config": {**GROUPED, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model"}}),
    "Gemma3": ("ForConditionalGeneration", {
        "text_config": HEADS, "vision_config": VISION, "mm_tokens_per_image": 4}),
}  # fmt: skip
"""By name of the configuration: the end of the model's class, and a toy's settings."""

SHORT = ("Gemma2", "Granite", "GptOss", "OPT", "Mamba", "Bert", "T5", "Llava")
"""The families of the short form."""


def make(family: str) -> nn.Module:
    """A toy whose weights are large enough that its parts matter."""
    end, settings = FAMILIES[family]
    end, _, prefix = end.partition("@")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{prefix or family}{end}")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def custom_hooks(model: nn.Module) -> list[Callable]:
    """The hooks in a model that transformers has not left there for its `hidden_states`."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(),
                                                  *m._forward_pre_hooks.values())]  # fmt: skip
    return [hook for hook in hooks if not hook.__module__.startswith("transformers")]


class Row(NamedTuple):
    """What holds for a family; each word was checked against the model's own outputs."""

    family: str
    blocks: str
    attention: str
    documents: str
    verify: str
    steering: str
    logits: str
    loss: str
    parts: str


def row_of(family: str, made: nn.Module | None = None) -> Row:
    """Try a family, and compare everything that its record says with the model itself."""
    model = make(family) if made is None else made
    record = record_of(model)
    ids = fresh_tokens(record)
    return Row(
        family,
        f"`{record.blocks}`",
        _attention(model, record, ids),
        _documents(model, record, ids),
        _verify(model, record, ids),
        _steering(model, record, ids),
        _logits(model, record, ids),
        _loss(model, record, ids),
        parts_of(model, record.blocks, ids, is_sum=record.name not in NORMED_AFTER),
    )


def fresh_tokens(record: ModelRecord) -> Tensor:
    """Tokens that the trial did not read."""
    made = random.Random(record.name)
    return torch.tensor([[made.randrange(3, 61) for _ in range(17)] for _ in range(3)])


def _stream(model: nn.Module, record: ModelRecord) -> Callable[..., Tensor]:
    def read(ids: Tensor, **options: Tensor) -> Tensor:
        with capture(model, [record.last]) as run:
            return run(ids, **options)[record.last]

    return read


def _attention(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    read = _stream(model, record)
    other = torch.cat([ids[:, :9], ids.flip(0)[:, 9:]], dim=1)
    other[1, 9:] = ids[0, 9:]
    changes = not torch.allclose(read(ids)[:, :9], read(other)[:, :9], atol=1e-4, rtol=1e-4)
    assert changes is not record.is_causal
    return "causal" if record.is_causal else "both ways"


def _documents(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    read = _stream(model, record)
    segment = torch.tensor([[0] * 4 + [1] * 8 + [2] * 5, [0] * 17, [0] * 11 + [1] * 6])
    if record.documents is None:
        return "refused"
    pieces = pieces_of(ids, segment)
    if record.documents == "positions":
        positions = torch.cat([torch.arange(p.stop - p.start) for p in pieces]).view(3, 17)
        result = read(ids, position_ids=positions)
    else:
        run = lambda some, **options: {"": read(some, **options)}  # noqa: E731
        result = read_in_rows(run, ids, pieces, with_mask=not record.is_causal)[""]
    for example, start, stop in pieces:
        alone = read(ids[example : example + 1, start:stop])[0]
        assert torch.allclose(result[example, start:stop], alone, atol=2e-4, rtol=2e-4)
    return "exact" if record.documents == "positions" else "a row for each"


def _verify(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    points = [f"{record.blocks}.{i}:out" for i in range(record.n_blocks)]
    entry = model.get_submodule(record.reader)
    hidden = entry(ids, output_hidden_states=True).hidden_states or ()
    with capture(model, points) as run:
        seen = run(ids)
    for point, number in zip(points, record.hidden_states, strict=True):
        if number is not None:
            assert torch.allclose(seen[point], hidden[number], atol=1e-5, rtol=1e-5)
    n = sum(number is not None for number in record.hidden_states)
    return "by `hidden_states`" if n >= record.n_blocks - 1 else "by a whole forward"


def _steering(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    if not record.predicts_next:
        return "in a forward"
    vector = torch.randn(WIDTH if record.name != "CodeGenForCausalLM" else 32,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    push = Push(f"{record.blocks}.1:out", 3 * vector)
    if model._compiled_call_impl is not None:
        with pytest.raises(ValueError, match="must not lie in compiled code"):
            Steering(model, [push]).__enter__()
        return "refused"
    results = []
    for use_cache in (True, False):
        with Steering(model, [push], positions="all") as steering:
            try:
                out = model.generate(
                    ids[:2, :6], attention_mask=torch.ones(2, 6, dtype=torch.long),
                    max_new_tokens=N_NEW, min_new_tokens=N_NEW, do_sample=False, pad_token_id=0,
                    use_cache=use_cache,
                )  # fmt: skip
            except ValueError as error:
                if "the positions at" not in str(error):
                    raise
                return "refused"
        results.append((out.tolist(), steering.n_tokens))
    assert results[0][0] == results[1][0]
    assert results[0][1] == 2 * (5 + N_NEW - 1)
    return "cached = uncached"


def _logits(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    if record.logits is None:
        return "refused"
    path, rows = record.logits, readout(model)
    last = _stream(model, record)(ids).float()
    normed = divided(last, path.is_centred) if path.norm else last
    result = normed @ rows.T
    if path.cap is not None:
        result = path.cap * torch.tanh(result / path.cap)
    logits = model(input_ids=ids, use_cache=False).logits
    zero = torch.zeros(1, 1, WIDTH if rows.shape[1] == WIDTH else rows.shape[1])
    bias = model.get_output_embeddings()(
        model.get_submodule(path.norm)(zero) if path.norm else zero
    )[0, 0]
    expected = logits - path.scale * bias if path.cap is None else logits
    error = (result - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.median()) < 0.02
    said = "exact" if path.scale == 1 else f"exact, x {path.scale:.3g}"
    return said if path.cap is None else "capped: no `direct_logits`"


def _loss(model: nn.Module, record: ModelRecord, ids: Tensor) -> str:
    """Against the loss that the model itself gives for labels."""
    if record.loss is None:
        return "none"
    labels = ids.where(torch.arange(17) % 4 == 2, -100)
    output = model(input_ids=ids, labels=labels)
    logits = output.logits if record.loss == "masked token" else output.logits[:, :-1]
    labels = labels[:, -logits.shape[1] :]
    here = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(output.loss, here, rtol=1e-4)
    return record.loss


NORMED_AFTER = {"BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"}
"""Their blocks norm the stream after each addition, so the parts do not make up the difference."""


def parts_of(model: nn.Module, blocks: str, inputs: Tensor, *, is_sum: bool) -> str:
    """The parts of a block that are listed as added, which must make up what the block does."""
    points = [p for p in hook_points_of(model) if p.startswith(f"{blocks}.1")]
    adding = [p for p in points if p.endswith(":out") and p != f"{blocks}.1:out"]
    if len(adding) != 2:
        return "the stream alone" if not adding else ", ".join(_short(p) for p in adding)
    with capture(model, points) as run:
        seen = run(inputs)
    change = seen[points[-1]] - seen[points[0]] - sum(seen[p] for p in adding)
    if is_sum:
        assert float(change.norm() / seen[points[-1]].norm()) < 1e-4
    return ", ".join(_short(p) for p in adding)


def _short(point: str) -> str:
    return f"`{point.rpartition(':')[0].split('.1.', 1)[1]}`"


def table(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    names = ("family", "blocks", "attention", "documents", "verify", "steering", "logits", "loss",
             "parts that are added")  # fmt: skip
    lines = [names, ("---",) * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    import sys

    from tests.variants import VARIANTS, tower_table

    rows = [row_of(family) for family in FAMILIES]
    rows += [row_of(name, made()) for name, made in VARIANTS.items()]
    sys.stdout.write(f"{table(rows)}\n\n{tower_table()}\n")

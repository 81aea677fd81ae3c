"""The record of a model says what the model does, and what does not hold is done otherwise."""

import json
import re

import pytest
import torch
import transformers
from torch import nn

from activations_cache.builder import build
from activations_cache.config import CacheConfig, ModelConfig, TextConfig, TextSource
from activations_cache.hooks import blocks_of, capture, edit, hook_points_of, noted_hook_points
from activations_cache.isolation import Piece, pieces_of, read_in_rows
from activations_cache.models import load_model
from activations_cache.probe import readout, record_of, require_next_token, way_of
from activations_cache.recompute import recompute
from activations_cache.trial import trial_tokens
from tests.families import make
from tests.variants import EightBits

IDS = torch.tensor([[3, 9, 27, 11, 5, 8, 13]])


def saved(family, tiny_tokenizer, path):
    model = make(family)
    model.resize_token_embeddings(len(tiny_tokenizer), mean_resizing=False)
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return ModelConfig(path=str(path), dtype="float32")


def text(tiny_records, attention="document"):
    source = TextSource(path=str(tiny_records), field="gloss")
    return TextConfig(sources=(source,), context=61, attention=attention)


def test_what_is_shown_of_a_model():
    record = record_of(make("Granite"))
    assert dict(record.lines()) == {
        "blocks": "3 in model.layers",
        "attention": "causal",
        "documents": "kept apart by position ids",
        "cached text": f"equals the uncached one ({record.cache_argument})",
        "logits": "norm and head times 0.125",
        "loss": "of the next token",
    }
    lines = dict(record_of(make("T5")).lines())
    assert lines["no text passes"] == "decoder.block"
    assert lines["attention"] == "in both directions"
    assert lines["logits"] == "not norm and head alone"
    assert lines["loss"] == "none that is known"


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_a_masked_models_own_loss_says_which_token_its_logits_are_of(family):
    record = record_of(make(family))
    assert record.loss == "masked token"
    assert not record.predicts_next


def test_classes_of_tokens_are_no_predictions():
    for family, model_class in (("Llama", "LlamaForTokenClassification"),
                                ("Bert", "BertForTokenClassification")):  # fmt: skip
        config = make(family).config
        assert record_of(getattr(transformers, model_class)(config).eval()).loss is None


def test_what_is_true_of_the_next_token_alone_is_refused_by_name():
    require_next_token(make("Llama"), "to go on")
    for family in ("Bert", "ModernBert", "T5"):
        with pytest.raises(ValueError, match=rf"to go on, got {family}For.* in both"):
            require_next_token(make(family), "to go on")


def test_an_encoder_whose_own_loss_is_of_the_next_token_has_none():
    """BertLMHeadModel is no decoder unless it is told so: it sees what it is scored on."""
    model = transformers.BertLMHeadModel(make("Bert").config).eval()
    record = record_of(model)
    assert not record.is_causal
    assert record.loss is None


def test_a_model_is_tried_once():
    model, n_calls = make("Llama"), []
    model.model.register_forward_hook(lambda *_: n_calls.append(1))
    record = record_of(model)
    n = len(n_calls)
    assert 0 < n <= 11
    assert record_of(model) is record
    assert len(n_calls) == n


def test_a_model_without_tokens_is_refused(vit_model):
    with pytest.raises(ValueError, match="model must read tokens, got ViTModel"):
        record_of(vit_model)


def test_trial_tokens_have_no_purpose_of_their_own():
    model = make("Llava")
    special = {model.config.image_token_id, *(0, 1, 2)}
    assert not special & set(trial_tokens(model, 50, 20).flatten().tolist())


@pytest.mark.parametrize(("family", "way"), [("OPT", "rows"), ("Bert", "rows"), ("Qwen2", None)])
def test_documents_of_a_cache_do_not_see_each_other(
    family, way, tiny_tokenizer, tiny_records, tmp_path
):
    config = saved(family, tiny_tokenizer, tmp_path / "model")
    loaded = load_model(config)
    path, blocks = blocks_of(loaded.model)
    point = f"{path}.{len(blocks) - 1}:out"
    request = CacheConfig(
        model=config, text=text(tiny_records), hook_points=(point,), n_rows=307,
        dtype="float32", rows_per_shard=127,
    )  # fmt: skip
    cache = build(request, tmp_path / "cache")
    assert cache.identity.get("documents") == way  # older caches say nothing: position ids
    assert recompute(cache, loaded) == []
    rows = cache.rows()[:50]
    refs, x = cache.refs(rows), cache[point][rows]
    segment, tokens = cache.examples.segment, cache.examples.tokens
    for i in range(0, 50, 7):
        example, position = int(refs.example[i]), int(refs.position[i])
        here = (segment[example] == segment[example, position]) & (tokens[example] >= 0)
        with capture(loaded.model, [point]) as run:
            alone = run(tokens[example, here][None].long())[point][0]
        expected_row = alone[position - int(here.nonzero()[0, 0])]
        assert torch.allclose(x[i], expected_row, atol=1e-4, rtol=1e-4)


def test_verify_sees_rows_of_documents_that_saw_each_other(tiny_tokenizer, tiny_records, tmp_path):
    config = saved("OPT", tiny_tokenizer, tmp_path / "model")
    loaded = load_model(config)
    request = CacheConfig(
        model=config, text=text(tiny_records), hook_points=("model.decoder.layers.1:out",),
        n_rows=307, dtype="float32", rows_per_shard=127,
    )  # fmt: skip
    cache = build(request, tmp_path / "cache")
    shards = sorted((tmp_path / "cache").rglob("c/*/*"))
    assert shards
    cache.examples.segment[:] = 0  # the pieces are read as one: the rows cannot be theirs
    (problem,) = recompute(cache, loaded)
    assert "must hold what the model gives" in problem


class Leaky(nn.Module):
    """A causal model of no library: its tokens see all before them, whatever they are told."""

    main_input_name = "input_ids"

    def __init__(self, *, pads: bool):
        super().__init__()
        self.table = nn.Embedding(41, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.pads = pads

    def forward(self, input_ids, position_ids=None):
        stream = self.table(input_ids).cumsum(dim=1)
        if self.pads:
            stream = stream / input_ids.shape[1]  # so padding changes all
        for block in self.blocks:
            stream = block(stream)
        return stream


def test_an_argument_of_the_right_name_is_not_believed():
    record = record_of(Leaky(pads=False).eval())
    assert record.leaks["positions"] > 0.1
    assert record.documents == "rows"
    assert record.loss is None


def test_what_cannot_be_kept_apart_is_refused_by_name():
    model = Leaky(pads=True).eval()
    assert record_of(model).documents is None
    with pytest.raises(ValueError, match=r"text.attention must be context for Leaky, got document"):
        way_of(model, apart=True)


def test_pieces_leave_padding_out():
    tokens = torch.tensor([[5, 6, 7, -1], [5, 6, 7, 8]])
    segment = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    assert pieces_of(tokens, segment) == [Piece(0, 0, 1), Piece(0, 1, 3), Piece(1, 0, 4)]


def test_a_row_for_each_piece_costs_no_more_tokens_than_the_contexts():
    shapes = []

    def run(ids):
        shapes.append(tuple(ids.shape))
        return {"x": ids[..., None].float()}

    tokens = torch.arange(24).view(2, 12)
    pieces = [Piece(0, 0, 1), Piece(0, 1, 3), Piece(0, 3, 12), Piece(1, 0, 12)]
    result = read_in_rows(run, tokens, pieces, with_mask=False)["x"][..., 0]
    assert torch.equal(result, tokens.float())
    assert all(n * width <= 24 for n, width in shapes)
    assert len(shapes) < len(pieces)


def test_the_blocks_of_a_text_are_those_that_it_passes():
    model = make("Llava")  # its vision tower has more
    assert blocks_of(model)[0] == "model.language_model.layers"
    (other,) = record_of(model).other_blocks
    assert "vision" in other
    assert all(point.startswith("model.language_model.layers.") for point in hook_points_of(model))


def test_blocks_of_several_classes_are_one_list():
    path, blocks = blocks_of(make("Jamba"))
    assert path == "model.layers"
    assert len({type(block) for block in blocks}) == 2


def test_a_decoder_that_reads_what_it_writes_gives_no_rows_of_a_text():
    model = make("Bart")
    assert blocks_of(model)[0] == "model.encoder.layers"
    assert dict(record_of(model).lines())["no text passes"] == "model.decoder.layers"


@pytest.mark.parametrize(
    ("family", "note"),
    [
        ("Olmo2", "not what is added to the stream: that is post_attention_layernorm:out"),
        ("Gemma2", "not what is added to the stream: that is post_attention_layernorm:out"),
        ("Granite", "added to the stream times 0.3"),
        ("Llama", ""),
    ],
)
def test_the_listing_says_what_is_added_to_the_stream(family, note):
    model = make(family)
    assert dict(noted_hook_points(model))["model.layers.1.self_attn:out"] == note
    assert ("model.layers.1.self_attn:out" in hook_points_of(model)) is (note == "")


MOE = {
    "Mixtral": ("experts", "gate"),
    "Qwen2Moe": ("experts", "gate", "shared_expert", "shared_expert_gate"),
    "Olmoe": ("experts", "gate"),
    "GptOss": ("experts", "router"),
    "DeepseekV3": ("experts", "gate", "shared_experts"),
    "Qwen3Next": ("experts", "gate", "shared_expert"),
}


@pytest.mark.parametrize("family", MOE)
def test_parts_of_experts_have_a_row_for_each_token_or_name_what_has(family):
    """Their tokens lie flat, so that nothing says which row is which; what is around them has."""
    model, n_refused = make(family), 0
    ids = torch.cat([IDS, IDS.flip(1)])
    for part in MOE[family]:
        point = f"model.layers.1.mlp.{part}:out"
        try:
            rows = _captured(model, point, ids)
        except ValueError as error:
            (around,) = re.findall(r"such as the one around it, (\S+:out)", str(error))
            with pytest.raises(ValueError, match="must carry a stream"):
                _edited(model, point, ids)
            point, n_refused = around, n_refused + 1
            rows = _captured(model, point, ids)
        assert rows.shape == (2, 7, 24)
        alone = [_captured(model, point, one[None]) for one in ids]
        assert torch.allclose(rows, torch.cat(alone), atol=1e-4)
    assert n_refused >= 2


def _captured(model, point, ids):
    with capture(model, [point]) as run:
        return run(ids)[point]


def _edited(model, point, ids):
    with edit(model, {point: lambda h, _: h}):
        model(ids)


def test_a_stream_in_another_order_is_refused():
    config = transformers.XLNetConfig(vocab_size=41, d_model=24, n_layer=2, n_head=4, d_inner=37)
    model = transformers.XLNetLMHeadModel(config).eval()
    point = "transformer.layer.1:out"
    with (
        pytest.raises(ValueError, match=r"must carry a row for each of \(1, 7\) tokens"),
        capture(model, [point]) as run,
    ):
        run(IDS)


def test_compiled_code_is_refused():
    model = make("Llama")
    model.compile(backend="eager")
    where = {"model.layers.1:out": lambda h, _: h}
    with pytest.raises(ValueError, match="must not lie in compiled code"), edit(model, where):
        pass
    other = make("Llama")
    other.model.layers[1].forward = torch.compile(other.model.layers[1].forward, backend="eager")
    with edit(other, where):  # the block's own ends are outside of what is compiled
        pass
    inside = {"model.layers.1.mlp:out": lambda h, _: h}
    with pytest.raises(ValueError, match="must not lie in compiled code"), edit(other, inside):
        pass


@pytest.mark.parametrize(("family", "scale"), [("Llama", 1), ("Granite", 0.125), ("Cohere", 0.25)])
def test_the_readout_gives_differences_of_the_models_own_logits(family, scale):
    model = make(family)
    record = record_of(model)
    assert record.logits is not None
    assert record.logits.scale == pytest.approx(scale, rel=1e-4)
    with capture(model, [record.last]) as run:
        last = run(IDS)[record.last][0]
    centred = last - last.mean(dim=1, keepdim=True) if record.logits.is_centred else last
    result = last @ readout(model).T / centred.square().mean(dim=1, keepdim=True).sqrt()
    logits = model(input_ids=IDS).logits[0]
    assert torch.allclose(result[:, 5] - result[:, 11], logits[:, 5] - logits[:, 11], atol=1e-3)


def test_the_weight_of_a_norm_is_what_it_multiplies_by():
    """Gemma's weight is 1 less than that."""
    model = make("Gemma")
    norm = model.model.norm
    norm.weight.data.normal_(std=0.3)
    expected = model.lm_head.weight * (1 + norm.weight)
    assert torch.allclose(readout(model), expected, atol=1e-5)


class Adapted(nn.Module):
    """A linear layer to which an adapter adds, with the weight of the layer alone."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight = linear, linear.weight
        self.added = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.added(x)


@pytest.mark.parametrize("head", [EightBits, Adapted, torch.nn.utils.parametrizations.weight_norm])
def test_the_readout_is_what_the_head_does_and_not_its_weight(head):
    model = make("Llama")
    model.lm_head = head(model.lm_head)
    record = record_of(model)
    with capture(model, [record.last]) as run:
        last = run(IDS)[record.last][0]
    result = last @ readout(model).T / last.square().mean(dim=1, keepdim=True).sqrt()
    assert torch.allclose(result, model(input_ids=IDS).logits[0], atol=1e-3)


def test_a_head_with_layers_of_its_own_has_no_readout():
    with pytest.raises(ValueError, match="got others from BertForMaskedLM; use"):
        readout(make("Bert"))


def test_a_cache_says_which_package_a_quantised_model_lacks(tiny_model_dir, tmp_path):
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"must be readable by transformers .*ImportError: .*AWQ"):
        load_model(ModelConfig(path=str(tmp_path)))

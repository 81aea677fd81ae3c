"""Where dictionaries were trained, in our words and in those of releases."""

import pytest

from sae.architecture import SAEConfig, Slice
from sae.pretrained.origin import Origin, origin_of, place_of

CONFIG = SAEConfig(d_in=7, d_sae=37)


@pytest.mark.parametrize(
    ("words", "same", "other"),
    [
        ({"hook_name": "blocks.7.hook_resid_post"}, "model.layers.7:out", "model.layers.6:out"),
        ({"hook_name": "blocks.7.hook_resid_post"}, "h.8:in", "transformer.h.7:in"),
        ({"hook_name": "blocks.7.hook_resid_pre"}, "model.layers.6:out", "model.layers.7:out"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "h.0:in", "h.0:out"),
        ({"hook_name": "blocks.7.hook_mlp_out"}, "model.layers.7.mlp:out", "model.layers.7:out"),
        ({"hook_name": "blocks.3.hook_attn_out"}, "h.3.attn:out", "h.3.mlp:out"),
        ({"hook_point_in": "blocks.5.hook_resid_post"}, "model.layers.5:out", "model.layers.9:out"),
        (
            {"hook_point": "layers.15 of the base model"},
            "model.layers.15:out",
            "model.layers.1:out",
        ),
        ({"hook_point": "layers.15.mlp of the base model"}, "a.layers.15.mlp:out", "layers.15:out"),
        ({"submodule_name": "resid_post_layer_3"}, "gpt_neox.layers.3:out", "gpt_neox.layers.3:in"),
        ({"submodule_name": "model.layers.3", "io": "in"}, "model.layers.3:in", "layers.4:in"),
        ({"layer": "12"}, "model.layers.12:out", "model.layers.10:out"),
        ({"layer": "layer12"}, "model.layers.12.mlp:in", "model.layers.2.mlp:in"),
    ],
)
def test_the_places_of_releases_are_compared(words, same, other):
    origin = Origin(words=words)
    assert origin.places((same,)) == []
    (difference,) = origin.places((other,))
    assert (difference.what, difference.used) == ("hook point", other)


@pytest.mark.parametrize(
    "words", [{}, {"hook_name": "blocks.7.attn.hook_z"}, {"hook_point": "embed"}, {"layer": "last"}]
)
def test_what_is_not_understood_is_not_compared(words):
    assert Origin(words=words).places(("model.layers.9:out",)) == []


@pytest.mark.parametrize(
    ("said", "path", "is_same"),
    [
        ("gpt2-small", "openai-community/gpt2", True),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", True),
        ("tiny-stories-33M", "roneneldan/TinyStories-33M", True),
        ("gemma-2-2b", "google/gemma-2-9b", False),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", False),
        ("gpt2-small", "/models/mine", True),
        ("gpt2-small", "package://some/model.gguf", True),
    ],
)
def test_the_models_of_releases_are_compared_by_name(said, path, is_same):
    differences = Origin(words={"model_name": said}).models({"model_sha256": "aa"}, path)
    assert [d[:] for d in differences] == ([] if is_same else [("model", said, path)])


def test_hashes_decide_where_they_are_known():
    origin = Origin(model={"model_sha256": "a", "tokenizer_sha256": "t"}, words={"model": "x"})
    assert origin.models({"model_sha256": "a", "tokenizer_sha256": "t"}, "org/y") == []
    identity = {"model_sha256": "a", "tokenizer_sha256": "u"}
    assert [str(d) for d in origin.models(identity)] == ["tokenizer: trained on t, used on u"]


def test_the_config_speaks_before_the_provenance():
    provenance = {"hook_points": ["h.1:out"], "model": {"model_sha256": "a"}}
    assert origin_of(CONFIG, provenance).inputs == ("h.1:out",)
    config = SAEConfig(d_in=7, d_sae=37, inputs=(Slice(hook_point="h.2:out", width=7),))
    assert origin_of(config, provenance).inputs == ("h.2:out",)
    assert origin_of(config, provenance).model == {"model_sha256": "a"}


def test_a_converted_dictionary_keeps_the_words_of_its_release():
    provenance = {"source": {"site": {"hook_name": "blocks.7.hook_resid_post"}}}
    assert origin_of(CONFIG, provenance).places(("h.7:out",)) == []
    assert origin_of(CONFIG, provenance).places(("h.5:out",)) != []


@pytest.mark.parametrize("record", [{"hook_points": 3}, {"hook_points": [None]}, {"source": []}])
def test_odd_records_are_no_origin(record):
    assert origin_of(CONFIG, record) == Origin()


def test_a_place_without_a_number_is_none():
    assert place_of("lm_head:in") is None

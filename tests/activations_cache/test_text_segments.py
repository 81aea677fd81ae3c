"""Contexts in which a token sees only its own document: the same as reading it alone."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from activations_cache import build, stream
from activations_cache.config import TextConfig, TextSource
from activations_cache.hooks import capture
from activations_cache.isolation import read_documents
from activations_cache.recompute import recompute
from activations_cache.shard import Examples
from activations_cache.text import TooShort, pack, positions_in_segments

SKIP = 2


@pytest.fixture
def config(tiny_cache_config):
    """Glosses of about 26 tokens each, several to a context of 61."""
    glosses = tiny_cache_config.text.sources[1]
    text = dataclasses.replace(
        tiny_cache_config.text, sources=(glosses,), context=61, attention="document"
    )
    return dataclasses.replace(
        tiny_cache_config, text=text, skip_positions=SKIP, n_rows=907, rows_per_shard=127
    )


@pytest.fixture
def packed(config, tiny_tokenizer):
    return pack(config.text, tiny_tokenizer, n_rows=config.n_rows, skip_positions=SKIP)


def test_positions_begin_anew_in_each_segment():
    segments = np.array([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    wanted = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert positions_in_segments(segments).tolist() == wanted


def test_each_segment_is_a_piece_of_one_document(packed):
    assert packed.segments.max() >= 2
    for tokens, owners, segments in zip(
        packed.tokens, packed.documents, packed.segments, strict=True
    ):
        for segment in segments.unique():
            here = segments == segment
            real = here & (tokens != -1)
            assert len(owners[real].unique()) == 1
            assert here.nonzero()[0] <= 61 - (SKIP + 1)
    assert (packed.documents[packed.tokens == -1] == -1).all()


def test_enough_rows_are_given_though_pieces_and_padding_give_fewer(packed, config):
    segments = positions_in_segments(packed.segments.numpy())
    gives = (segments >= SKIP) & (packed.tokens.numpy() != -1)
    assert gives[packed.split < 2].sum() >= config.n_rows


def test_a_document_is_read_as_if_it_stood_alone(packed, causal_model):
    examples = Examples(
        tokens=packed.tokens,
        split=packed.split,
        source=packed.source,
        source_names=packed.source_names,
        segment=packed.segments,
    )
    blocks = "model.layers" if hasattr(causal_model, "model") else "transformer.h"
    hook_point = f"{blocks}.3:out"
    ids = examples.tokens[:5].clamp_min(0)
    with capture(causal_model, [hook_point]) as run:
        packed_rows, rows = (
            read_documents(run, examples, slice(0, 5), way, is_causal=True)[hook_point]
            for way in ("positions", "rows")
        )
        real = packed.tokens[:5] != -1
        assert torch.allclose(rows[real], packed_rows[real], atol=1e-4, rtol=1e-4)
        for example in range(5):
            for segment in packed.segments[example].unique():
                here = (packed.segments[example] == segment) & (packed.tokens[example] != -1)
                alone = run(ids[example, here][None])[hook_point][0]
                assert torch.allclose(packed_rows[example, here], alone, atol=1e-4, rtol=1e-4)
        mixed = run(ids)[hook_point]
    other = packed.segments[:5] == 1
    assert not torch.allclose(mixed[other], packed_rows[other], atol=1e-2, rtol=1e-2)


def test_the_cache_and_the_stream_have_the_same_rows_and_the_model_agrees(
    config, tiny_model, tmp_path: Path
):
    cache = build(config, tmp_path)
    refs = cache.refs(cache.rows())
    within = torch.from_numpy(positions_in_segments(cache.examples.segment.numpy()))
    assert (within[refs.example, refs.position] >= SKIP).all()
    assert len(cache.rows()) == (within >= SKIP).logical_and(cache.examples.tokens != -1).sum()
    live = stream(config)
    assert torch.equal(live.rows(), cache.rows())
    hook_point = config.hook_points[0]
    for batch in live.batches([hook_point], batch=61, seed=3):
        assert torch.allclose(batch.x, cache[hook_point][batch.rows], atol=1e-5, rtol=1e-5)
    assert cache.verify() == []
    assert recompute(cache, tiny_model) == []


def test_every_piece_begins_with_what_the_tokenizer_puts_in_front(
    tiny_tokenizer, tiny_records: Path
):
    front = tiny_tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    before = front.post_processor
    front.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    try:
        source = TextSource(path=str(tiny_records), field="gloss")
        text = TextConfig(sources=(source,), context=61, attention="document")
        packed = pack(text, tiny_tokenizer, n_rows=307)
    finally:
        front.post_processor = before
    begins = torch.from_numpy(positions_in_segments(packed.segments.numpy())) == 0
    assert (packed.tokens[begins] == 0).all()
    assert (packed.documents[begins] == -1).all()
    assert begins.sum() > len(packed.tokens)


def test_text_that_is_too_short_is_told_in_the_rows_that_were_asked_for(config, tiny_tokenizer):
    def rows_of(n_rows: int) -> str:
        with pytest.raises(TooShort) as error:
            pack(config.text, tiny_tokenizer, n_rows=n_rows, skip_positions=SKIP)
        return str(error.value)

    most = next(
        n for n in range(12001, 4001, -97) if pack_or_none(config, tiny_tokenizer, n) is not None
    )
    said = rows_of(most + 97)
    assert f"must give at least {most + 97} rows of explain and score, got " in said
    assert "pieces of documents fill no whole contexts" in said


def pack_or_none(config, tokenizer, n_rows: int):
    with contextlib.suppress(TooShort):
        return pack(config.text, tokenizer, n_rows=n_rows, skip_positions=SKIP)
    return None

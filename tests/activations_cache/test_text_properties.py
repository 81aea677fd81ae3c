"""Any documents, any sizes: the rows of a cache against a brute-force account of every token."""

import contextlib
import hashlib
from types import MappingProxyType

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from activations_cache import corpus, text
from activations_cache.config import TextConfig, TextSource
from activations_cache.documents import Document
from activations_cache.manifest import Plan
from activations_cache.shard import Examples, rows_of
from activations_cache.text import pack

FRONT = 1
SEPARATOR = [7, 8]


class Words(PreTrainedTokenizerBase):
    """A tokenizer: one id from 100 on per word, a BOS (1) in front if there is one."""

    def __init__(self, has_bos: bool):
        object.__setattr__(self, "has_bos", has_bos)

    unk_token_id = None
    all_special_ids = (FRONT,)
    added_tokens_decoder = MappingProxyType({})

    def __len__(self):
        return 126

    def convert_ids_to_tokens(self, ids):
        return ["<s>" for _ in ids]

    def decode(self, ids):
        return "".join(chr(97 + i - 100) if i >= 100 else "" for i in ids)

    def __call__(self, texts, add_special_tokens: bool = True, **_):
        if isinstance(texts, str):
            front = [FRONT] if self.has_bos and add_special_tokens else []
            return {"input_ids": front + self._ids(texts)}
        return {"input_ids": [self._ids(given) for given in texts]}

    def _ids(self, given: str) -> list[int]:
        return SEPARATOR if given == "\n\n" else [100 + ord(c) - 97 for c in given]


cases = st.fixed_dictionaries({
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=12),
    "context": st.integers(4, 23),
    "skip": st.integers(0, 3),
    "has_bos": st.booleans(),
    "attention": st.sampled_from(["context", "document"]),
    "n_rows": st.integers(1, 60),
})


def documents_of(lengths: list[int]) -> list[Document]:
    """Documents of so many letters, each different."""
    made = []
    for number, length in enumerate(lengths):
        digest = hashlib.sha256(str(number).encode()).hexdigest() * 2
        made.append(
            Document(f"d:{number}", "".join(chr(97 + int(c, 16)) for c in digest[:length]), None)
        )
    return made


def check(case: dict, monkeypatch: pytest.MonkeyPatch) -> bool:
    documents = documents_of(case["lengths"])
    monkeypatch.setattr(corpus, "documents", lambda *_: iter(documents))
    skip, context = case["skip"], case["context"]
    config = TextConfig(
        sources=(TextSource(path="d.txt"),), context=context, attention=case["attention"],
        explain=1.0, score=0.0, hold=0.0,
    )  # fmt: skip
    packed = None
    with contextlib.suppress(text.TooShort):
        packed = pack(config, Words(case["has_bos"]), n_rows=case["n_rows"], skip_positions=skip)
    if packed is None:
        return False
    examples = Examples(
        tokens=packed.tokens, split=packed.split, source=packed.source,
        source_names=packed.source_names, segment=packed.segments,
    )  # fmt: skip
    plan = Plan(
        made_from={}, hook_points={"h:out": 1}, dtype="float32", context=context,
        skip_positions=skip, rows_per_shard=1009, n_examples=len(examples), source_names=("d",),
        has_segments=packed.segments is not None,
    )  # fmt: skip
    acts = torch.arange(packed.tokens.numel()).view(*packed.tokens.shape, 1).float()
    rows, kept_out = rows_of(plan, examples, range(len(examples)), {"h:out": acts})
    assert kept_out == []
    wanted = brute_force(packed, documents, skip)
    result = zip(rows.example.tolist(), rows.position.tolist(), rows.token.tolist(), strict=True)
    assert list(result) == wanted
    assert rows.acts["h:out"].flatten().tolist() == [e * context + p for e, p, _ in wanted]
    assert len(wanted) >= case["n_rows"]
    check_text(packed, documents, case)
    return True


def brute_force(packed, documents: list[Document], skip: int) -> list[tuple[int, int, int]]:
    """Go through every position of every context."""
    results = []
    for example, tokens in enumerate(packed.tokens.tolist()):
        within = 0
        for position, token in enumerate(tokens):
            segments = packed.segments
            if segments is not None and position:
                same = segments[example][position] == segments[example][position - 1]
                within = within + 1 if same else 0
            elif position:
                within += 1
            if token != -1 and within >= skip:
                results.append((example, position, token))
    return results


def check_text(packed, documents: list[Document], case: dict) -> None:
    """Every token of a document stands where its owner says, in order, and no token twice."""
    letters = {i: [] for i in range(len(packed.document_ids))}
    n_other = 0
    for tokens, owners in zip(packed.tokens.tolist(), packed.documents.tolist(), strict=True):
        for token, owner in zip(tokens, owners, strict=True):
            if owner >= 0:
                letters[owner].append(token)
            else:
                n_other += 1
                assert token in {-1, FRONT, *SEPARATOR}
    texts = {document.id: document.text for document in documents}
    if case["attention"] == "document":
        for owner, result in letters.items():  # contexts are in another order than pieces
            whole = [100 + ord(c) - 97 for c in texts[packed.document_ids[owner]]]
            assert sorted(result) == sorted(whole)[: len(result)] or len(result) < len(whole)
            assert len(result) <= len(whole)
    assert n_other + sum(map(len, letters.values())) == packed.tokens.numel()


def run(n_cases: int, monkeypatch: pytest.MonkeyPatch) -> int:
    packed = 0

    @hypothesis.settings(
        max_examples=n_cases, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(cases)
    def one(case: dict) -> None:
        nonlocal packed
        packed += check(case, monkeypatch)

    one()
    return packed


def test_rows_are_what_brute_force_counts(monkeypatch, figure):
    assert run(300, monkeypatch) > 100
    figure("R7", "300 texts and settings: the rows are those that brute force counts")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_rows_are_what_brute_force_counts_in_two_thousand_cases(monkeypatch, figure):
    assert run(2000, monkeypatch) > 700
    figure("R7", "2,000 texts and settings: the rows are those that brute force counts")

"""The configuration refuses what makes no sense, and needs nothing slow."""

import subprocess
import sys

import pytest

from sae.explain.config import ALL_KINDS, KINDS, ExplainConfig


def test_default_lets_all_kinds_but_pairs_compete():
    assert ExplainConfig().kinds == KINDS
    assert set(ALL_KINDS) - set(KINDS) == {"word pair"}
    assert ExplainConfig(kinds=ALL_KINDS).kinds == ALL_KINDS
    assert KINDS[0] == "word"


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("min_firings", 1, "be at least 2"),
        ("min_examples", 1, "be at least 2"),
        ("words_per_label", 0, "be at least 1"),
        ("wide_words", 4, "lie between words_per_label=5 and 255"),
        ("wide_words", 256, "lie between words_per_label=5 and 255"),
        ("min_word_count", 0, "be at least 1"),
        ("prior_rows", 0.0, "be a positive number"),
        ("prior_rows", float("inf"), "be a positive number"),
        ("permutations", 1, "be at least 2"),
        ("top_contexts", 0, "be at least 1"),
        ("context_tokens", 0, "be at least 1"),
        ("histogram_bins", 0, "be at least 1"),
        ("seed", -1, "be at least 0"),
        ("kinds", (), "be one or more of"),
        ("kinds", ("word", "word"), "each once"),
    ],
)
def test_wrong_field_is_named_first(field: str, value: object, rule: str):
    with pytest.raises(ValueError, match=f"^{field} must .*{rule}.*, got "):
        ExplainConfig(**{field: value})  # type: ignore[arg-type]


def test_config_imports_nothing_slow():
    code = (
        "import sys, sae.explain.config as c; c.ExplainConfig(); "
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_kind_is_refused():
    """In a process of its own, since here the type checker would be first."""
    code = "from sae.explain.config import ExplainConfig as C; C(kinds=('letter',))"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "MonosemaError: kinds must be one or more of ('word'" in done.stderr


def test_package_refuses_unknown_names():
    import sae.explain

    with pytest.raises(AttributeError, match=r"'sae\.explain' has no attribute 'labels_of'"):
        _ = sae.explain.labels_of  # type: ignore[attr-defined]
    assert callable(sae.explain.explain)
    assert callable(sae.explain.promoted_tokens)

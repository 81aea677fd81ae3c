import pytest

from sae.evaluate.config import EvaluateConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_contexts", 0, r"^n_contexts must be at least 1, got 0$"),
        ("contexts_per_forward", 0, r"^contexts_per_forward must be at least 1, got 0$"),
        ("rows_per_chunk", -1, r"^rows_per_chunk must be at least 1, got -1$"),
        ("n_resamples", 0, r"^n_resamples must be at least 1, got 0$"),
        ("n_rows_firing", -5, r"^n_rows_firing must be at least 0, got -5$"),
        ("seed", -1, r"^seed must be at least 0, got -1$"),
        ("n_contexts_special", 25, r"^n_contexts_special must be at most n_contexts=24, got 25$"),
    ],
)
def test_a_wrong_size_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{field: value})

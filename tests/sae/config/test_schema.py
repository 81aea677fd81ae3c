"""What a schema says of itself, in words."""

from pathlib import Path
from typing import Literal, Optional

import pytest

from sae.config import Key, describe
from sae.config.schema import expected


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (Optional[bool], "true or false or null"),  # noqa: UP045
        (Literal["a", "b"], "one of 'a', 'b'"),
        (Literal["a"] | int, "'a' or an integer"),
        (tuple[int, ...], "a list"),
        (list[str], "a list"),
        (tuple[int, str], "a list of 2"),
        (dict[str, int] | None, "a mapping or null"),
        (Path | str, "a path or text"),
    ],
)
def test_expected(annotation, words):
    assert expected(annotation) == words


def test_describe_lists_every_key_with_type_default_and_doc(schema):
    keys = describe(schema.Run)
    assert keys[0] == Key("title", "text", "required", "Heading of the page.")
    by_path = {key.path: key for key in keys}
    assert len(by_path) == len(keys) == 28
    assert by_path["share"] == Key("share", "a number", "1.0", "")
    assert by_path["text.context"].doc == "Tokens per\ncontext."
    assert by_path["text.sources.N.share"].default == "1.0"
    assert by_path["saes.NAME.activation"].type == "a mapping"
    assert by_path["saes.NAME.activation(topk).k"].doc == "Latents that may fire."
    assert by_path["saes.NAME.activation(relu).limits"].default == "its own defaults"
    assert by_path["saes.NAME.schedule"] == Key(
        "saes.NAME.schedule", "a mapping or null", "None", ""
    )

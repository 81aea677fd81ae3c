"""The exact line for everything that can be wrong with a configuration."""

from pathlib import Path

import pytest

from sae.config import ConfigError, load

TOP_KEYS = (
    "'title', 'n_rows', 'text', 'saes', 'share', 'quick', 'dtype', 'hook_points', 'betas', "
    "'revision', 'device', 'cache'"
)
KINDS = "one of 'relu', 'topk', 'batch_topk'"

ONE_VALUE = [
    # an override, and what the line says after the override's name
    ("n_rows=many", "n_rows must be an integer, got 'many'"),
    ("n_rows=1.5", "n_rows must be an integer, got 1.5"),
    ("n_rows=1e3", "n_rows must be an integer, got 1000.0"),
    ("n_rows=true", "n_rows must be an integer, got true"),
    ("n_rows=", "n_rows must be an integer, got null"),
    ("n_rows='3'", "n_rows must be an integer, got '3'"),
    ("n_rows=[3]", "n_rows must be an integer, got a list of 1"),
    ("n_rows={a: 1}", "n_rows must be an integer, got a mapping"),
    ("n_rows=.nan", "n_rows must be an integer, got nan"),
    ("n_rows=9223372036854775808", "line 1, column 1: an integer must fit in 64 bits"),
    ("share=half", "share must be a number, got 'half'"),
    ("share=false", "share must be a number, got false"),
    ("share=.nan", "share must be a finite number, got nan"),
    ("share=-.inf", "share must be a finite number, got -inf"),
    ("share=1e999", "share must be a finite number, got inf"),
    ("share='0.5'", "share must be a number, got '0.5'"),
    ("title=3", "title must be text, got 3"),
    ("title=null", "title must be text, got null"),
    ("title=~", "title must be text, got null"),
    ("quick=1", "quick must be true or false, got 1"),
    ("quick=yes", "quick must be true or false, got 'yes'"),
    ("quick=off", "quick must be true or false, got 'off'"),
    ("revision=3", "revision must be text or null, got 3"),
    ("device=1.5", "device must be an integer or text, got 1.5"),
    ("device=true", "device must be an integer or text, got true"),
    ("cache=3", "cache must be a path or null, got 3"),
    (
        "dtype=bfloat61",
        "dtype must be one of 'bfloat16', 'float32', got 'bfloat61'; did you mean 'bfloat16'?",
    ),
    ("dtype=half", "dtype must be one of 'bfloat16', 'float32', got 'half'"),
    ("dtype=null", "dtype must be one of 'bfloat16', 'float32', got null"),
    ("saes.wide.frozen=encoder", "saes.wide.frozen must be 'decoder' or null, got 'encoder'"),
    ("hook_points=layers.3:out", "hook_points must be a list, got 'layers.3:out'"),
    ("hook_points=[a, 3]", "hook_points.1 must be text, got 3"),
    ("hook_points.0=null", "hook_points.0 must be text, got null"),
    ("text.sources.1.path=a.txt", "text: the files must differ"),
    ("hook_points.2=a", "hook_points.2 must be an index below 2"),
    ("hook_points.-1=a", "hook_points.-1 must be an index below 2"),
    ("hook_points.x.y=a", "hook_points.x must be an index below 2"),
    ("betas=[0.9]", "betas must be a list of 2, got a list of 1"),
    ("betas=[0.9, 0.99, 0.999]", "betas must be a list of 2, got a list of 3"),
    ("betas=[0.9, x]", "betas.1 must be a number, got 'x'"),
    ("text=here", "text must be a mapping, got 'here'"),
    ("text.context=1", "text.context must be at least 2, got 1"),
    ("text.context=1.0", "text.context must be an integer, got 1.0"),
    ("text.contexts=3", "text.contexts is not a key of text; did you mean 'context'?"),
    ("text.sources.0.share=x", "text.sources.0.share must be a number, got 'x'"),
    (
        "text.sources.1.path=/b",
        "text.sources.1.path must be relative, got '/b'; write it from here",
    ),
    (
        "text.sources.0.paht=x",
        "text.sources.0.paht is not a key of text.sources.0; did you mean 'path'?",
    ),
    ("text.sources={}", "text.sources must be a list, got a mapping"),
    ("saes=[]", "saes must be a mapping, got a list of 0"),
    ("saes.wide=3", "saes.wide must be a mapping, got 3"),
    (
        "saes.wide.activation.kk=3",
        "saes.wide.activation.kk is not a key of topk; did you mean 'k'?",
    ),
    (
        "saes.wide.activation.width=3",
        "saes.wide.activation.width is not a key of topk; there are 'k', 'kind'",
    ),
    ("saes.wide.activation.k=x", "saes.wide.activation.k must be an integer, got 'x'"),
    ("saes.wide.activation.k=0", "saes.wide.activation.k must be at least 1, got 0"),
    ("saes.wide.activation.k=65", "saes.wide.activation.k must be at most d_sae=64, got 65"),
    ("saes.wide.activation=topk", "saes.wide.activation must be a mapping, got 'topk'"),
    ("saes.wide.activation=null", "saes.wide.activation must be a mapping, got null"),
    (
        "saes.wide.activation.kind=tpok",
        f"saes.wide.activation.kind must be {KINDS}, got 'tpok'; did you mean 'topk'?",
    ),
    (
        "saes.wide.activation.kind=3",
        "saes.wide.activation.kind must be one of 'relu', 'topk', 'batch_topk', got 3",
    ),
    (
        "saes.wide.activation={k: 3}",
        "saes.wide.activation.kind is missing; it must be one of 'relu', 'topk', 'batch_topk'",
    ),
    (
        "saes.wide.activation={kind: topk}",
        "saes.wide.activation.k is missing; it must be an integer",
    ),
    ("saes.wide.schedule=3", "saes.wide.schedule must be a mapping or null, got 3"),
    (
        "saes.plain.activation.limits.low=x",
        "saes.plain.activation.limits.low must be a number, got 'x'",
    ),
    (
        "saes.plain.activation.k=3",
        "saes.plain.activation.k is not a key of relu; there are 'kind', 'limits'",
    ),
    ("saes.new.d_sae=3", "saes.new.activation is missing; it must be a mapping"),
    ("n_row=3", "n_row is not a top-level key; did you mean 'n_rows'?"),
    ("texts.context=3", "texts is not a top-level key; did you mean 'text'?"),
    ("n_rows.x=3", "n_rows must be a mapping, got 4096"),
    ("title.a.b=3", "title must be a mapping, got 'a run'"),
    ("n_rows=[1,", "line 1, column 4: expected the node content, but found '<stream end>'"),
    ("n_rows=*a", "line 1, column 1: an alias must be written out"),
    ("n_rows=!!int 3", "line 1, column 1: a tag must be left out"),
    ("n_rows", "must have the form dotted.key=value"),
    ("=3", "must have the form dotted.key=value"),
    ("", "must have the form dotted.key=value"),
    ("text..context=3", "must have the form dotted.key=value"),
    ("text.=3", "must have the form dotted.key=value"),
]


@pytest.mark.parametrize(("override", "line"), ONE_VALUE)
def test_a_bad_override_is_named(schema, file, override, line):
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file, [override])
    assert str(refusal.value) == f"override {override!r}: {line}"


IN_THE_FILE = [
    # text of the valid file, what takes its place, and the line
    ("n_rows: 4096", "n_rows: many", "n_rows must be an integer, got 'many'"),
    ("n_rows: 4096\n", "", "n_rows is missing; it must be an integer"),
    ("n_rows: 4096", "n_row: 4096", "n_row is not a top-level key; did you mean 'n_rows'?"),
    ("n_rows: 4096", "n_rows: 4_096", "n_rows must be an integer, got '4_096'"),
    ("context: 16", "context: 1", "text.context must be at least 2, got 1"),
    ("context: 16", "contxt: 16", "text.contxt is not a key of text; did you mean 'context'?"),
    ("b.txt", "a.txt", "text: the files must differ"),
    (
        "kind: topk, k: 8",
        "k: 8",
        "saes.wide.activation.kind is missing; it must be one of 'relu', 'topk', 'batch_topk'",
    ),
    ("kind: topk, k: 8", "kind: topk", "saes.wide.activation.k is missing; it must be an integer"),
    ("d_sae: 64", "d_sae: 4", "saes.wide.activation.k must be at most d_sae=4, got 8"),
    ("    - path: a.txt\n", "    - share: 3\n", "text.sources.0.path is missing; it must be text"),
    ("title: a run", "title: a run\ntitle: b", "line 2, column 1: the key 'title' is there twice"),
    (
        "title: a run",
        "<<: {title: a}",
        f"<< is not a top-level key; there are {TOP_KEYS} (and 1 more)",
    ),
    ("title: a run", "? [a]\n: b", "line 1, column 3: a key must be a single word"),
    ("title: a run", "title: [a", "line 2, column 7: expected ',' or ']', but got ':'"),
    (
        "title: a run",
        "title: &a a\nrevision: *a",
        "line 2, column 11: an alias must be written out",
    ),
    (
        "title: a run",
        "title: !!python/name:os.system x",
        "line 1, column 8: a tag must be left out",
    ),
    (
        "title: a run",
        "\ttitle: a",
        "line 1, column 1: found character '\\t' that cannot start any token",
    ),
    ("title: a run", "title: a\x00b", "character 9: '\\x00' is not allowed"),
    (
        "title: a run",
        'title: "\\ud800"',
        "line 1, column 8: text must be Unicode, not half of a surrogate pair",
    ),
    (
        "title: a run",
        "3: 4\ntitle: a",
        f"3 is not a top-level key; there are {TOP_KEYS}",
    ),
    (
        "title: a run",
        f"title: {'[' * 40}",
        "line 1, column 39: at most 32 levels of nesting are read",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), IN_THE_FILE)
def test_a_bad_file_is_named_with_its_key(schema, file, old, new, line):
    assert schema.VALID.count(old) == 1
    file.write_text(schema.VALID.replace(old, new))
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file)
    assert str(refusal.value) == f"run.yaml: {line}"


WHOLE_FILES = [
    (b"", "the top level must be a mapping, got null"),
    (b"# nothing\n", "the top level must be a mapping, got null"),
    (b"- a\n- b\n", "the top level must be a mapping, got a list of 2"),
    (b"just words", "the top level must be a mapping, got 'just words'"),
    (b"title: \xff", "must be UTF-8, byte 8 is not"),
    (
        b"a: 1\n---\nb: 2\n",
        "line 2, column 1: expected a single document in the stream, but found another document",
    ),
    (b'a: "\\UFFFFFFFF"', "an escape or a directive has a number that is too large"),
    (b"#" * (2**20 + 1), "must be at most 1048576 bytes, got more"),
    (b"{}", "title is missing; it must be text (and 3 more)"),
]


@pytest.mark.parametrize(("content", "line"), WHOLE_FILES)
def test_a_file_that_is_no_configuration(schema, file, content, line):
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file)
    assert str(refusal.value) == f"run.yaml: {line}"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("absent.yaml", "absent.yaml: there is no such file"),
        ("a\nb.yaml", "a\\nb.yaml: there is no such file"),
        (".", ".: cannot be read: Is a directory"),
        ("run.yaml/x", "run.yaml/x: cannot be read: Not a directory"),
        ("a\x00b", "a\\x00b: embedded null byte"),
    ],
)
def test_a_path_without_a_file(schema, file, path, line):
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, path)
    assert str(refusal.value) == line


def test_a_file_that_cannot_be_read(schema, file):
    Path("loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match=r"^loop\.yaml: cannot be read: Too many levels of symb"):
        load(schema.Run, "loop.yaml")


def test_the_first_problem_of_the_file_is_told_and_the_others_counted(schema, file):
    bad = schema.VALID.replace("share: 0.5", "share: x").replace("d_sae: 64", "d_sae: y")
    file.write_text(bad.replace("context: 16", "context: 1"))
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file, ["quick=3"])
    assert str(refusal.value) == "run.yaml: share must be a number, got 'x' (and 3 more)"


def test_the_file_is_named_where_an_override_is_not_at_fault(schema, file):
    file.write_text(schema.VALID.replace("share: 0.5", "share: x"))
    with pytest.raises(ConfigError, match=r"^run\.yaml: share must be a number, got 'x'$"):
        load(schema.Run, file, ["n_rows=3", "text.context=8"])


def test_a_long_or_unprintable_value_is_echoed_short_and_escaped(schema, file):
    text = "x" * 500 + "\\n\\x1b"
    file.write_text(f'{schema.VALID}dtype: "\\e[2J{text}"\n')
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file)
    expected = "run.yaml: dtype must be one of 'bfloat16', 'float32', got '\\x1b[2J" + "x" * 69
    assert str(refusal.value) == expected + "..."


def test_a_value_in_the_message_of_a_check_is_echoed_short_too(schema, file):
    with pytest.raises(ConfigError) as refusal:
        load(schema.Run, file, [f"text.sources.0.path=/{'y' * 500}"])
    assert len(str(refusal.value)) < 300
    assert str(refusal.value).endswith("...; write it from here")


def test_a_key_that_is_not_printable_is_escaped(schema, file):
    file.write_text(schema.VALID + '"a\\nb": 3\n')
    with pytest.raises(ConfigError, match=r"^run\.yaml: a\\nb is not a top-level key; there are"):
        load(schema.Run, Path("run.yaml"))


def test_too_many_keys_in_an_override(schema, file):
    with pytest.raises(ConfigError, match="must have at most 32 keys, got more"):
        load(schema.Run, file, [".".join("a" * 5000) + "=1"])

"""What a valid file gives, and that it comes back the same from `dump`."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sae.config import ConfigError, digest, dump, from_dict, load, to_dict
from sae.explain.config import ExplainConfig, ImageLabelConfig


def test_a_valid_file_becomes_the_schemas_own_objects(schema, file):
    run = load(schema.Run, file)
    sources = (schema.Source(path="a.txt"), schema.Source(path="b.txt", share=2.0))
    assert run == schema.Run(
        title="a run",
        n_rows=4096,
        share=0.5,
        quick=False,
        hook_points=("layers.3:out", "layers.5:in"),
        betas=(0.9, 0.99),
        text=schema.Text(context=16, sources=sources),
        saes={
            "wide": schema.Dictionary(d_sae=64, activation=schema.TopK(k=8)),
            "plain": schema.Dictionary(
                d_sae=32, activation=schema.ReLU(limits={"low": 0.0, "high": 1.5})
            ),
        },
    )
    assert type(run.text.sources[1].share) is float


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("n_rows=3", lambda run: run.n_rows == 3),
        ("n_rows=0x10", lambda run: run.n_rows == 16),
        ("share=3e-3", lambda run: run.share == 0.003),
        ("share=1e3", lambda run: run.share == 1000.0),
        ("share=2", lambda run: run.share == 2.0 and type(run.share) is float),
        ("title=no", lambda run: run.title == "no"),
        ("title='3'", lambda run: run.title == "3"),
        ("title=a=b", lambda run: run.title == "a=b"),
        ("title=''", lambda run: run.title == ""),
        ("title=2026-11-05", lambda run: run.title == "2026-11-05"),
        ("quick=True", lambda run: run.quick is True),
        ("revision=main", lambda run: run.revision == "main"),
        ("revision=", lambda run: run.revision is None),
        ("revision=null", lambda run: run.revision is None),
        ("device=cuda", lambda run: run.device == "cuda"),
        ("device=3", lambda run: run.device == 3),
        ("cache=runs/cache", lambda run: run.cache == Path("runs/cache")),
        ("dtype=bfloat16", lambda run: run.dtype == "bfloat16"),
        ("saes.wide.activation.k=64", lambda run: run.saes["wide"].activation.k == 64),
        ("saes.wide.activation.kind=batch_topk", lambda r: r.saes["wide"].activation.k == 8),
        ("saes.wide.activation={kind: relu}", lambda run: run.saes["wide"].activation.limits == {}),
        ("saes.plain.frozen=decoder", lambda run: run.saes["plain"].frozen == "decoder"),
        ("text.sources.0.share=2", lambda run: run.text.sources[0].share == 2.0),
        ("text.sources=[{path: c.txt}]", lambda run: run.text.sources[0].path == "c.txt"),
        ("hook_points.1=layers.7:out", lambda run: run.hook_points[1] == "layers.7:out"),
        ("betas=[0, 1]", lambda run: run.betas == (0.0, 1.0)),
    ],
)
def test_an_override_sets_one_value(schema, file, override, read):
    assert read(load(schema.Run, file, [override]))


def test_an_override_makes_the_mappings_on_its_way(schema, file):
    overrides = ["saes.new.d_sae=5", "saes.new.activation.kind=topk", "saes.new.activation.k=2"]
    run = load(schema.Run, file, overrides)
    assert run.saes["new"] == schema.Dictionary(d_sae=5, activation=schema.TopK(k=2))
    assert list(run.saes) == ["wide", "plain", "new"]


def test_a_null_on_the_way_of_an_override_becomes_a_mapping(schema, file):
    file.write_text(schema.VALID + "  null_schedule: {d_sae: 3, activation: {kind: relu}}\n")
    overrides = ["saes.wide.schedule=null", "saes.wide.schedule.kind=relu"]
    assert load(schema.Run, file, overrides).saes["wide"].schedule == schema.ReLU()


def test_the_last_override_of_a_key_wins(schema, file):
    assert load(schema.Run, file, ["n_rows=3", "n_rows=5"]).n_rows == 5


def test_dump_is_read_back_as_the_same_configuration(schema, file):
    run = load(schema.Run, file, ["title='1e3'", "revision='null'", "share=1e-7"])
    file.write_text(dump(run))
    assert load(schema.Run, file) == run


def test_from_dict_reads_what_to_dict_wrote(schema, file):
    run = load(schema.Run, file)
    assert from_dict(schema.Run, to_dict(run), "checkpoint") == run
    with pytest.raises(ConfigError, match=r"^checkpoint: n_rows must be an integer, got null$"):
        from_dict(schema.Run, {**to_dict(run), "n_rows": None}, "checkpoint")


def test_to_dict_refuses_what_is_not_plain_data():
    with pytest.raises(TypeError, match="must hold plain data, got set"):
        to_dict({"a": [{1, 2}]})


def test_digest_is_of_the_values_alone(schema, file):
    run = load(schema.Run, file)
    assert digest(run) == digest(to_dict(run)) == digest(dict(reversed(to_dict(run).items())))
    assert digest(replace(run, share=1)) == digest(replace(run, share=1.0))
    assert digest(run) != digest(replace(run, n_rows=4097))
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_the_schema_is_not_changed_by_reading(schema, file):
    load(schema.Run, file)
    assert not [name for name in vars(schema.Run) if "pydantic" in name]
    assert schema.Run(title=3, n_rows="x", text=None, saes={}).n_rows == "x"


def test_a_class_with_slots_is_a_schema_too(file):
    @dataclass(frozen=True, slots=True)
    class Small:
        n: int

    file.write_text("n: 3")
    assert load(Small, file) == Small(3)


def test_a_renamed_key_is_read_by_either_name_and_identities_have_the_former_one():
    images = ImageLabelConfig(images_per_fifth=2)
    now = ExplainConfig(contexts_per_fifth=3, images=images)
    former = {"bucket_contexts": 3, "images": {"bucket_images": 2}}
    assert from_dict(ExplainConfig, former, "FILE") == now
    assert from_dict(ExplainConfig, to_dict(now), "FILE") == now
    assert to_dict(now)["contexts_per_fifth"] == 3
    recorded = to_dict(now, all_keys=False)
    assert recorded["bucket_contexts"] == 3
    assert recorded["images"]["bucket_images"] == 2
    assert digest(now) == digest(recorded)
    # as it was when these keys had their former names
    assert digest(ExplainConfig()).startswith("eeb7308d48fc732c")
    with pytest.raises(ConfigError, match="FILE: bucket_contexts is not a top-level key"):
        from_dict(ExplainConfig, {"bucket_contexts": 3, "contexts_per_fifth": 3}, "FILE")

from dataclasses import replace

from benchmarks.bench_loop import RATIOS, measure, measure_live


def test_both_loops_are_timed_on_the_same_steps(tmp_path):
    found = measure(tmp_path, rounds=1, n_steps=7)
    for name in RATIOS:
        assert 0 < found[name]["min"] == found[name]["median"] == found[name]["max"]
    assert found["bare_step_ms"] > 0


def test_a_live_model_is_timed_on_as_many_rows(tmp_path, tiny_cache_config):
    made_by = replace(tiny_cache_config, hook_points=("model.layers.1:out",), n_rows=300)
    found = measure_live(tmp_path, rounds=1, n_steps=3, made_by=made_by)
    assert found["shape"] == {"batch": 1024, "d_in": 23, "d_sae": 1152}
    assert found["ratio_clock"]["median"] > 0

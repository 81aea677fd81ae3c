from benchmarks.bench_loop import RATIOS, measure


def test_both_loops_are_timed_on_the_same_steps(tmp_path):
    found = measure(tmp_path, rounds=1, n_steps=7)
    for name in RATIOS:
        assert 0 < found[name]["min"] == found[name]["median"] == found[name]["max"]
    assert found["bare_step_ms"] > 0

from sae.train.curves import read_curves


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    logs = tmp_path / "logs" / "csv"
    header = "a/fvu,a/l0,rows,step\n"
    for start, lines in ((0, "0.9,3,20,2\n0.8,4,40,4\n0.7,5,60,6\n"), (4, "0.5,6,60,6\n")):
        (logs / f"from-step-{start:08d}").mkdir(parents=True)
        (logs / f"from-step-{start:08d}" / "metrics.csv").write_text(header + lines)
    curve = read_curves(tmp_path)["a"]
    assert curve == {"rows": (20, 40, 60), "fvu": (0.9, 0.8, 0.5), "l0": (3, 4, 6)}
    assert read_curves(tmp_path / "nothing") == {}

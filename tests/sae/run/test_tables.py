"""The table at the end of a training run."""

from sae.run.tables import training_row, training_table


def test_a_row_has_means_of_the_last_batches_and_the_time_of_its_own_steps():
    curve = {
        "rows": (100.0, 200.0, 300.0),
        "fvu": (0.9, 0.4, 0.2),
        "l0": (9.0, 4.0, 3.0),
        "dead": (0.0, 0.1, 0.2),
        "rows_per_second": (100.0, 50.0, 100.0),
    }
    assert training_row("a", curve, 2) == ("a", "0.300", "3.5", "15.0%", "75", "4.0 s")
    assert training_row("a", {"rows": (100.0,), "fvu": (0.5,)}, 1)[-2:] == ("-", "-")


def test_the_table_names_every_dictionary(tmp_path):
    logs = tmp_path / "logs" / "csv" / "from-step-00000000"
    logs.mkdir(parents=True)
    text = "a/fvu,a/l0,a/dead,b/fvu,b/l0,b/dead,rows,step\n0.5,3,0,0.25,4,0.5,20,2\n"
    (logs / "metrics.csv").write_text(text)
    assert training_table(tmp_path).rows == (
        ("a", "0.500", "3.0", "0.0%", "-", "-"),
        ("b", "0.250", "4.0", "50.0%", "-", "-"),
    )

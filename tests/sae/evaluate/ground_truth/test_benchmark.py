import sys

from benchmarks import ground_truth


def test_the_benchmark_trains_scores_and_prints_one_table(easy, monkeypatch, capsys):
    request = "ground_truth --tier easy --seeds 1 --rows 2560 --batch 32 --lr 0.03"
    monkeypatch.setattr(sys, "argv", request.split())
    monkeypatch.setitem(ground_truth.TIERS, "easy", easy)
    ground_truth.main()
    names = ["default", "topk", "true decoder", *ground_truth.BASELINES]
    done, (head, *lines) = [], capsys.readouterr().out.splitlines()
    while head.startswith("✓"):
        done.append(head.removeprefix("✓ seed 0: "))
        head, *lines = lines
    steps = ["world", "train", *(f"score {name}" for name in names), "ceilings"]
    assert [line[: len(step)] for line, step in zip(done, steps, strict=True)] == steps
    starts = [start for name in names for start in (name, f"{name}, chance")]
    assert head.split()[:4] == ["dictionary", "seeds", "MCC", "MMCS"]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=False)] == starts
    assert [line.split()[0] for line in lines[12:]] == ["probe", "oracle"]
    default, topk, truth, frozen = (
        float(lines[place].split("1  ")[1].split()[0]) for place in (0, 2, 4, 6)
    )
    assert truth == 1
    assert frozen + 0.2 < topk
    assert frozen + 0.1 < default
    assert topk < 1

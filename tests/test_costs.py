"""bench/scaling.py and bench/profile_step.py: what they compute from what they measure, against counts by hand."""

import json
import sys

import pytest
import started
import torch

from bench import profile_step, scaling


def points(sizes, walls, memory):
    return [{"size": s, "wall": w, "memory": m, "weights": s} for s, w, m in zip(sizes, walls, memory)]


def test_slopes_are_those_of_the_upper_half_and_too_steep_ones_are_named():
    sizes = [1, 10, 100, 1000, 10_000]
    found = {  # of time: flat and then linear; of memory: cubic and then as the square root
        "sample group": points(sizes, [3, 3, 3, 30, 300], [1, 1000, 1e6, 1e6 * 10**0.5, 1e7]),
        "train length": points(sizes, [1, 1, 1, 100, 10_000], [1, 1, 1, 100, 10_000]),
    }
    slopes = {(row["curve"], row["cost"]): row["slope"] for row in scaling.slopes_of(found)}
    expected = {"sample group": (1, 0.5), "train length": (2, 2)}
    for curve, (wall, memory) in expected.items():
        assert slopes[curve, "wall"] == pytest.approx(wall)
        assert slopes[curve, "memory"] == pytest.approx(memory)
    lines = scaling.table(found, 2).splitlines()
    assert "1.00 (at most 1.1) | 0.50 (at most 1.1) |" in lines[-2]
    assert "2.00 (at most 2) | 2.00 (at most 1.1), **steeper than it should be** |" in lines[-1]


@pytest.mark.parametrize("work", ["sample", "train"])
def test_a_point_is_measured_in_a_process_of_its_own(work):
    small = {"prompts": 2, "prompt": 5, "group": 2, "new": 4, "rows": 2, "length": 8}
    wanted = {**scaling.FIXED, **small, "work": work, "vocabulary": 100}
    done = started.run(["bench/scaling.py", json.dumps(wanted)])
    assert done.returncode == 0, done.stderr
    one = json.loads(done.stdout.splitlines()[-1])
    # two layers 64 wide: query and output of one head, key and value, three of the MLP, four norms
    layer = 2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * (64 * 8 // 3) + 2 * 64 + 2 * 64
    assert one["weights"] == 2 * layer and one["wall"] > 0 and one["memory"] > 0


def test_largest_memory_is_that_since_it_was_forgotten():
    block = torch.ones(2**25)  # 134 MB
    del block
    scaling.forget_peak()
    before = scaling.resident(largest=True)
    block = torch.ones(2**24)  # 67 MB
    assert 60 < scaling.resident(largest=True) - before < 75 and len(block) == 2**24


def test_the_profile_counts_products_and_attention():
    """One product and its gradients, attention and its gradients: as many operations as by hand, each in its group."""
    n, heads, length, width = 2, 3, 64, 16
    x = torch.randn(n * length, 24, requires_grad=True)
    weight, low = torch.randn(24, 40), torch.randn(24, profile_step.RANK)
    q, k, v = (torch.randn(n, heads, length, width, requires_grad=True) for _ in range(3))
    with torch.profiler.profile(record_shapes=True) as profiler:
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        ((x @ weight).sum() + (x @ low).sum() + mixed.sum()).backward()
    groups, rest = profile_step.grouped(profiler.events())
    for name, columns in (("frozen weights", 40), ("LoRA", profile_step.RANK)):  # there and back to x
        assert groups[name]["gflop"] * 1e9 == pytest.approx(2 * 2 * n * length * 24 * columns)
    attention = (2 + 5) * 2 * n * heads * length * length * width / 2
    assert groups["attention"]["gflop"] * 1e9 == pytest.approx(attention)
    assert groups["head"]["gflop"] == 0 and "aten::sum" in rest


def test_a_profile_of_two_steps_shows_every_part(tmp_path, monkeypatch):
    small = {"LAYERS": 1, "HIDDEN": 64, "VOCABULARY": 100}
    for name, value in small.items():
        monkeypatch.setattr(profile_step.training, name, value)
    monkeypatch.setattr(profile_step.training, "matrix_peak", lambda: {"gflops": 100.0})
    line = ["profile_step.py", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    profile_step.main()
    found = json.loads((tmp_path / "profile.json").read_text())
    assert all(one["seconds"] > 0 for one in found["groups"].values())
    covered = sum(one["seconds"] for one in found["groups"].values())
    assert 0 < covered < found["profiled"]["wall"]
    text = (tmp_path / "profile.md").read_text()
    assert all(f"| {name} |" in text for name in profile_step.GROUPS)

"""Intervals, McNemar's test, dominance and fronts against closed forms and brute force."""

import random
from fractions import Fraction

import pytest
from conftest import hits_of, row

from edgecnn.compare import (
    compare,
    crossing,
    dominates,
    mcnemar_p,
    pareto_front,
    wilson_interval_percent,
)


def test_wilson_interval_closed_form():
    low, high = wilson_interval_percent(8500, 10_000)
    assert (low, high) == pytest.approx((84.287, 85.686), abs=0.002)
    low, high = wilson_interval_percent(0, 100)
    assert low == 0 and high == pytest.approx(3.699, abs=0.001)
    low, high = wilson_interval_percent(100, 100)
    assert low == pytest.approx(96.301, abs=0.001) and high == 100


def test_dominance_needs_no_worse_everywhere_and_better_somewhere():
    a = row("baseline_fp32", 85.0, 1000, 10.0)
    assert not dominates(a, a)
    assert dominates(a, {**a, "size_bytes": 1001}) and not dominates({**a, "size_bytes": 1001}, a)
    better_but_larger = {**a, "accuracy_percent": 86.0, "size_bytes": 1001}
    assert not dominates(better_but_larger, a) and not dominates(a, better_but_larger)


def test_changes_statistics_and_dominance_stay_within_their_seed():
    rows = [
        row("baseline_fp32", 85.0, 2000, 40.0),
        row("baseline_seed1_fp32", 86.0, 2000, 40.0),
        row(
            "baseline_int8", 84.9, 600, 10.0, parent="baseline_fp32", parent_sha256="baseline_fp32"
        ),
        row("pruned_50_fp32", 85.5, 1000, 20.0, parent="baseline_fp32", parent_sha256="older"),
        row("control_fp32", 85.75, 2000, 40.0, parent="baseline_fp32", parent_sha256="older"),
        row("control_seed1_fp32", 80.0, 2000, 40.0),
        row("pruned_80_fp32", 85.6, 1500, 9.0, parent="baseline_fp32", parent_sha256="older")
        | {"epochs": 22},
        row("pruned_90_fp32", 84.0, 1000, 5.0, parent="pruned_50_fp32", parent_sha256="other"),
    ]
    named = {r["variant"]: r for r in compare(rows, hits_of(rows))}
    assert named["baseline_int8"]["accuracy_change_points"] == pytest.approx(-0.1)
    assert named["pruned_50_fp32"]["accuracy_change_points"] is None  # its parent was retrained
    assert named["pruned_50_fp32"]["accuracy_change_vs_control_points"] == -0.25
    assert named["baseline_fp32"]["accuracy_change_vs_control_points"] is None
    # Longer, or later in a sweep: more effort than the control's.
    assert named["pruned_80_fp32"]["accuracy_change_vs_control_points"] is None
    assert named["pruned_90_fp32"]["accuracy_change_vs_control_points"] is None
    assert named["baseline_fp32"]["dominated_by"] == "control_fp32"
    assert named["baseline_seed1_fp32"]["dominated_by"] is None
    assert named["baseline_fp32"]["accuracy_mean_percent"] == 85.5
    assert named["baseline_fp32"]["accuracy_std_points"] == pytest.approx(0.5**0.5, abs=1e-3)
    assert named["baseline_int8"]["accuracy_std_points"] is None
    int8, pruned = named["baseline_int8"], named["pruned_50_fp32"]
    assert (int8["images_gained_vs_parent"], int8["images_lost_vs_parent"]) == (0, 10)
    assert int8["mcnemar_p_vs_parent"] == 2 / 2**10
    assert int8["mcnemar_p_vs_control"] is None and int8["mcnemar_p_vs_baseline"] == 2 / 2**10
    assert (pruned["mcnemar_p_vs_parent"], pruned["images_lost_vs_parent"]) == (None, None)
    assert pruned["images_lost_vs_control"] == 25
    assert pruned["accuracy_change_vs_baseline_points"] == 0.5
    assert named["baseline_fp32"]["mcnemar_p_vs_baseline"] is None


def test_a_pair_whose_files_are_not_here_is_as_it_was():
    rows = [row("baseline_fp32", 85.5, 2000, 40.0), row("control_fp32", 85.75, 2000, 40.0)]
    rows.append(row("baseline_int8", 85.4, 600, 10.0))
    last = compare(rows, hits_of(rows))
    for absent in ("baseline_fp32", "control_fp32"):
        here = hits_of([r for r in rows if r["variant"] != absent])
        kept = [r if r["variant"] == absent else row for r, row in zip(last, rows, strict=True)]
        assert compare(kept, here, last) == last
        other = [r | {"checkpoint_sha256": "new"} for r in rows if r["variant"] != absent]
        other += [r for r in last if r["variant"] == absent]  # not the pair that was counted
        changed = {r["variant"]: r for r in compare(other, here, last)}
        assert changed["control_fp32"]["mcnemar_p_vs_baseline"] is None
        assert changed["control_fp32"]["accuracy_change_vs_baseline_points"] is None


# ---- McNemar's exact test ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (7, 7, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 5, 2 * (1 + 6) / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (0, 1000, 2 / 2**1000),
    ],
)
def test_mcnemar_closed_forms(gained, lost, p):
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained) == p


def test_mcnemar_is_exact_for_many_pairs_and_grows_with_the_balance():
    # Pascal's triangle, built by addition alone, is another way to the same integers.
    line = [1]
    for _ in range(1100):
        line = [a + b for a, b in zip([0, *line], [*line, 0], strict=True)]
    for gained in (400, 500, 516, 549):
        expected = Fraction(2 * sum(line[: gained + 1]), 2**1100)
        assert mcnemar_p(gained, 1100 - gained) == float(expected)
    ps = [mcnemar_p(gained, 1100 - gained) for gained in range(0, 551, 10)]
    assert ps == sorted(ps) and ps[-1] == 1.0
    assert mcnemar_p(4_900, 5_100) == pytest.approx(0.0466, abs=5e-4)  # the normal approximation


# ---- fronts and crossings ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "accuracies", "front"),
    [
        ([], [], []),
        ([3], [80], [0]),
        ([1, 2, 3], [80, 85, 90], [0, 1, 2]),
        ([3, 2, 1], [90, 85, 80], [2, 1, 0]),  # by rising cost
        ([1, 2, 3], [90, 85, 80], [0]),
        ([1, 1], [80, 80], [0, 1]),  # equal in both: both stay
        ([1, 1], [80, 81], [1]),  # equal cost: the more accurate one
        ([1, 2], [80, 80], [0]),  # equal accuracy: the cheaper one
        ([2, 1, 2, 4], [85, 80, 85, 84], [1, 0, 2]),
    ],
)
def test_front_closed_forms(costs, accuracies, front):
    assert pareto_front(costs, accuracies) == front


def test_front_against_brute_force():
    generator = random.Random(0)
    for _ in range(200):
        count = generator.randint(1, 14)
        points = [(generator.randint(1, 6), generator.randint(80, 86)) for _ in range(count)]
        front = pareto_front(*zip(*points, strict=True))
        expected = {
            i
            for i, (c, a) in enumerate(points)
            if not any(d <= c and b >= a and (d, b) != (c, a) for d, b in points)
        }
        assert set(front) == expected and len(front) == len(expected)
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_break_even_is_where_the_sparse_line_falls_below_for_good():
    assert crossing([0, 50, 100], [10, 10, 10], [20, 12, 8]) == pytest.approx(75)
    assert crossing([0, 1], [1, 1], [2, 3]) is None
    assert crossing([0, 1], [1, 1], [0.5, 0.2]) is None  # pays from the start
    assert crossing([0, 1, 2, 3], [5] * 4, [4, 6, 6, 4]) == pytest.approx(2.5)

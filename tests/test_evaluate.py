"""The table: closed-form figures, true dominance, and a README that agrees with the committed run."""

import json
import re

import pytest
from conftest import REPOSITORY, run_main

from edgecnn.checkpoint import load_checkpoint, sha256
from edgecnn.files import NAME_PATTERN, variant_name
from evaluate import (
    README_MARKERS,
    compare,
    dominates,
    readme_with,
    tables,
    wilson_interval_percent,
)

MACS = 10_848_768
REFERENCE = REPOSITORY / "results" / "reference"
HEADLINE = ("baseline_fp32", "baseline_int8", "pruned_50_fp32", "pruned_50_int8")


def row(variant, accuracy, size_bytes, energy, **fields):
    name = NAME_PATTERN.fullmatch(variant)
    return {
        "variant": variant,
        "method": name["method"],
        "precision": name["precision"],
        "seed": int(name["seed"] or 0),
        "accuracy_percent": accuracy,
        "size_bytes": size_bytes,
        "relative_energy": energy,
        "parent": None,
        "parent_sha256": None,
        "checkpoint_sha256": variant,
        **fields,
    }


@pytest.fixture(scope="module")
def smoke_rows(smoke):
    return {r["variant"]: r for r in json.loads((smoke / "results/smoke/metrics.json").read_text())}


@pytest.fixture(scope="module")
def reference_rows():
    return json.loads((REFERENCE / "metrics.json").read_text())


# ---- arithmetic --------------------------------------------------------------------------------


def test_wilson_interval_closed_form():
    low, high = wilson_interval_percent(8500, 10_000)
    assert (low, high) == pytest.approx((84.287, 85.686), abs=0.002)
    assert wilson_interval_percent(0, 100) == pytest.approx((0, 3.699), abs=0.001)
    assert wilson_interval_percent(100, 100) == pytest.approx((96.301, 100), abs=0.001)


def test_dominance_needs_no_worse_everywhere_and_better_somewhere():
    a = row("a_fp32".replace("a", "baseline"), 85.0, 1000, 10.0)
    assert not dominates(a, a)
    assert dominates(a, {**a, "size_bytes": 1001}) and not dominates({**a, "size_bytes": 1001}, a)
    better_but_larger = {**a, "accuracy_percent": 86.0, "size_bytes": 1001}
    assert not dominates(better_but_larger, a) and not dominates(a, better_but_larger)


def test_changes_statistics_and_dominance_stay_within_their_seed():
    rows = compare(
        [
            row("baseline_fp32", 85.0, 2000, 40.0),
            row("baseline_seed1_fp32", 86.0, 2000, 40.0),
            row(
                "baseline_int8",
                84.9,
                600,
                10.0,
                parent="baseline_fp32",
                parent_sha256="baseline_fp32",
            ),
            row("pruned_50_fp32", 85.5, 1000, 20.0, parent="baseline_fp32", parent_sha256="older"),
            row("control_fp32", 85.75, 2000, 40.0),
            row("control_seed1_fp32", 80.0, 2000, 40.0),
        ]
    )
    named = {r["variant"]: r for r in rows}
    assert named["baseline_int8"]["accuracy_change_points"] == pytest.approx(-0.1)
    assert named["pruned_50_fp32"]["accuracy_change_points"] is None  # its parent was retrained
    assert named["pruned_50_fp32"]["accuracy_change_vs_control_points"] == -0.25
    assert named["baseline_fp32"]["accuracy_change_vs_control_points"] is None
    assert named["baseline_fp32"]["dominated_by"] == "control_fp32"
    assert named["baseline_seed1_fp32"]["dominated_by"] is None
    assert named["baseline_fp32"]["accuracy_mean_percent"] == 85.5
    assert named["baseline_fp32"]["accuracy_std_points"] == pytest.approx(0.5**0.5, abs=1e-3)
    assert named["baseline_int8"]["accuracy_std_points"] is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("baseline", "fp32"), "baseline_fp32"),
        (("control", "int8", "l1", 1), "control_seed1_int8"),
        (("pruned_50", "fp32"), "pruned_50_fp32"),
        (("pruned_50", "int8", "l1", 2), "pruned_50_l1_seed2_int8"),
        (("pruned_97.5", "fp32", "l1-normalized", 3), "pruned_97.5_seed3_fp32"),
    ],
)
def test_one_naming_scheme(arguments, name):
    assert variant_name(*arguments) == name and NAME_PATTERN.fullmatch(name)


# ---- the smoke chain ---------------------------------------------------------------------------


def test_rows_carry_exact_counts_and_provenance(smoke, smoke_rows):
    assert set(smoke_rows) == set(HEADLINE)
    for name, r in smoke_rows.items():
        assert r["macs"] == MACS and r["parameters"] == 620_362 and r["weights"] == 619_872
        path = smoke / r["checkpoint"]
        assert r["size_bytes"] == path.stat().st_size and r["checkpoint_sha256"] == sha256(path)
        bits = 8 if name.endswith("int8") else 32
        assert r["relative_energy"] == pytest.approx(r["macs_nonzero"] / 1e6 * bits / 8, abs=1e-4)
        assert r["relative_energy_dense"] == pytest.approx(MACS / 1e6 * bits / 8, abs=1e-4)
        assert r["raw_sparse_bytes"] <= r["raw_dense_bytes"] and r["coded_bytes"] < r["size_bytes"]
    assert smoke_rows["baseline_fp32"]["macs_nonzero"] == MACS
    assert smoke_rows["pruned_50_fp32"]["macs_nonzero"] <= 5.43e6
    assert smoke_rows["pruned_50_int8"]["parent"] == "pruned_50_fp32"
    assert smoke_rows["pruned_50_int8"]["accuracy_change_points"] is not None


def test_inspect_describes_a_saved_file(smoke, monkeypatch, capsys):
    monkeypatch.chdir(smoke)
    run_main("evaluate", "--inspect", "checkpoints/smoke/pruned_50_int8.pt")
    text = capsys.readouterr().out
    assert "int8" in text and "pruned_50_fp32" in text and "sparsity" not in text.split("\n")[0]
    fc1 = next(line for line in text.splitlines() if "fc1.weight" in line)
    assert "256x2048" in fc1 and "50.0" in fc1 and "524,288" in fc1


def test_readme_block_is_replaced_and_nothing_else():
    begin, end = README_MARKERS
    text = readme_with(f"before\n{begin}\nold\n{end}\nafter\n", "| new |\n")
    assert text == f"before\n{begin}\n| new |\n{end}\nafter\n"


# ---- the committed run -------------------------------------------------------------------------


def test_readme_table_is_the_committed_runs(reference_rows):
    block = tables(reference_rows)
    assert (REFERENCE / "table.md").read_text() == block
    readme = (REPOSITORY / "README.md").read_text()
    assert readme_with(readme, block) == readme


def test_committed_checkpoints_are_the_ones_that_were_measured(reference_rows):
    seed_0 = [r for r in reference_rows if r["seed"] == 0]
    assert {r["variant"] for r in seed_0} >= {*HEADLINE, "control_fp32", "pruned_50_l1_fp32"}
    for r in seed_0:
        path = REPOSITORY / r["checkpoint"]
        assert sha256(path) == r["checkpoint_sha256"] and path.stat().st_size == r["size_bytes"]
        assert load_checkpoint(path)["precision"] == r["precision"]


def test_every_committed_row_has_its_own_json(reference_rows):
    for r in reference_rows:
        stage = json.loads((REFERENCE / f"{r['variant']}.json").read_text())
        assert stage["checkpoint_sha256"] == r["checkpoint_sha256"]
        assert stage["commit"] == r["trained_commit"] and "dirty" not in r["trained_commit"]


def test_committed_figures_meet_the_bars(reference_rows):
    rows = {r["variant"]: r for r in reference_rows}
    assert all(r["test_images"] == 10_000 for r in reference_rows)
    for seed in ("", "_seed1", "_seed2"):
        assert rows[f"baseline{seed}_fp32"]["accuracy_percent"] >= 84.5
        for family in ("baseline", "pruned_50", "control"):
            int8 = rows[f"{family}{seed}_int8"]
            assert int8["accuracy_change_points"] >= -0.24
            assert int8["size_bytes"] <= 0.64 * 2**20
        pruned = rows[f"pruned_50{seed}_fp32"]
        assert pruned["accuracy_percent"] >= rows[f"baseline{seed}_fp32"]["accuracy_percent"]
        assert pruned["sparsity_percent"] >= 50 and pruned["macs_nonzero"] <= 5.43e6
        assert pruned["size_bytes"] <= 1.19 * 2**20


def test_numbers_in_the_readme_prose_are_in_the_committed_json(reference_rows):
    """Every `variant.key` = 12.34 of the prose is the committed JSON's value, rounded."""
    readme = (REPOSITORY / "README.md").read_text()
    rows = {r["variant"]: r for r in reference_rows}
    speed = json.loads((REFERENCE / "training_speed.json").read_text())
    rows |= {"training_speed": speed["summary"], "time_to_target": speed["time_to_target"][-1]}
    quoted = re.findall(r"`([\w-]+)\.(\w+)` = ([\d.,]+\d)", readme)
    assert quoted
    for variant, key, figure in quoted:
        value = float(figure.replace(",", ""))
        decimals = len(figure.partition(".")[2])
        assert round(rows[variant][key], decimals) == value, f"{variant}.{key}"

"""The table: closed-form figures, true dominance, and a README that agrees with the committed run."""

import json
import random
import re
from fractions import Fraction

import pytest
from conftest import REPOSITORY, run_main

from edgecnn.checkpoint import load_checkpoint, sha256
from edgecnn.names import NAME_PATTERN, variant_name
from edgecnn.peers import ORIGINAL, RESNET8
from evaluate import (
    PEER_AXES,
    REFERENCE_POINT,
    TEST_SET,
    all_tables,
    better_axes,
    compare,
    dominates,
    gains,
    mcnemar_p,
    original_table,
    peer_table,
    per_seed,
    readme_markers,
    readme_with,
    signed,
    tables,
    union_volume,
    variant_table,
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


def hits_of(rows):
    """Made-up images: the first ones right, as many of 10,000 as the accuracy says."""
    counts = {r["variant"]: round(100 * r["accuracy_percent"]) for r in rows}
    return {name: [i < count for i in range(10_000)] for name, count in counts.items()}


@pytest.fixture(scope="module")
def smoke_rows(smoke):
    return {r["variant"]: r for r in json.loads((smoke / "results/smoke/metrics.json").read_text())}


@pytest.fixture(scope="module")
def reference_rows():
    return json.loads((REFERENCE / "metrics.json").read_text())


@pytest.fixture(scope="module")
def headline_rows():
    return json.loads((REPOSITORY / "results/headline/metrics.json").read_text())


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
    volumes = {r["seed"]: r["front_hypervolume"] for r in named.values()}
    assert volumes[0] == pytest.approx(
        union_volume([gains(r) for r in rows if not r["seed"]]), abs=1e-3
    )
    assert volumes[1] < volumes[0]


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


def test_differences_that_are_not_significant_are_marked():
    change = {"accuracy_change_points": 0.11, "mcnemar_p_vs_parent": 0.05}
    assert signed(change, "parent") == "+0.11 n.s."
    assert signed(change | {"mcnemar_p_vs_parent": 0.0499}, "parent") == "+0.11"
    assert signed({"accuracy_change_points": 0.11}, "parent") == "+0.11"  # not tested, not marked
    assert signed({"accuracy_change_points": None}, "parent") == signed({}, "parent") == "-"
    assert (
        per_seed([change, change | {"mcnemar_p_vs_parent": 0.01}], "parent") == "+0.11 n.s., +0.11"
    )
    assert per_seed([change, {}], "parent") == "-"


# ---- hypervolume -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corners", "volume"),
    [
        ([], 0),
        ([(2, 3, 4)], 24),
        ([(2, 3, 4), (2, 3, 4)], 24),
        ([(2, 3, 4), (1, 3, 4)], 24),  # dominated: adds nothing
        ([(2, 1, 1), (1, 2, 1)], 3),  # overlap in the unit cube
        ([(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4),
        ([(4, 1, 2), (1, 4, 1)], 8 + 4 - 1),
        ([(2, 3, 4), (5, -1, 9), (7, 0, 7)], 24),  # no gain on one axis: no box
    ],
)
def test_union_volume_closed_forms(corners, volume):
    assert union_volume(corners) == pytest.approx(volume)


def test_union_volume_is_that_of_the_unit_cells_and_knows_no_order():
    generator = random.Random(0)
    for _ in range(50):
        corners = [
            tuple(generator.randint(0, 6) for _ in range(3)) for _ in range(generator.randint(1, 9))
        ]
        cells = {
            (i, j, k) for x, y, z in corners for i in range(x) for j in range(y) for k in range(z)
        }
        assert union_volume(corners) == pytest.approx(len(cells))
        generator.shuffle(corners)
        assert union_volume(corners) == pytest.approx(len(cells))


def test_gains_are_points_and_halvings_over_the_reference():
    assert REFERENCE_POINT["relative_energy"] == MACS / 1e6 * 32 / 8
    better = {
        "accuracy_percent": 90.0,
        "size_bytes": REFERENCE_POINT["size_bytes"] / 8,
        "relative_energy": REFERENCE_POINT["relative_energy"] / 4,
    }
    assert gains(REFERENCE_POINT) == (0, 0, 0)
    assert gains(better) == pytest.approx((80, 3, 2))
    assert gains(better | {"relative_energy": 0.0})[2] > 15  # finite


# ---- which rows a table shows ------------------------------------------------------------------


def full_row(variant, accuracy, size_bytes, energy, **fields):
    more = dict.fromkeys(("macs", "macs_nonzero", "sparsity_percent"), 0)
    more |= {"accuracy_ci95_low_percent": 80.0, "accuracy_ci95_high_percent": 90.0}
    return row(variant, accuracy, size_bytes, energy, **more, **fields)


def test_main_table_is_always_shown_and_front_the_other_all():
    rows = [
        full_row("baseline_fp32", 85.0, 2000, 40.0),
        full_row("pruned_50_fp32", 84.0, 2000, 40.0),  # dominated, headline
        full_row("pruned_50_l1_fp32", 84.5, 2000, 40.0),  # dominated
        full_row("pruned_90_int8", 84.0, 100, 1.0, energy_sram_uj=12.25, energy_dram_uj=6.7),
        full_row("pruned_95_int8", 83.0, 200, 1.0),  # dominated
        full_row("baseline_seed1_fp32", 85.5, 2000, 40.0),
    ]
    rows = compare(rows, hits_of(rows))
    main, seeds = tables(rows).split("\n| Variant ")[0], tables(rows).split("\n| Variant ")[1]
    shown = re.findall(r"^\| (\w+_(?:fp32|int8)) ", main, re.M)
    assert shown == ["baseline_fp32", "pruned_50_fp32", "pruned_90_int8"]
    assert "2 more, dominated" in main and "table_all.md" in main
    assert f"{rows[0]['front_hypervolume']:.1f} (seed 0, 5 variants)" in main
    assert "baseline_fp32" in seeds
    everything = variant_table(rows)
    assert all(f"| {r['variant']} " in everything for r in rows)
    cells = next(line for line in everything.splitlines() if "pruned_90" in line).split("|")
    assert [cell.strip() for cell in cells[-4:-2]] == ["12.25", "6.70"]
    bare = next(line for line in everything.splitlines() if "pruned_95" in line).split("|")
    assert [cell.strip() for cell in bare[-4:-2]] == ["-", "-"]


def beating(**changes):
    """A row that is better than the peer by a hair on every axis, but for `changes`."""
    row = {"variant": "ours_int8", "precision": "int8", "test_set": TEST_SET}
    row |= {"test_images": 10_000, "tflite_micro_images": 10_000}
    figures = {key: RESNET8[theirs] + (0.01 if up else -1) for _, key, theirs, *_, up in PEER_AXES}
    return row | figures | changes


def test_the_peer_is_beaten_axis_by_axis():
    assert all(better_axes(beating()))
    for i, (_, key, theirs, *_) in enumerate(PEER_AXES):
        for figure in (RESNET8[theirs], None):  # neither a tie nor "not measured" is a victory
            better = better_axes(beating(**{key: figure}))
            assert not better[i] and sum(better) == len(PEER_AXES) - 1
    assert sum(better_axes(beating(tflite_micro_images=1000))) == len(PEER_AXES) - 1
    rows = [beating(), beating(variant="worse", accuracy_percent=86.5), beating(precision="fp32")]
    table = [[cell.strip() for cell in line.split("|")] for line in peer_table(rows).splitlines()]
    assert [line[1] for line in table[2:]] == ["ours_int8", "worse", f"*{RESNET8['name']}*"]
    assert [line[2] for line in table[2:]] == ["**86.98**", "86.50", "86.97"]
    assert [line[-2] for line in table[2:]] == ["8 of 8", "7 of 8", "-"]
    assert peer_table([beating(test_set="validation split")]) == ""


def test_the_original_table_stands_beside_ours_row_by_row():
    ours = {
        "test_set": TEST_SET,
        "accuracy_percent": 85.0,
        "size_bytes": 2**20,
        "macs_nonzero": 5e6,
        "relative_energy": 7,
    }
    rows = [ours | {"variant": variant} for variant in ORIGINAL]
    lines = original_table(rows).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == "pruned 50 %;80.74;85.00;1.19;1.00;5.42;5.00;21.70;7.00".split(";")
    assert [line[0] for line in cells] == ["FP32", "INT8", "pruned 50 %"]
    assert original_table(rows[1:]) == ""
    assert original_table([r | {"test_set": "validation split"} for r in rows]) == ""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("baseline", "fp32"), "baseline_fp32"),
        (("control", "int8", "l1", 1), "control_seed1_int8"),
        (("pruned_50", "fp32"), "pruned_50_fp32"),
        (("pruned_50", "int8", "l1", 2), "pruned_50_l1_seed2_int8"),
        (("pruned_97.5", "fp32", "layer-rank", 3), "pruned_97.5_seed3_fp32"),
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
    for r in smoke_rows.values():
        for other in ("parent", "baseline"):
            gained, lost = r[f"images_gained_vs_{other}"], r[f"images_lost_vs_{other}"]
            if gained is None:
                assert r["variant"] == "baseline_fp32"
                continue
            key = "accuracy_change" + "_vs_baseline" * (other == "baseline") + "_points"
            assert r[key] == pytest.approx(100 * (gained - lost) / r["test_images"], abs=1e-3)
            assert r[f"mcnemar_p_vs_{other}"] == mcnemar_p(gained, lost)
        assert not any(isinstance(value, list) for value in r.values())  # flat
    assert len({r["front_hypervolume"] for r in smoke_rows.values()}) == 1
    table = (smoke / "results/smoke/table_all.md").read_text()
    assert all(f"| {name} " in table for name in smoke_rows)


def test_inspect_describes_a_saved_file(smoke, monkeypatch, capsys):
    monkeypatch.chdir(smoke)
    run_main("evaluate", "--inspect", "checkpoints/smoke/pruned_50_int8.pt")
    text = capsys.readouterr().out
    assert "int8" in text and "pruned_50_fp32" in text and "sparsity" not in text.split("\n")[0]
    fc1 = next(line for line in text.splitlines() if "fc1.weight" in line)
    assert "256x2048" in fc1 and "50.0" in fc1 and "524,288" in fc1


def test_readme_block_is_replaced_and_nothing_else():
    begin, end = readme_markers("mine")
    other = "\n".join(readme_markers("other"))
    text = readme_with(f"{other}\n{begin}\nold\n{end}\nafter\n", "| new |\n", "mine")
    assert text == f"{other}\n{begin}\n| new |\n{end}\nafter\n"


# ---- the committed runs ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["reference", "headline"])
def committed(request):
    """(a committed run's name, its results folder, the rows of its metrics.json)."""
    folder = REPOSITORY / "results" / request.param
    return request.param, folder, json.loads((folder / "metrics.json").read_text())


def test_readme_table_is_the_committed_runs(committed):
    run, folder, rows = committed
    block = tables(rows)
    assert (folder / "table.md").read_text() == block
    assert (folder / "table_all.md").read_text() == all_tables(rows)
    readme = (REPOSITORY / "README.md").read_text()
    assert readme_with(readme, block, run) == readme


def test_committed_checkpoints_are_the_ones_that_were_measured(committed):
    seed_0 = [r for r in committed[2] if r["seed"] == 0]
    assert {r["variant"] for r in seed_0} >= {*HEADLINE, "control_fp32", "control_int8"}
    for r in seed_0:
        path = REPOSITORY / r["checkpoint"]
        assert sha256(path) == r["checkpoint_sha256"] and path.stat().st_size == r["size_bytes"]
        assert load_checkpoint(path)["precision"] == r["precision"]


def test_every_committed_row_has_its_own_json(committed):
    _, folder, rows = committed
    for r in rows:
        stage = json.loads((folder / f"{r['variant']}.json").read_text())
        assert stage["checkpoint_sha256"] == r["checkpoint_sha256"]
        assert stage["commit"] == r["trained_commit"]
        # Seeds 1 and 2 ran when a result that a run had rewritten still counted as a changed source.
        assert "dirty" not in r["trained_commit"] or r["seed"]


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
    sparse = rows["pruned_90_energy_int8"]
    assert sparse["sparsity_percent"] >= 90 and sparse["size_bytes"] <= 0.13 * 2**20
    assert sparse["accuracy_percent"] >= max(84, rows["baseline_fp32"]["accuracy_percent"] - 1.5)
    half = rows["pruned_50_int8"]
    assert half["macs_nonzero"] <= 5.43e6 and half["relative_energy"] <= 5.43
    assert half["accuracy_percent"] >= rows["baseline_fp32"]["accuracy_percent"] - 0.3


def test_the_headline_run_meets_its_bars(headline_rows):
    rows = {r["variant"]: r for r in headline_rows}
    assert all(r["test_images"] == 10_000 for r in headline_rows)
    dense, dense_int8 = rows["baseline_fp32"], rows["baseline_int8"]
    assert dense["accuracy_percent"] >= 89.3 and dense["size_bytes"] <= 2.38 * 2**20
    assert abs(dense_int8["accuracy_change_points"]) <= 0.2
    assert dense_int8["size_bytes"] <= 0.64 * 2**20
    half = rows["pruned_50_fp32"]
    assert half["accuracy_percent"] >= dense["accuracy_percent"]
    assert half["accuracy_change_vs_control_points"] is not None
    assert half["macs_nonzero"] <= 5.43e6 and half["size_bytes"] <= 1.19 * 2**20
    sparse = rows["pruned_90_energy_int8"]
    assert sparse["accuracy_percent"] >= 88.3 and sparse["size_bytes"] <= 0.13 * 2**20
    assert sparse["relative_energy"] <= 4.3
    sparsest = rows["pruned_95_energy_int8"]
    assert sparsest["accuracy_percent"] >= 87.0 and sparsest["size_bytes"] <= 75_000
    assert sparsest["weight_stored_bytes"] <= 75_000
    assert sparsest["m4_instructions"] <= 2.0e6 + 2.5 * sparsest["macs_nonzero"]
    winner = rows["pruned_93_energy_int8"]
    assert all(better_axes(winner)) and winner["accuracy_percent"] >= 87.65
    assert winner["stm32l4r5_energy_modelled_uj"] <= 5496 / 2


def test_the_readme_shows_the_ablation():
    table = (REPOSITORY / "results/ablation/table.md").read_text()
    assert table in (REPOSITORY / "README.md").read_text()


def test_numbers_in_the_readme_prose_are_in_the_committed_json(reference_rows, headline_rows):
    """Every `variant.key` = 12.34 of the prose is the committed JSON's value, rounded."""
    readme = (REPOSITORY / "README.md").read_text()
    rows = {r["variant"]: r for r in reference_rows}
    speed = json.loads((REFERENCE / "training_speed.json").read_text())
    rows |= {"training_speed": speed["summary"], "time_to_target": speed["time_to_target"][-1]}
    rows |= {f"headline/{r['variant']}": r for r in headline_rows}
    quoted = re.findall(r"`([\w/-]+)\.(\w+)` = ([\d.,]+\d)", readme)
    assert quoted
    for variant, key, figure in quoted:
        value = float(figure.replace(",", ""))
        decimals = len(figure.partition(".")[2])
        assert round(rows[variant][key], decimals) == value, f"{variant}.{key}"

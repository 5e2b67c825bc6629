"""--budget: the parser, the choice against brute force, the answer's words, speed, bad input."""

import itertools
import json
import random
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from edgecnn.budget import BOARDS, LIMITS, answer, distance, excess, nearest, parse_budget, ranked
from edgecnn.errors import UserError


def row(variant, accuracy, flash_kib, ram_kib=40, energy_uj=10, macs_m=5, **more):
    """A row with every figure that a limit may need."""
    return {
        "variant": variant,
        "seed": 0,
        "accuracy_percent": accuracy,
        "size_bytes": int(flash_kib * 700),
        "weight_stored_bytes": flash_kib * 1024,
        "activations_peak_bytes": ram_kib * 1024,
        "energy_sram_uj": energy_uj,
        "stm32l4r5_energy_modelled_uj": 700 * energy_uj,
        "macs_nonzero": int(macs_m * 1e6),
        **more,
    }


ROWS = [
    row("baseline_fp32", 86.0, 2400, 160, 90, 10.8),
    row("baseline_int8", 85.9, 600, 40, 16, 10.8),
    row("pruned_50_int8", 86.2, 376, 40, 12, 5.4),
    row("pruned_90_int8", 85.0, 140, 40, 7, 1.1),
    row("pruned_95_int8", 83.9, 100, 40, 6, 0.6),
]


def write_metrics(folder, rows, run=""):
    path = folder / "results" / run / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def run(folder, *arguments):
    """evaluate.py in a folder of its own, as a user would."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "evaluate.py"), *arguments],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- the words of a budget ---------------------------------------------------------------------


def test_limits_by_name_and_a_board_for_its_flash_and_ram():
    assert parse_budget(["flash_kib=128", "accuracy=85.5"]) == {"flash_kib": 128, "accuracy": 85.5}
    assert parse_budget([]) == {}
    for name, board in BOARDS.items():
        limits = parse_budget([f"board={name}", "macs_m=6"])
        assert limits == {"flash_kib": board.flash_kib, "ram_kib": board.ram_kib, "macs_m": 6}
        assert "datasheet" in board.source or "Specification" in board.source
    assert parse_budget(["board=STM32F405"]) == parse_budget(["board=stm32f405"])
    assert parse_budget(["board=ESP32-S3"]) == parse_budget(["board=esp32s3"])


BAD_BUDGETS = {
    "text": (["flash_kib=much"], "much is not a number above 0"),
    "empty": (["flash_kib="], "nothing is not a number"),
    "no value": (["flash_kib"], "nothing is not a number"),
    "zero": (["ram_kib=0"], "not a number above 0"),
    "negative": (["energy_uj=-1"], "not a number above 0"),
    "nan": (["macs_m=nan"], "not a number above 0"),
    "infinite": (["macs_m=inf"], "not a number above 0"),
    "unknown key": (["flash=128"], "flash_kib, ram_kib, energy_uj"),
    "repeated": (["flash_kib=1", "flash_kib=2"], "flash_kib is limited already"),
    "unknown board": (["board=arduino"], ", ".join(BOARDS)),
    "board and its limit": (["board=rp2040", "ram_kib=64"], "ram_kib is limited already"),
    "limit and its board": (["flash_kib=64", "board=rp2040"], "flash_kib is limited already"),
    "two boards": (["board=rp2040", "board=esp32s3"], "limited already"),
    "a share": (["accuracy=0.85"], "in percent"),
    "above 100": (["accuracy=101"], "in percent"),
}


@pytest.mark.parametrize(("words", "problem"), BAD_BUDGETS.values(), ids=BAD_BUDGETS)
def test_bad_budgets_name_the_problem_in_one_line(words, problem):
    with pytest.raises(UserError) as caught:
        parse_budget(words)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


# ---- the choice --------------------------------------------------------------------------------


def test_limits_are_inclusive_and_kilobytes_binary():
    exact = row("exact", 85.0, 128)
    assert distance(exact, {"flash_kib": 128}) == 0 and ranked([exact], {"flash_kib": 128})
    assert not ranked([exact | {"weight_stored_bytes": 128 * 1024 + 1}], {"flash_kib": 128})
    assert ranked([exact], {"accuracy": 85.0}) and not ranked([exact], {"accuracy": 85.01})
    assert excess(exact, "flash_kib", 100) == pytest.approx(0.28)
    assert excess(exact, "accuracy", 100) == pytest.approx(0.15)


def test_ties_go_to_the_smaller_file():
    rows = [row("large", 85.0, 300), row("small", 85.0, 200), row("least", 84.0, 100)]
    for order in itertools.permutations(rows):
        best_first = [r["variant"] for r in ranked(order, {"flash_kib": 300})]
        assert best_first == ["small", "large", "least"]


def test_choice_against_brute_force():
    generator = random.Random(0)
    needs = {"flash_kib": "weight_stored_bytes", "ram_kib": "activations_peak_bytes"}
    needs |= {"energy_uj": "energy_sram_uj", "macs_m": "macs_nonzero"}
    scales = {"flash_kib": 1024, "ram_kib": 1024, "energy_uj": 1, "macs_m": 1e6}
    outcomes = set()
    for _ in range(300):
        draw = generator.randint
        rows = [
            row(f"v{i}", draw(80, 86), draw(1, 9), draw(1, 9), draw(1, 9), draw(1, 9))
            for i in range(draw(1, 8))
        ]
        limits = {name: draw(1, 9) for name in needs if draw(0, 1)} or {"flash_kib": 4}
        fits = [
            r for r in rows if all(r[needs[n]] <= limit * scales[n] for n, limit in limits.items())
        ]
        found = ranked(rows, limits)
        assert {r["variant"] for r in found} == {r["variant"] for r in fits}
        assert answer(rows, limits)[0] == bool(fits)
        outcomes.add(bool(fits))
        if fits:
            assert found[0]["accuracy_percent"] == max(r["accuracy_percent"] for r in fits)
        else:
            worst = [
                max(r[needs[n]] / scales[n] / limit - 1 for n, limit in limits.items())
                for r in rows
            ]
            assert distance(nearest(rows, limits), limits) == pytest.approx(min(worst))
    assert outcomes == {True, False}


# ---- the answer --------------------------------------------------------------------------------


def test_answer_names_the_best_its_figures_and_the_nearest_miss():
    fits, text = answer(ROWS, {"flash_kib": 200, "ram_kib": 64, "accuracy": 80})
    first, best, flash, ram, accuracy, near = text.splitlines()
    assert fits and first == "2 of 5 variants fit."
    assert best == "Best: pruned_90_int8, 85.00 %."
    assert flash.startswith("  flash_kib at most 200: 140 KiB, modelled: weights")
    assert ram.startswith("  ram_kib at most 64: 40 KiB, modelled") and "least 80: 85 %" in accuracy
    assert near == (
        "Nearest miss that is more accurate: pruned_50_int8, 86.20 %, "
        "misses flash_kib by 176 KiB (88 %)."
    )
    assert answer(ROWS, {"flash_kib": 400})[1].endswith("No variant is more accurate.")


def test_nothing_fits_names_the_nearest_miss():
    fits, text = answer(ROWS, {"flash_kib": 100, "accuracy": 85.5})
    # pruned_95 misses the floor by 1.9 %, pruned_90 misses flash by 40 %.
    assert not fits and "0 of 5" in text
    assert (
        "Nothing fits. Nearest miss: pruned_95_int8, 83.90 %, misses accuracy by 1.6 points (2 %)."
        in text
    )


def test_only_the_lowest_seed_competes_and_the_answer_says_so():
    other = row("pruned_50_seed1_int8", 99.0, 100, seed=1)
    text = answer([*ROWS, other], {"flash_kib": 400})[1]
    assert "Best: pruned_50_int8" in text and "Seed 0 alone competes" in text
    assert "competes" not in answer(ROWS, {"flash_kib": 400})[1]


def test_counted_figures_come_first_and_the_answer_says_which():
    rows = [dict(r) for r in ROWS]
    text = answer(rows, {"flash_kib": 200, "ram_kib": 64})[1]
    assert text.count("modelled") == 2 and "counted" not in text
    rows[3]["m4_flash_bytes"] = 199 * 1024
    fits, text = answer(rows, {"flash_kib": 200})
    assert fits and f"Best: {rows[3]['variant']}" in text and "counted: the linked" in text
    # An estimate does not stand beside a measurement of the same limit.
    assert "1 of 1 variants fit" in text and "4 more lack a figure" in text
    rows[3]["m4_flash_bytes"] = None  # not run on the target: as good as absent
    assert "Best: pruned_90_int8" in answer(rows, {"flash_kib": 200})[1]


def test_energy_of_the_real_part_is_a_limit_of_its_own():
    text = answer(ROWS, {"energy_uj": 8, "energy_stm32l4r5_uj": 7000})[1]
    assert "Best: pruned_90_int8" in text and "7 µJ, modelled: 45 nm" in text
    assert "4,900 µJ, modelled from the cycles" in text


@pytest.mark.parametrize("name", LIMITS)
def test_a_row_without_the_figure_says_what_to_run(name):
    keys = list(LIMITS[name].figures)
    bare = [{k: v for k, v in r.items() if k not in keys} for r in ROWS]
    for key in keys:
        with pytest.raises(UserError, match=f"{key}.*needs; .* evaluate.py"):
            distance(bare[0], {name: 50})
        with pytest.raises(UserError, match="not a number.*make metrics.json again"):
            distance(bare[0] | {key: "many"}, {name: 50})


# ---- the command -------------------------------------------------------------------------------


def test_exit_codes_and_no_file_written(tmp_path):
    path = write_metrics(tmp_path, ROWS)
    fits = run(tmp_path, "--budget", "flash_kib=200")
    assert (fits.returncode, fits.stderr) == (0, "") and "Best: pruned_90_int8" in fits.stdout
    board = run(tmp_path, "--budget", "board=stm32f405", "accuracy=86.1")
    assert board.returncode == 0 and "Best: pruned_50_int8" in board.stdout
    none = run(tmp_path, "--budget", "flash_kib=1")
    assert (none.returncode, none.stderr) == (1, "") and "Nearest miss: pruned_95" in none.stdout
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_run_names_the_folder(tmp_path):
    write_metrics(tmp_path, ROWS, "mine")
    assert run(tmp_path, "--run", "mine", "--budget", "flash_kib=200").returncode == 0


BAD_COMMANDS = {
    "no words": (["--budget"], ROWS, "--help"),
    "bad word": (["--budget", "flash=1"], ROWS, "flash_kib"),
    "no metrics": (["--budget", "flash_kib=1"], None, "results/metrics.json is missing"),
    "no rows": (["--budget", "flash_kib=1"], [], "empty one"),
    "no figure": (
        ["--budget", "ram_kib=1"],
        [{**ROWS[0], "activations_peak_bytes": None}],
        "ram_kib",
    ),
    "no accuracy": (["--budget", "flash_kib=1"], [{"variant": "x"}], "accuracy_percent"),
    "no size": (["--budget", "flash_kib=1"], [{**ROWS[0], "size_bytes": 0}], "size_bytes"),
    "with --inspect": (["--inspect", "a.pt", "--budget", "flash_kib=1"], ROWS, "give one of"),
    "with --docs": (["--docs", "--budget", "flash_kib=1"], ROWS, "give one of"),
    "repeated option": (["--budget", "flash_kib=1", "--budget", "flash_kib=2"], ROWS, "already"),
}


@pytest.mark.parametrize(("arguments", "rows", "problem"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_bad_commands_end_in_one_line_and_exit_code_2(tmp_path, arguments, rows, problem):
    if rows is not None:
        write_metrics(tmp_path, rows)
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_a_fresh_clone_is_told_which_runs_there_are(tmp_path):
    for name in ("headline", "reference"):
        write_metrics(tmp_path, ROWS, name)
    result = run(tmp_path, "--budget", "flash_kib=200")
    assert (result.returncode, result.stdout) == (2, "")
    assert "give --run headline or reference" in result.stderr and result.stderr.count("\n") == 1
    assert "Best: " in run(tmp_path, "--run", "headline", "--budget", "flash_kib=200").stdout


def test_several_runs_compete_and_the_answer_names_run_and_variant(tmp_path):
    write_metrics(tmp_path, [r | {"test_set": "t"} for r in ROWS], "large")
    other = [row("baseline_int8", 85.5, 150), row("baseline_seed1_int8", 99, 1, seed=1)]
    write_metrics(tmp_path, [r | {"test_set": "t"} for r in other], "lean")
    seed_1 = row("baseline_seed1_int8", 85.2, 120, seed=1, test_set="t")
    write_metrics(tmp_path, [seed_1], "later")
    said = run(tmp_path, "--run", "large", "lean", "--budget", "flash_kib=200")
    first, best, *_, near = said.stdout.splitlines()
    assert (said.returncode, said.stderr) == (0, "")
    assert first == "3 of 6 variants fit. Seed 0 alone competes."
    assert best == "Best: lean/baseline_int8, 85.50 %." and "large/pruned_50_int8" in near
    said = run(tmp_path, "--run", "large", "later", "--budget", "flash_kib=130").stdout
    assert said.startswith("2 of 6 variants fit.") and "Best: later/baseline_seed1_int8" in said


def test_different_test_images_do_not_compete(tmp_path):
    for name, test_set, images in (("a", "t", 100), ("b", "u", 100), ("c", "t", 99)):
        rows = [r | {"test_set": test_set, "test_images": images} for r in ROWS]
        write_metrics(tmp_path, rows, name)
    write_metrics(tmp_path, ROWS, "unknown")
    for name, problem in {"b": "b: u, 100 images", "c": "c: t, 99", "unknown": "test_set"}.items():
        said = run(tmp_path, "--run", "a", name, "--budget", "flash_kib=200")
        assert (said.returncode, said.stdout) == (2, "")
        assert problem in said.stderr and said.stderr.count("\n") == 1
    said = run(tmp_path, "--run", "a", "b")
    assert said.returncode == 2 and "this takes one run" in said.stderr


def test_answers_without_torch_or_numpy(tmp_path):
    """What makes the answer immediate: torch alone takes over a second to import."""
    write_metrics(tmp_path, ROWS)
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(REPOSITORY)!r});"
        "sys.argv = ['evaluate.py', '--budget', 'flash_kib=200'];"
        f"runpy.run_path({str(REPOSITORY / 'evaluate.py')!r}, run_name='__main__');"
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & {n.split('.')[0] for n in sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=20)


def test_committed_run_answers(tmp_path):
    text = run(REPOSITORY, "--run", "reference", "--budget", "flash_kib=400").stdout
    assert "Best: " in text and "int8" in text and "counted: the linked" in text
    # FP32 variants have no figure on the chip, INT8 ones have.
    text = run(REPOSITORY, "--run", "reference", "--budget", "energy_stm32l4r5_uj=3000").stdout
    assert "Best: pruned_90_energy_int8" in text and "do not compete" in text
    # The table's flash and the budget's are one unit: 255.4 KiB fit 256 and not 255.
    for limit, best in ((256, "pruned_80_energy_int8"), (255, "pruned_90_energy_int8")):
        text = run(REPOSITORY, "--run", "headline", "--budget", f"flash_kib={limit}").stdout
        assert f"Best: {best}" in text

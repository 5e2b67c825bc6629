"""plot_pareto.py: what is drawn and named, others' marks, bad input."""

import contextlib
import io
import itertools
import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import REPOSITORY, run_main
from matplotlib.collections import PolyCollection

import plot_pareto
from edgecnn import marks
from edgecnn.compare import pareto_front, run_of
from edgecnn.errors import UserError
from edgecnn.front import read_runs
from edgecnn.labels import overlaps
from edgecnn.names import TEST_SET
from edgecnn.peers import ORIGINAL

SCRIPT = str(REPOSITORY / "plot_pareto.py")


def row(variant, accuracy, megabytes, mmacs, **more):
    """A row as evaluate.py writes it, with a key that the plot has no use for."""
    bits = 8 if variant.endswith("int8") else 32
    return {
        "variant": variant,
        "accuracy_percent": accuracy,
        "accuracy_ci95_low_percent": accuracy - 0.7,
        "accuracy_ci95_high_percent": accuracy + 0.7,
        "size_bytes": int(megabytes * 2**20),
        "macs_nonzero": int(mmacs * 1e6),
        "relative_energy": mmacs * bits / 8,
        "latency_ms": 1.0,
        "test_set": TEST_SET,
        **more,
    }


FOUR = [
    row("baseline_fp32", 85.4, 2.37, 10.85),
    row("baseline_int8", 85.3, 0.61, 10.85),
    row("pruned_50_fp32", 86.6, 1.26, 5.42),
    row("pruned_50_int8", 86.5, 0.38, 5.42),
]
FOURTEEN = [
    *FOUR,
    row("control_fp32", 86.8, 2.37, 10.85),
    row("control_int8", 86.72, 0.61, 10.85),
    row("pruned_50_l1_fp32", 86.7, 1.26, 9.0),
    row("pruned_50_l1_int8", 86.65, 0.38, 9.0),
    row("pruned_70_fp32", 86.2, 0.81, 3.25),
    row("pruned_70_int8", 86.1, 0.27, 3.25),
    row("pruned_80_fp32", 85.7, 0.57, 2.2),
    row("pruned_80_int8", 85.6, 0.21, 2.2),
    row("pruned_90_fp32", 84.4, 0.32, 1.15),
    row("pruned_90_int8", 84.3, 0.13, 1.15),
]
# Five levels x three criteria x two precisions and the headline: as crowded as it gets.
SWEEP = [
    *FOURTEEN[:6],
    *(
        row(
            f"pruned_{percent}{name}_{precision}",
            round(accuracy - cost + (precision == "fp32") * 0.05, 2),
            (100 - percent) / 100 * (2.37 if precision == "fp32" else 0.6) * 0.8 + 0.07,
            10.85 * (100 - percent) / 100 * share,
        )
        for percent, accuracy in ((60, 86.5), (70, 86.35), (80, 86.1), (90, 85.2), (95, 83.6))
        for name, cost, share in (("", 0, 1), ("_l1", -0.15, 1.8), ("_energy", 0.2, 0.8))
        for precision in ("fp32", "int8")
    ),
]


def run(folder, *arguments):
    """The script's main() in a folder of its own: exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(folder), streams[0], streams[1]:
        try:
            run_main("plot_pareto", *arguments)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def write_metrics(folder, content, run_name=""):
    path = folder / "results" / run_name / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# The front ------------------------------------------------------------------------------------
def test_front_corners_are_a_staircase():
    corners = plot_pareto.front_corners([4, 1, 2], [88, 80, 85], [1, 2, 0], 10)
    assert corners.tolist() == [[1, 80], [2, 80], [2, 85], [4, 85], [4, 88], [10, 88]]


def test_references_never_enter_the_front():
    # Each variant is beaten by ResNet-8, and still the best of its own is drawn filled.
    figure = plot_pareto.draw([row("baseline_int8", 80.0, 2.0, 20.0)])
    for panel in figure.axes:
        filled = [line for line in panel.lines if line.get_markerfacecolor() == "#D55E00"]
        assert [list(line.get_ydata()) for line in filled] == [[80.0]]


def references_in(panel):
    """(cost, accuracy) of the grey marks."""
    return {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in panel.lines
        if line.get_color() == marks.GREY
    }


def test_each_panel_compares_what_is_comparable():
    original = sorted(o["accuracy_percent"] for o in ORIGINAL.values())
    accuracies = [sorted(a for _, a in references_in(x)) for x in plot_pareto.draw(FOUR).axes]
    # Our coded files are no .tflite; ResNet-8's flash needs ours.
    assert accuracies == [original, *[[*original, 86.97]] * 2]
    rows = [r | {"m4_flash_bytes": 2e5} for r in FOUR[1::2]] + FOUR[::2]
    figure = plot_pareto.draw(rows)
    flash = figure.axes[0]
    assert references_in(flash) == {(103_568 / 1024, 86.97)}
    assert "flash" in flash.get_xlabel() and "KiB" in flash.get_xlabel()
    drawn = sum(len(x.get_xdata()) for x in flash.lines if x.get_color() in ("#0072B2", "#D55E00"))
    assert drawn == 2  # what has no figure there is not drawn there


@pytest.mark.parametrize("test_set", ["validation split", "$x^$", None])
def test_no_reference_stands_beside_other_images(test_set):
    figure = plot_pareto.draw([r | {"test_set": test_set} for r in FOUR])
    assert not any(references_in(panel) for panel in figure.axes)
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any("original" in name or "ResNet" in name for name in names)


# Labels ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "limits"),
    [(FOUR, {}), (FOURTEEN, {"macs_m": 6, "accuracy": 85}), (SWEEP, {})],
    ids=["four", "fourteen, budget", "sweep"],
)
def test_the_front_alone_is_named_and_names_collide_with_nothing(rows, limits):
    figure = plot_pareto.draw(rows, limits)
    figure.canvas.draw()
    half = plot_pareto.MARKER_POINTS / 2 * figure.dpi / 72
    for n, panel in enumerate(figure.axes):
        texts = [text for text in panel.texts if text.get_text()]
        key, unit, *_ = plot_pareto.panel_axis(n, rows, limits)
        costs, accuracies = [r[key] / unit for r in rows], [r["accuracy_percent"] for r in rows]
        front = pareto_front(costs, accuracies)
        names = marks.short_labels(rows)
        expected = sorted(names[i] for i in front)
        assert sorted(text.get_text() for text in texts) == expected
        labels = [text.get_window_extent().extents for text in texts]
        assert not any(overlaps(a, b) for a, b in itertools.combinations(labels, 2))
        points = [*zip(costs, accuracies, strict=True), *references_in(panel)]
        for x, y in panel.transData.transform(points):
            mark = (x - half, y - half, x + half, y + half)
            assert not any(overlaps(label, mark) for label in labels)
        left, bottom, right, top = panel.get_window_extent().extents
        assert all(x0 >= left and x1 <= right for x0, _, x1, _ in labels)
        assert all(y0 >= bottom and y1 <= top for _, y0, _, y1 in labels)


@pytest.mark.parametrize("count", [60, 200])
def test_many_variants_on_one_front_are_drawn_within_seconds(count):
    rows = [
        row(f"pruned_{i / 4:g}_energy_int8", 80 + 0.05 * i, 0.1 * 1.01**i, 1.01**i)
        for i in range(1, count + 1)
    ]
    start = time.process_time()
    figure = plot_pareto.draw(rows)
    figure.canvas.draw()
    assert time.process_time() - start < 10
    for panel in figure.axes:
        labels = [text.get_window_extent().extents for text in panel.texts if text.get_text()]
        assert len(labels) > 10
        assert not any(overlaps(a, b) for a, b in itertools.combinations(labels, 2))


@pytest.mark.parametrize(("rows", "limits"), [(FOURTEEN, {}), (FOURTEEN[1::2], {"macs_m": 6})])
def test_all_text_lies_inside_the_picture(rows, limits):
    figure = plot_pareto.draw(rows, limits)
    figure.canvas.draw()
    box = figure.get_tightbbox()  # inches
    assert box.x0 >= 0 and box.y0 >= 0
    assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()


@pytest.mark.parametrize(
    ("variant", "label"),
    [
        ("baseline_fp32", "baseline"),
        ("control_int8", "control"),
        ("pruned_50_int8", "50 %"),
        ("pruned_50_l1_fp32", "50 % L1"),
        ("my own network", "my own network"),
        ("headline/pruned_50_int8", "50 %"),
        ("x" * 99, "x" * 23 + "…"),
    ],
)
def test_short_label(variant, label):
    assert marks.short_label({"variant": variant}) == label


def test_a_label_names_its_criterion_only_where_it_has_to():
    of = {
        "a/pruned_90_energy_int8": "90 %",
        "a/pruned_50_int8": "50 %",
        "a/pruned_50_l1_int8": "50 % L1",
        "a/pruned_50_fp32": "50 %",  # the marker tells it from INT8
        "b/pruned_50_lamp_int8": "50 %",
        "b/channels_30_bytes_pruned_80_energy_int8": "ch 30 %, 80 %",
        "b/channels_30_macs_control_int8": "ch 30 % control",
        "b/mine": "mine",
    }
    assert marks.short_labels([{"variant": name} for name in of]) == list(of.values())


# The picture ----------------------------------------------------------------------------------
def assert_valid_pictures(folder):
    png = (folder / "optimization_results.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png.rstrip(b"\0")[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (1800, 1110)
    root = ElementTree.parse(folder / "optimization_results.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "metrics.json",
        "optimization_results.png",
        "optimization_results.svg",
    ]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [([], ""), (["--smoke"], "smoke"), (["--run", "reference"], "reference")],
)
def test_writes_png_and_svg(tmp_path, arguments, name):
    write_metrics(tmp_path, FOUR, name)
    result = run(tmp_path, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    folder = Path("results") / name
    expected = [str(folder / f"optimization_results.{end}") for end in ("png", "svg")]
    assert result.stdout.splitlines() == expected
    assert_valid_pictures(tmp_path / folder)


def test_other_metrics_file_and_equal_bytes_again(tmp_path):
    write_metrics(tmp_path, FOUR).rename(tmp_path / "results" / "other.json")
    pictures = []
    for _ in range(2):
        assert run(tmp_path, "--metrics", "results/other.json", "--force").returncode == 0
        pictures.append([p.read_bytes() for p in sorted((tmp_path / "results").glob("opt*"))])
    assert pictures[0] == pictures[1] and len(pictures[0]) == 2


def test_unknown_variants_other_seeds_and_absent_options_are_no_error(tmp_path):
    rows = [
        row("$weird_^name", 31.0, 0.01, 200.0),  # neither mathematics nor a known method
        row("distilled_int4", 0.0, 5.0, 0.1, precision="int4", accuracy_ci95_low_percent=None),
        row("baseline_seed1_fp32", 84.0, 2.37, 10.85, seed=1),
        row("baseline_fp32", 85.0, 2.37, 10.85, seed=0),
    ]
    del rows[3]["accuracy_ci95_low_percent"], rows[3]["accuracy_ci95_high_percent"]
    write_metrics(tmp_path, rows)
    result = run(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert_valid_pictures(tmp_path / "results")
    texts = {text.get_text() for text in plot_pareto.draw(rows).axes[0].texts} - {""}
    # The names on the front; of a dominated stranger only a small mark remains.
    assert texts == {"$weird_^name", "baseline"}


def test_imports_no_torch(tmp_path):
    write_metrics(tmp_path, FOUR)
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(REPOSITORY)!r});"
        "sys.argv = ['plot_pareto.py'];"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__');"
        "sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_help_names_what_it_does(tmp_path):
    result = run(tmp_path, "--help")
    assert result.returncode == 0
    assert all(word in result.stdout for word in ("--smoke", "--run", "--metrics", "evaluate.py"))


# A budget -------------------------------------------------------------------------------------
def with_figures(rows):
    """The rows with what the limits on flash, RAM and energy are about."""
    return [
        r
        | {
            "weight_stored_bytes": int(1.1 * r["size_bytes"]),
            "activations_peak_bytes": 160_000 if "fp32" in r["variant"] else 40_000,
            "energy_sram_uj": 2 * r["relative_energy"],
        }
        for r in rows
    ]


def rings(panel):
    """Where the variants that meet the whole budget are marked."""
    lines = [x for x in panel.lines if x.get_markersize() == marks.RING_POINTS]
    return sorted((float(x.get_xdata()[0]), float(x.get_ydata()[0])) for x in lines)


def test_budget_shades_up_to_the_limit_and_rings_what_meets_all():
    rows = with_figures(SWEEP)
    limits = {"flash_kib": 300, "ram_kib": 64, "macs_m": 4, "accuracy": 85}
    figure = plot_pareto.draw(rows, limits)
    fitting = [
        r
        for r in rows
        if r["weight_stored_bytes"] <= 300 * 1024
        and "int8" in r["variant"]
        and r["macs_nonzero"] <= 4e6
        and r["accuracy_percent"] >= 85
    ]
    assert 1 < len(fitting) < len(rows)
    flash, _, energy = figure.axes
    scales = (("weight_stored_bytes", 1024), ("macs_nonzero", 1e6), ("relative_energy", 1))
    for panel, (key, unit) in zip(figure.axes, scales, strict=True):
        points = [(r[key] / unit, r["accuracy_percent"]) for r in fitting]
        assert np.allclose(rings(panel), sorted(points))
    corners = [
        np.vstack(
            [
                path.vertices
                for part in panel.collections
                if isinstance(part, PolyCollection)
                for path in part.get_paths()
            ]
        )
        for panel in figure.axes
    ]
    assert [c[:, 0].max() for c in corners] == [300, 4, pytest.approx(energy.get_xlim()[1])]
    assert all(c[:, 1].min() == 85 for c in corners)
    assert "flash" in flash.get_xlabel() and "modelled" in flash.get_xlabel()
    note = figure.texts[-1].get_text()
    best = max(fitting, key=lambda r: r["accuracy_percent"])["variant"]
    assert "flash_kib at most 300" in note and "ram_kib, which no panel shows" in note
    assert f"Best: {best}." in note.replace("\n", " ")


@pytest.mark.parametrize(
    ("limits", "shaded"),
    [({}, []), ({"macs_m": 4}, [1]), ({"ram_kib": 64}, []), ({"accuracy": 85}, [0, 1, 2])],
)
def test_panels_without_a_limit_are_not_shaded(limits, shaded):
    figure = plot_pareto.draw(with_figures(FOUR), limits)
    filled = [
        n
        for n, panel in enumerate(figure.axes)
        if any(isinstance(part, PolyCollection) for part in panel.collections)
    ]
    assert filled == shaded


@pytest.mark.parametrize("limits", [{"energy_uj": 1e-3}, {"energy_uj": 1e6}, {"accuracy": 99}])
def test_extreme_limits_leave_a_readable_picture(limits):
    figure = plot_pareto.draw(with_figures(FOURTEEN), limits)
    low, high = figure.axes[2].get_xlim()
    assert high / low < 1e4
    box = figure.get_tightbbox()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.get_figwidth()
    best = "Nothing fits." if limits != {"energy_uj": 1e6} else "Best: control_fp32."
    assert best in figure.texts[-1].get_text().replace("\n", " ")


def test_budget_gets_a_picture_of_its_own_and_user_errors(tmp_path):
    folder = write_metrics(tmp_path, with_figures(FOUR)).parent
    result = run(tmp_path, "--budget", "flash_kib=512", "accuracy=85")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in folder.glob("opt*")) == [
        "optimization_results_budget.png",
        "optimization_results_budget.svg",
    ]
    write_metrics(tmp_path, FOUR)
    for words, problem in (
        (["flash_kib=512"], "weight_stored_bytes"),
        (["flash_kib=x"], "not a number"),
    ):
        before = content_of(folder)
        result = run(tmp_path, "--budget", *words)
        assert (result.returncode, result.stdout) == (2, "") and problem in result.stderr
        assert len(result.stderr.splitlines()) == 1 and content_of(folder) == before


# Several runs ---------------------------------------------------------------------------------
def small(rows, points, share, **more):
    """The rows as another run's: so many points less accurate, all costs times `share`."""
    costs = ("size_bytes", "macs_nonzero", "relative_energy")
    costs += ("m4_flash_bytes", "stm32l4r5_energy_modelled_uj")
    return [
        {k: v * share if k in costs else v for k, v in r.items()}
        | {"accuracy_percent": r["accuracy_percent"] - points}
        | more
        for r in rows
    ]


def on_device(rows):
    """The rows, the INT8 ones with figures of the Cortex-M4."""
    figures = {"m4_flash_bytes": 2**20, "stm32l4r5_energy_modelled_uj": 1000}
    share = {r["variant"]: r["macs_nonzero"] / 11e6 for r in rows}
    return [
        r | {key: value * share[r["variant"]] for key, value in figures.items()}
        if r["variant"].endswith("int8")
        else r
        for r in rows
    ]


@pytest.fixture
def three(tmp_path, monkeypatch):
    """The rows of three runs, joined."""
    rows = on_device(FOURTEEN)
    for name, made in {
        "first": rows,
        "resnet8": small(rows, 2.0, 0.8),
        "old": small(rows, 0.4, 0.3),
    }.items():
        write_metrics(tmp_path, made, name)
    monkeypatch.chdir(tmp_path)
    return read_runs(["first", "resnet8", "old"], {})


def test_one_picture_shows_all_runs_and_the_joint_front(three):
    figure = plot_pareto.draw(three, joint=True)
    figure.canvas.draw()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == ["first", "resnet8", "old"] and "INT8" not in names
    int8 = [r for r in three if r["variant"].endswith("int8")]  # the others lack two figures
    keys = ("m4_flash_bytes", "macs_nonzero", "stm32l4r5_energy_modelled_uj")
    for panel, key, unit in zip(figure.axes, keys, (1024, 1e6, 1), strict=True):
        costs, accuracies = [r[key] / unit for r in int8], [r["accuracy_percent"] for r in int8]
        front = pareto_front(costs, accuracies)
        assert len({run_of(int8[i]) for i in front}) == 2
        filled = [x for x in panel.lines if x.get_markersize() == marks.MARKER_POINTS]
        drawn = {(x, y, line.get_color()) for line in filled for x, y in line.get_xydata()}
        styles = marks.styles_of(three, joint=True)
        expected = {(costs[i], accuracies[i], styles[run_of(int8[i])][1]) for i in front}
        assert drawn == expected
        names = marks.short_labels(int8)
        expected = sorted(names[i] for i in front)
        assert sorted(t.get_text() for t in panel.texts if t.get_text()) == expected
        labels = [t.get_window_extent().extents for t in panel.texts if t.get_text()]
        assert not any(overlaps(a, b) for a, b in itertools.combinations(labels, 2))
        assert [a for _, a in references_in(panel)] == [86.97]  # the original's are not drawn
    assert references_in(figure.axes[2]) == {(5496, 86.97)}  # measured, not modelled
    theirs = [r | {"test_set": "validation split"} for r in three]
    assert not any(map(references_in, plot_pareto.draw(theirs, joint=True).axes))


def test_a_panel_shows_what_every_run_has(three):
    bare = [
        {k: v for k, v in r.items() if not (run_of(r) == "old" and k.startswith(("m4", "stm")))}
        for r in three
    ]
    labels = [panel.get_xlabel() for panel in plot_pareto.draw(bare, joint=True).axes]
    assert "file size" in labels[0] and "relative energy score" in labels[2]
    split = [
        {k: v for k, v in r.items() if not k.startswith(("m4", "stm")[i % 2])}
        for i, r in enumerate(r for r in three if r["variant"].endswith("int8"))
    ]
    with pytest.raises(UserError, match="no variant of these runs has all of m4_flash_bytes"):
        plot_pareto.draw(split, joint=True)


def test_marks_tell_runs_apart_without_colour_and_end(three):
    assert len(dict(marks.RUNS)) == len({c for _, c in marks.RUNS}) == len(marks.RUNS)
    for count in (len(marks.RUNS), len(marks.RUNS) + 1):
        rows = [
            r | {"variant": f"$x^$ run number {n}, of a long name/{v}"}
            for n in range(count)
            for r, v in ((r, r["variant"].rpartition("/")[2]) for r in three[:14])
        ]
        if count > len(marks.RUNS):
            with pytest.raises(UserError, match="leave some out"):
                plot_pareto.draw(rows, joint=True)
            continue
        figure = plot_pareto.draw(rows, {"macs_m": 6, "accuracy": 85}, joint=True)
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()
        legend, panel = (x.get_window_extent() for x in (figure.legends[0], figure.axes[0]))
        assert legend.y0 >= panel.y1


def test_the_joint_picture_is_kept_until_a_run_changes(three, tmp_path):
    command = ("--run", "first", "resnet8", "old")
    result = run(tmp_path, *command)
    path = tmp_path / "results/front/first_resnet8_old.png"
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == str(path.relative_to(tmp_path))
    assert run(tmp_path, *command).stdout.startswith("kept: ")
    for name in ("first", "old"):
        metrics = tmp_path / "results" / name / "metrics.json"
        metrics.write_text(metrics.read_text() + "\n")
    said = run(tmp_path, *command).stdout
    assert "anew: first/metrics.json, old/metrics.json changed" in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["first", "first"], "twice"),
        (["first", "none"], "results/none/metrics.json is missing"),
        (["first", "digits"], "first: CIFAR-10 test set"),
        (["first", "old", "--break-even"], "one run"),
        (["first", "old", "--layers", "baseline_int8"], "one run"),
        (["first", "old", "--metrics", "results/old/metrics.json"], "one run"),
        (["first", "old", "--smoke"], "different folders"),
    ],
)
def test_bad_runs_end_in_one_line(three, tmp_path, arguments, problem):
    write_metrics(tmp_path, small(FOUR, 0, 1, test_set="test set of digits"), "digits")
    result = run(tmp_path, "--run", *arguments)
    assert (result.returncode, result.stdout) == (2, "") and problem in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "results/front").exists()


# Bad input ------------------------------------------------------------------------------------
def without(key):
    return [FOUR[0], {k: v for k, v in FOUR[1].items() if k != key}]


def with_value(key, value):
    return [FOUR[0], FOUR[1] | {key: value}]


BAD = {
    "empty file": ("", "not readable JSON"),
    "malformed": ("[{]", "not readable JSON"),
    "empty list": ([], "empty"),
    "no list": ({"rows": []}, "not a list"),
    "no object": ([FOUR[0], 3], "row 2: it is not an object"),
    "no name": (without("variant"), "row 2"),
    "blank name": (with_value("variant", " "), "row 2"),
    "no accuracy": (without("accuracy_percent"), '"accuracy_percent" is missing'),
    "no size": (without("size_bytes"), 'row 2 (baseline_int8): "size_bytes" is missing'),
    "no MACs": (without("macs_nonzero"), '"macs_nonzero" is missing'),
    "no energy": (without("relative_energy"), '"relative_energy" is missing'),
    "text": (with_value("size_bytes", "many"), "\"size_bytes\" is 'many'"),
    "null": (with_value("relative_energy", None), '"relative_energy" is None'),
    "boolean": (with_value("macs_nonzero", True), '"macs_nonzero" is True'),
    "NaN": (with_value("relative_energy", float("nan")), '"relative_energy" is nan'),
    "infinite": (with_value("relative_energy", float("inf")), '"relative_energy" is inf'),
    "huge": (with_value("size_bytes", 10**400), '"size_bytes" is 1000'),
    "zero cost": (with_value("macs_nonzero", 0), '"macs_nonzero" is 0'),
    "negative cost": (with_value("size_bytes", -1), '"size_bytes" is -1'),
    "accuracy above 100": (with_value("accuracy_percent", 850), '"accuracy_percent" is 850'),
    "bad interval": (with_value("accuracy_ci95_low_percent", "x"), '"accuracy_ci95_low_percent"'),
}


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("content", "problem"), BAD.values(), ids=BAD)
def test_bad_input_exits_2_and_keeps_the_old_picture(
    tmp_path, monkeypatch, capsys, content, problem
):
    folder = write_metrics(tmp_path, content).parent
    (folder / "optimization_results.png").write_bytes(b"old")
    before = content_of(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot_pareto.py"])
    with pytest.raises(SystemExit) as caught:
        plot_pareto.main()
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and (not out or out.startswith("making results/"))
    assert problem in err and "python evaluate.py" in err
    assert len(err.splitlines()) == 1 and len(err) < 400
    assert content_of(folder) == before


def test_missing_metrics_exit_2_in_one_line(tmp_path):
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "results/metrics.json is missing" in result.stderr
    assert len(result.stderr.splitlines()) == 1 and "python evaluate.py" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_picture_exits_2(tmp_path):
    metrics = write_metrics(tmp_path, FOUR)
    (metrics.parent / "optimization_results.svg").mkdir()  # refuses every user, root included
    result = run(tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "cannot write" in result.stderr
    names = sorted(path.name for path in metrics.parent.iterdir())
    assert names == ["metrics.json", "optimization_results.svg"]

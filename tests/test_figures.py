"""The further figures: every line of the JSON is drawn, and bad input is one line."""

import json
import shutil

import pytest
from conftest import REPOSITORY, fails, run_main

from edgecnn.figures import BREAK_EVEN_PANELS, draw_break_even, draw_layers

REFERENCE = REPOSITORY / "results/reference"


def test_break_even_picture_draws_every_line_of_the_json(workdir, capsys):
    shutil.copytree(REFERENCE, workdir / "results/reference")
    rows = json.loads((REFERENCE / "break_even.json").read_text())
    figure = draw_break_even(rows)
    for panel, (_, lines) in zip(figure.axes, BREAK_EVEN_PANELS, strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
        for key, unit, name, *_ in lines:
            assert list(drawn[name]) == [row[key] / unit for row in rows]
    run_main("plot_pareto", "--run", "reference", "--break-even", "--force")
    del rows[0]["m4_dense_instructions"]
    (workdir / "results/reference/break_even.json").write_text(json.dumps(rows))
    error = fails(capsys, workdir, "plot_pareto", "--run", "reference", "--break-even")
    assert "m4_dense_instructions" in error


def test_layers_picture_is_of_one_variant(workdir, capsys):
    shutil.copytree(REFERENCE, workdir / "results/reference")
    rows = [r for r in json.loads((REFERENCE / "layers.json").read_text())]
    variant = "pruned_90_energy_int8"
    figure = draw_layers(variant, [r for r in rows if r["variant"] == variant])
    stored = [r["stored_bytes"] / 1024 for r in rows if r["variant"] == variant]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx(stored)
    run_main("plot_pareto", "--run", "reference", "--layers", variant)
    error = fails(capsys, workdir, "plot_pareto", "--run", "reference", "--layers", "none")
    assert variant in error

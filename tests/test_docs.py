"""README.md and docs/: generated blocks equal what is rendered, figures in the text their JSON."""

import json
import math
import re
import shutil
import subprocess

import pytest
from conftest import REPOSITORY, fails, run_main

from edgecnn.docs import BLOCK, NEEDED, pages, refreshed
from edgecnn.errors import UserError
from edgecnn.files import sha256
from edgecnn.front import front_table, read_runs

# A figure and its comment: `93.4<!-- headline/pruned_93_energy_int8.m4_flash_bytes /1024 -->`.
TRACE = re.compile(
    r"([-+−]?\d[\d,]*(?:\.\d+)?)<!-- "
    r"([\w/-]+(?:\.\d+_[\w-]+)?)\.([\w.-]+)(?: ([*/][\d.e]+))? -->"  # pruned_83.5_energy_int8
)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def value_of(source: str, keys: str):
    """A committed figure: RUN/variant.key of metrics.json, or RUN/file.key.key of another JSON.

    In a list a key is an index; -1 is the last.
    """
    run, _, name = source.partition("/")
    folder = REPOSITORY / "results" / run
    metrics = folder / "metrics.json"
    rows = json.loads(metrics.read_text()) if metrics.exists() else []
    found = next((r for r in rows if r["variant"] == name), None)
    if found is None or keys.split(".")[0] not in found:
        found = json.loads((folder / f"{name}.json").read_text())
    for key in keys.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    return found


def agrees(shown: str, value: float) -> bool:
    """Whether a figure is the value rounded to the digits shown, at least two of them."""
    figure = float(shown.replace(",", "").replace("−", "-"))
    decimals = len(shown.partition(".")[2])
    digits = math.floor(math.log10(abs(value))) + 1 if value else 1
    zeros = 0 if decimals else len(shown) - len(shown.replace(",", "").rstrip("0"))
    kept = [decimals, *(-d for d in range(1, min(zeros, digits - 2) + 1))]
    return any(math.isclose(round(value, d), figure, abs_tol=1e-9) for d in kept)


@pytest.mark.parametrize(
    ("shown", "value", "right"),
    [
        ("88.25", 88.25, True),
        ("88.2", 88.25, True),
        ("88.3", 88.2, False),
        ("2,003,985", 2_003_985, True),
        ("2,000", 1986.4, True),
        ("2,100", 1986.4, False),
        ("1,900", 1986.4, False),
        ("2,000", 1449, False),  # one digit is too few
        ("400", 403.24, True),
        ("8.29", 8.293, True),
        ("-0.05", -0.05, True),
        ("1,990", 1986.4, True),
        ("50", 49.9, True),
        ("0", 0, True),
    ],
)
def test_a_figure_agrees_where_it_is_the_value_rounded(shown, value, right):
    assert agrees(shown, value) is right


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    return pages()


def test_every_block_is_what_the_committed_json_renders(here):
    texts = [path.read_text(encoding="utf-8") for path in here]
    assert sum(len(BLOCK.findall(text)) for text in texts) > 5
    for path, text in zip(here, texts, strict=True):
        assert refreshed(text) == text, f"{path}: python evaluate.py --run RUN --docs"


def test_every_traced_figure_is_the_committed_json(here):
    count = 0
    for path in here:
        text = path.read_text(encoding="utf-8")
        traces = list(TRACE.finditer(text))
        marks = 2 * len(BLOCK.findall(text))
        # A comment that is neither a block's mark nor a trace after a figure would check nothing.
        assert len(COMMENT.findall(text)) == len(traces) + marks, path
        for shown, source, keys, scale in (match.groups() for match in traces):
            value = value_of(source, keys)
            if scale:
                factor = float(scale[1:])
                value = value / factor if scale[0] == "/" else value * factor
            assert agrees(shown, value), f"{path}: {shown} is not {source}.{keys} = {value}"
            count += 1
    assert count > 5


# ---- refreshing --------------------------------------------------------------------------------


def test_the_answer_in_the_readme_is_what_its_command_prints(here, capsys):
    command, answer = re.search(
        r"python evaluate\.py (--run headline --budget .*)\n```\n\n```\n(.*?)```",
        (REPOSITORY / "README.md").read_text(),
        re.DOTALL,
    ).groups()
    run_main("evaluate", *command.split())
    assert capsys.readouterr().out == answer


@pytest.fixture
def copied(workdir):
    shutil.copytree(REPOSITORY / "results/headline", workdir / "results/headline")
    (workdir / "results/headline/own.md").write_text("| own |\n")
    return workdir


def test_blocks_are_replaced_and_nothing_else(copied):
    text = "a\n<!-- begin: headline own -->\nold\n<!-- end: headline own -->\nb\n"
    assert refreshed(text) == text.replace("old", "| own |")
    main = "<!-- begin: headline main -->\n<!-- end: headline main -->"
    assert "pruned_93_energy_int8" in refreshed(main)
    assert refreshed(refreshed(main)) == refreshed(main)
    for spoilt in (text.replace("end:", "ende:"), text.replace("begin: h", "begin: x h")):
        with pytest.raises(UserError, match="no partner"):
            refreshed(spoilt)
    with pytest.raises(UserError, match="no table nothing; it has main"):
        refreshed(main.replace("main", "nothing"))


def test_docs_measures_nothing_and_joins_and_renders_everything(copied, capsys):
    folder = copied / "results/headline"
    committed = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    (folder / "table.md").unlink()
    rows = json.loads((folder / "metrics.json").read_text())
    bare = [{k: v for k, v in r.items() if not k.startswith(("m4_", "stm32"))} for r in rows]
    (folder / "metrics.json").write_text(json.dumps(bare))
    (copied / "README.md").write_text(
        "<!-- begin: headline lead -->\n<!-- end: headline lead -->\n"
    )
    (copied / "docs").mkdir()
    (copied / "docs/page.md").write_text("no block\n")
    run_main("evaluate", "--run", "headline", "--docs")
    assert "wrote README.md" in capsys.readouterr().out
    assert "CMSIS-NN" in (copied / "README.md").read_text()
    for name in ("table.md", "table_all.md"):
        assert (folder / name).read_bytes() == committed[name]
    again = {r["variant"]: r for r in json.loads((folder / "metrics.json").read_text())}
    assert again == {r["variant"]: r for r in rows}


def test_docs_without_a_run_is_one_line(workdir, capsys):
    assert "metrics.json is missing" in fails(capsys, workdir, "evaluate", "--docs")


def test_the_joint_front_is_a_block_of_several_runs(copied, capsys):
    shutil.copytree(REPOSITORY / "results/resnet8", copied / "results/my-own")
    (copied / "results/headline/table.md").unlink()
    block = "<!-- begin: front headline_my-own -->\n<!-- end: front headline_my-own -->\n"
    (copied / "README.md").write_text(block)
    run_main("evaluate", "--run", "headline", "my-own", "--docs")
    assert "wrote results/front/headline_my-own.md\nwrote README.md" in capsys.readouterr().out
    table = (copied / "results/front/headline_my-own.md").read_text()
    assert table.startswith("| Run and variant ") and "my-own/baseline_int8" in table
    assert table in (copied / "README.md").read_text()
    assert not (copied / "results/headline/table.md").exists()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "results/front").glob("*.md")), ids=str)
def test_committed_joint_fronts_are_of_the_committed_metrics(path, here):
    record = json.loads((path.parent / "steps" / f"{path.stem}.json").read_text())
    runs = [name.removesuffix("/metrics.json") for name in record["parents"]]
    assert "_".join(runs) == path.stem
    assert front_table(read_runs(runs, NEEDED)) + "\n" == path.read_text(encoding="utf-8")
    assert record["parents"] == {name: sha256(f"results/{name}") for name in record["parents"]}


def test_git_has_no_picture_without_a_page_and_at_most_25_mib(here):
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    text = "".join(path.read_text(encoding="utf-8") for path in here)
    for name in listed.splitlines():
        if name.endswith((".png", ".svg")) and name.startswith("results/"):
            assert f"{name})" in text, name
    assert sum((REPOSITORY / name).stat().st_size for name in listed.splitlines()) <= 25 * 2**20

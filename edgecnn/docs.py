"""Generated tables: a run's table.md and table_all.md, and the blocks of README.md and docs/*.md.

A block is `<!-- begin: RUN NAME -->`, a table, `<!-- end: RUN NAME -->`. NAME is one of tables.TITLES,
or a Markdown file that a step left in results/RUN/. Imports no torch.
"""

import re
from pathlib import Path

from edgecnn.errors import UserError
from edgecnn.files import json_bytes, read_rows, write_text
from edgecnn.front import front_path, front_table, read_runs
from edgecnn.hardware import read_break_even, read_hardware, with_hardware
from edgecnn.names import results_dir
from edgecnn.step import results_step
from edgecnn.tables import SHORT, blocks, page

TABLES = ("metrics.json", "table.md", "table_all.md")
BLOCK = re.compile(r"<!-- begin: ([\w-]+) ([\w-]+) -->\n(.*?)<!-- end: \1 \2 -->", re.DOTALL)
ANY = (0, 1e15)
NEEDED = dict.fromkeys(("size_bytes", "macs", "macs_nonzero", "sparsity_percent"), ANY)
NEEDED |= {"relative_energy": ANY}
NEEDED |= dict.fromkeys(("seed", "method", "precision"))
NEEDED |= dict.fromkeys(("accuracy_ci95_low_percent", "accuracy_ci95_high_percent"), (0, 100))


def joined_files(folder: Path) -> list[Path]:
    """What simulate_hardware.py left in a results folder for the tables, as far as it is there."""
    return [
        folder / name for name in ("hardware.json", "break_even.json") if (folder / name).exists()
    ]


def break_even_of(folder: Path) -> list[dict]:
    """The run's break-even rows; none without the file."""
    return read_break_even(folder) if (folder / "break_even.json").exists() else []


def run_blocks(folder: Path) -> dict[str, str]:
    """The tables of a results folder, by name; raises UserError without a sound metrics.json."""
    rows = read_rows(folder / "metrics.json", NEEDED)
    return blocks(rows, break_even_of(folder))


def table_files(folder: Path, rows: list[dict], hardware: list[dict]) -> dict[str, bytes]:
    """TABLES as bytes, of rows joined with the targets' figures: what evaluate.py writes."""
    rows, break_even = with_hardware(rows, hardware), break_even_of(folder)
    short = page(blocks(rows, break_even), SHORT)
    whole = page(blocks(rows, break_even, everything=True))
    contents = (json_bytes(rows), short.encode(), whole.encode())
    return dict(zip(TABLES, contents, strict=True))


def rendered(run: str, name: str) -> str:
    """A block's text; raises UserError where the run has no such table."""
    folder = results_dir(run)
    if (folder / f"{name}.md").exists():
        return (folder / f"{name}.md").read_text(encoding="utf-8").rstrip() + "\n"
    found = run_blocks(folder)
    if name not in found:
        raise UserError(f"run {run} has no table {name}; it has {', '.join(found)}")
    return found[name] + "\n"


def refreshed(text: str) -> str:
    """A page's text with every block rendered anew; raises UserError where one is not closed."""
    found = BLOCK.findall(text)
    if not len(found) == text.count("<!-- begin: ") == text.count("<!-- end: "):
        raise UserError("a block's begin or end has no partner: `<!-- begin: RUN NAME -->`")

    def block(match):
        run, name, _ = match.groups()
        return f"<!-- begin: {run} {name} -->\n{rendered(run, name)}<!-- end: {run} {name} -->"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """README.md and docs/*.md, as far as they are here."""
    return [
        path for path in [Path("README.md"), *sorted(Path("docs").glob("*.md"))] if path.exists()
    ]


def render(runs: list[str]) -> None:
    """Write the run's tables, of several runs their joint front; then refresh every page's blocks.

    Measures nothing: hardware.json is joined again, several runs' metrics.json are taken as they are.
    """
    if len(runs) > 1:
        path = front_path(runs, "md")
        write_text(path, front_table(read_runs(runs, NEEDED)) + "\n")
        print(f"wrote {path}")
    else:
        render_run(results_dir(runs[0]))
    for path in pages():
        text = path.read_text(encoding="utf-8")
        fresh = refreshed(text)
        if fresh != text:
            write_text(path, fresh)
            print(f"wrote {path}")


def render_run(folder: Path) -> None:
    """Join a run's hardware.json again and write its tables."""
    rows = read_rows(folder / "metrics.json", NEEDED)
    step = results_step(folder, "evaluate", {}, {}, joined_files(folder), TABLES)
    contents = table_files(folder, rows, read_hardware(folder))
    step.amend({folder / name: content for name, content in contents.items()})
    print(f"wrote {', '.join(TABLES)} in {folder}")

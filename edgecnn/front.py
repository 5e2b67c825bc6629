"""Several runs on one table: their rows joined, and the front over all their variants. No torch.

Variants compare on figures that all of them have: one that lacks a figure does not compete.
Accuracies compare on the same images alone.
"""

from pathlib import Path

from edgecnn.cells import ENERGY, KIB, energy, key, markdown_table
from edgecnn.compare import dominates, lowest_seed_rows, run_of
from edgecnn.errors import UserError
from edgecnn.files import read_rows
from edgecnn.names import FRONT, results_dir

COSTS = ("m4_flash_bytes", "m4_ram_bytes", "macs_nonzero", ENERGY.format(""))


def front_path(runs: list[str], end: str) -> Path:
    """Where what is made of several runs lies: results/front/<run>_<run>.<end>."""
    return results_dir(FRONT) / f"{'_'.join(results_dir(run).name for run in runs)}.{end}"


def read_runs(runs: list[str], needed: dict, optional: dict | None = None) -> list[dict]:
    """The rows of one run as they are; of several joined, each called `<run>/<variant>`.

    Raises UserError for what files.read_rows refuses, a run given twice, and other test images.
    """
    if len(runs) == 1:
        return read_rows(results_dir(runs[0]) / "metrics.json", needed, optional)
    if len(set(runs)) < len(runs):
        raise UserError("--run names a run twice; give each once")
    rows = []
    for run in runs:
        path = results_dir(run) / "metrics.json"
        for row in read_rows(path, needed | {"test_set": None}, optional):
            rows.append(row | {"variant": f"{path.parent.name}/{row['variant']}"})
    images = {run_of(row): (row["test_set"], row.get("test_images")) for row in rows}
    if len(set(images.values())) > 1:
        told = ", ".join(f"{run}: {name}, {n} images" for run, (name, n) in images.items())
        raise UserError(f"accuracies on different images do not compare ({told}); leave a run out")
    return rows


def front_table(rows: list[dict]) -> str:
    """The joined rows that no other dominates in accuracy and COSTS; who dominates the others.

    Raises UserError where no row has all of COSTS.
    """
    all_rows = lowest_seed_rows(rows)
    rivals = [row for row in all_rows if all(row.get(cost) is not None for cost in COSTS)]
    rivals.sort(key=lambda row: -row["accuracy_percent"])
    if not rivals:
        raise UserError(
            "no variant of these runs has figures of the Cortex-M4; run, of each: "
            "python simulate_hardware.py, then python evaluate.py"
        )
    # Of each, the most accurate that dominates it.
    winner = {
        row["variant"]: next((r["variant"] for r in rivals if dominates(r, row, COSTS)), None)
        for row in rivals
    }
    parts = {
        "Run and variant": lambda row: row["variant"],
        "Accuracy %": key("accuracy_percent", 1, 2),
        "Flash, KiB": key("m4_flash_bytes", KIB, 1),
        "RAM, KiB": key("m4_ram_bytes", KIB, 1),
        "Non-zero MACs, M": key("macs_nonzero", 1e6, 2),
        "Energy, µJ, modelled (low-high)": energy,
    }
    front = [row for row in rivals if winner[row["variant"]] is None]
    table = markdown_table([*parts], [[text(row) for text in parts.values()] for row in front])
    beaten = "; ".join(f"{name} by {best}" for name, best in winner.items() if best)
    notes = [f"Dominated: {beaten}."] if beaten else []
    absent = len(all_rows) - len(rivals)
    if absent:
        notes.append(f"{absent} more lack a figure of this table, and do not compete.")
    return "\n\n".join([table, " ".join(notes)] if notes else [table])

"""hardware.json beside metrics.json: figures joined by checkpoint, energy from cycles. No torch."""

from pathlib import Path

from edgecnn.budget import BOARDS
from edgecnn.cells import KIB
from edgecnn.files import read_table
from edgecnn.names import command
from edgecnn.records import MOST

# The keys of hardware.json begin so; those of a checkpoint's own row never do.
HARDWARE_KEYS = ("hardware_", "m4_", "m7_", "u55_", "u65_", "u85_", "stm32", "tflite_")
BREAK_EVEN_KEYS = (
    "zeros_percent",
    *(f"m{c}_{k}_instructions" for c in (4, 7) for k in ("dense", "sparse")),
    *("m4_dense_flash_bytes", "m4_sparse_flash_bytes"),
    *("u55_128_cycles_modelled", "u55_128_flash_bytes_modelled"),
)
# Picojoules a clock cycle of an STM32L4R5 at 120 MHz, by the end of the band: (published energy an
# inference) * (inferences a second) / 120 MHz of ResNet-8 in MLPerf Tiny's runs on this chip:
#   v1.1 X-CUBE-AI 8.1 at 1.8 V 274, v1.3 10.2 with an external SMPS 276, v0.5 TFLM 346,
#   v1.2 X-CUBE-AI 9.0 349, v1.1 ONNC 354 and 420, v1.0 microTVM 433 and native 457,
#   v1.1 X-CUBE-AI 8.0 and 7.3 at 3.0 V 650 and 652.
# What differs is the supply more than the code. The figure itself takes the supply of ResNet-8's best
# run (5,496 uJ, v1.3), so that the two are alike in it; the band runs from the least to the most.
PICOJOULES_A_CYCLE = {"_low": 274, "": 276, "_high": 652}
ENERGY_NEEDS = {"m4_flash_bytes", *(f"m4_cycles_modelled{end}" for end in PICOJOULES_A_CYCLE)}


def stm32l4r5_energy_uj(row: dict) -> dict:
    """The energies that a row's modelled cycles imply, by key; None where it outgrows the flash."""
    fits = row["m4_flash_bytes"] <= BOARDS["stm32l4r5"].flash_kib * KIB
    return {
        f"stm32l4r5_energy_modelled{end}_uj": round(row[f"m4_cycles_modelled{end}"] * pj / 1e6, 3)
        if fits
        else None
        for end, pj in PICOJOULES_A_CYCLE.items()
    }


def read_hardware(folder: Path) -> list[dict]:
    """The rows of the run's hardware.json, none without the file; raises UserError for other JSON."""
    path = folder / "hardware.json"
    made_by, needed = command("simulate_hardware", folder), {"checkpoint_sha256": None}
    return read_table(path, made_by, needed) if path.exists() else []


def with_hardware(rows: list[dict], hardware: list[dict]) -> list[dict]:
    """Rows with the plain figures of the very same checkpoint as columns, and the energy they imply."""
    found = {row["checkpoint_sha256"]: row for row in hardware}
    joined = []
    for row in rows:
        ours = {k: v for k, v in row.items() if not k.startswith(HARDWARE_KEYS)}
        theirs = {
            key: value
            for key, value in found.get(row.get("checkpoint_sha256"), {}).items()
            if key.startswith(HARDWARE_KEYS) and not isinstance(value, dict | list)
        }
        complete = all(theirs.get(key) is not None for key in ENERGY_NEEDS)
        energy = stm32l4r5_energy_uj(theirs) if complete else {}
        joined.append(ours | theirs | energy)
    return joined


def read_break_even(folder: Path) -> list[dict]:
    """The rows of the run's break_even.json, its figures checked; raises UserError."""
    needed = dict.fromkeys(BREAK_EVEN_KEYS, (0, MOST)) | {"zeros_percent": (0, 100)}
    made_by = f"{command('simulate_hardware', folder)} --break-even"
    return read_table(folder / "break_even.json", made_by, needed)

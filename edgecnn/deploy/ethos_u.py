"""What a .tflite file costs on an Arm Ethos-U NPU, as Arm's own compiler, Vela, models it.

Vela compiles the file and estimates cycles from its model of the NPU and its memories; nothing here
was run on silicon. It codes weights without loss, so that zeros shrink what has to be fetched.
"""

import csv
import importlib.util
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from edgecnn.deploy.tools import run_tool
from edgecnn.errors import UserError

ACCELERATOR = "ethos-u55-128"
OPERATORS = re.compile(r"^(CPU|NPU) operators = (\d+) ", re.MULTILINE)


def vela_installed() -> bool:
    """Whether Vela can be called; where it cannot, its figures are "not measured"."""
    return importlib.util.find_spec("ethosu") is not None


def accelerators() -> list[str]:
    """The names that the installed Vela knows."""
    from ethosu.vela.architecture_features import Accelerator

    return [member.value for member in Accelerator]


def require_accelerator(name: str) -> None:
    """Raise UserError, listing those there are, when the installed Vela does not know the name."""
    if vela_installed() and name not in accelerators():
        raise UserError(f"Vela knows no accelerator {name}; it knows {', '.join(accelerators())}")


def run_vela(tflite: bytes, accelerator: str, folder: Path) -> tuple[dict, str]:
    """(the one row of Vela's summary, its report) of a .tflite file, compiled in `folder`."""
    folder = folder.resolve()
    path = folder / "network.tflite"
    path.write_bytes(tflite)
    # -P and cwd: a module that lies where the user works is never imported.
    command = [sys.executable, "-P", "-m", "ethosu.vela", str(path), "--output-dir", str(folder)]
    command += ["--accelerator-config", accelerator]
    process = run_tool(command, name="Vela", folder=folder)
    summaries = list(folder.glob("network_summary_*.csv"))
    if process.returncode or len(summaries) != 1:
        lines = (process.stderr.strip() or process.stdout.strip() or "it said nothing").splitlines()
        raise UserError(f"Vela cannot compile the file for {accelerator}: {lines[-1]}")
    with summaries[0].open(newline="") as file:
        (row,) = csv.DictReader(file)
    return row, process.stdout


def npu_cost(tflite: bytes, accelerator: str = ACCELERATOR) -> dict:
    """Flat figures of a .tflite file on an Ethos-U with Vela's default memories for it.

    The keys begin with the accelerator, `u55_128_`: cycles and milliseconds at the stated clock;
    the peak bytes of each memory in use (sram, flash, dram), coded weights included; the bytes of
    the coded weights; the share of operators that the NPU takes; Vela's version and configuration.
    Everything ending in _modelled is an estimate of Vela's. Raises UserError when Vela is not
    installed, does not know the accelerator or cannot compile the file.
    """
    if not vela_installed():
        raise UserError(
            "ethos-u-vela is not installed; install it with: pip install -r firmware/requirements.txt"
        )
    require_accelerator(accelerator)
    with tempfile.TemporaryDirectory() as folder:
        row, report = run_vela(tflite, accelerator, Path(folder))
    operators = {place: int(count) for place, count in OPERATORS.findall(report)}
    used = {  # the summary is in KiB
        "sram": float(row["sram_memory_used"]),
        "flash": float(row["on_chip_flash_memory_used"]) + float(row["off_chip_flash_memory_used"]),
        "dram": float(row["dram_memory_used"]),
    }
    clock_hz, cycles = float(row["core_clock"]), int(float(row["cycles_total"]))
    figures = {
        "cycles_modelled": cycles,
        "clock_mhz": clock_hz / 1e6,
        "latency_ms_modelled": round(1e3 * cycles / clock_hz, 6),
        **{f"{area}_bytes_modelled": round(1024 * kib) for area, kib in used.items() if kib},
        "weights_coded_bytes": int(row["total_npu_encoded_weights"]),
        "operators_on_npu_percent": round(100 * operators["NPU"] / sum(operators.values()), 2),
        "system_config": row["system_config"],
        "memory_mode": row["memory_mode"],
        "vela_version": version("ethos-u-vela"),
    }
    prefix = accelerator.removeprefix("ethos-").replace("-", "_")
    return {f"{prefix}_{key}": value for key, value in figures.items()}

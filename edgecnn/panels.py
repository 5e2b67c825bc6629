"""What the Pareto picture's panels show: their axes, and the figures of others beside them. No torch."""

from edgecnn.budget import LIMITS, figure_for
from edgecnn.cells import KIB
from edgecnn.compare import run_of
from edgecnn.errors import UserError
from edgecnn.names import TEST_SET
from edgecnn.peers import ORIGINAL, RESNET8

# A panel a line: the row's key, what one axis unit is in the key's unit, the axis label, and the
# limits of a budget that take its place.
FLASH = ("m4_flash_bytes", KIB, "flash on a Cortex-M4\n(KiB, the linked program)")
FILE = ("size_bytes", KIB, "file size\n(KiB)")
SCORE = ("relative_energy", 1, "relative energy score\n(million MACs × bits/8, zeros skipped)")
ENERGY = ("stm32l4r5_energy_modelled_uj", 1, "energy an inference, STM32L4R5\n(µJ, modelled)")
PANELS = (
    (FILE, ("flash_kib",)),  # FLASH, where each run has it
    (("macs_nonzero", 1e6, "non-zero MACs\n(millions an image)"), ("macs_m",)),
    (SCORE, ("energy_uj", "energy_stm32l4r5_uj")),  # of several runs ENERGY, where each has it
)
LIMIT_LABELS = {
    "flash_kib": "flash\n(KiB, {origin})",
    "macs_m": "non-zero MACs\n(millions an image)",
    "energy_uj": "energy an inference, weights in SRAM\n(µJ, {origin})",
    "energy_stm32l4r5_uj": "energy an inference, STM32L4R5\n(µJ, {origin})",
}
# Points from elsewhere: legend text, marker, figures under our keys.
REFERENCES = [
    *((f"original: {o['name']}", "+xv"[i], o) for i, o in enumerate(ORIGINAL.values())),
    (RESNET8["name"], "*", RESNET8),
]
MEASURED = {ENERGY[0]: RESNET8["stm32l4r5_energy_measured_uj"]}
JOINT_REFERENCES = [(RESNET8["name"], "*", RESNET8 | MEASURED)]


def references_for(rows: list[dict], joint: bool) -> list[tuple]:
    """Others' points, where every accuracy is of the test set that theirs are of."""
    theirs = JOINT_REFERENCES if joint else REFERENCES
    return theirs if all(row.get("test_set") == TEST_SET for row in rows) else []


def panel_axis(n: int, rows: list[dict], limits: dict[str, float], joint: bool = False) -> tuple:
    """What panel n shows: (key, unit, label, the limit that belongs to it or None).

    A limit on flash or energy brings its own figure along: neither the coded file's bytes nor the
    relative score is what it bounds.
    """
    axis, own = PANELS[n]
    bound = next((name for name in own if name in limits), None)
    if bound:
        key = figure_for(rows, bound)
        origin = LIMITS[bound].figures[key].split(":")[0].split()[0]
        return key, LIMITS[bound].scale, LIMIT_LABELS[bound].replace("{origin}", origin), bound
    finer = {FILE: FLASH, SCORE: ENERGY if joint else SCORE}.get(axis, axis)
    having = {run_of(row) for row in rows if row.get(finer[0]) is not None}
    return *(finer if having == {run_of(row) for row in rows} else axis), None


def complete(rows: list[dict], keys: list[str]) -> list[dict]:
    """The rows that have a figure under each key; raises UserError without one."""
    found = [row for row in rows if all(row.get(key) is not None for key in keys)]
    if not found:
        raise UserError(f"no variant of these runs has all of {', '.join(keys)}")
    return found

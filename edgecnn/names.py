"""Where a run's files lie and how variants are called."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
AUGMENTATIONS = ("both", "flip", "crop", "none")  # random changes of training pictures
DEFAULT_CRITERION = "layer-rank"  # left out of a variant's name, like seed 0
NAME_PATTERN = re.compile(
    r"(?P<method>baseline|control|pruned_(?P<percent>\d+(\.\d+)?)(_(?P<criterion>[a-z][a-z0-9-]*?))?)"
    r"(_seed(?P<seed>\d+))?_(?P<precision>fp32|int8)"
)
ALWAYS_SHOWN = ("baseline", "control", "pruned_50")  # the methods of every table and picture
# Runs whose figures are in git, and of their files only some: the rest is not missed.
COMMITTED_RUNS = ("reference", "headline", "ablation", "resnet8", "mnist", "front")
RENAMED_CRITERIA = {"l1-normalized": "layer-rank"}  # as files made before call it


def checkpoints_dir(run: str = "") -> Path:
    """`checkpoints/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("checkpoints") / run


def results_dir(run: str = "") -> Path:
    """`results/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("results") / run


def variant_name(method: str, precision: str, criterion: str = DEFAULT_CRITERION, seed: int = 0):
    """One naming scheme: `baseline_fp32`, `control_seed1_int8`, `pruned_50_l1_seed2_int8`.

    method is `baseline`, `control` or `pruned_<percent>`.
    """
    parts = [method]
    if method.startswith("pruned") and criterion != DEFAULT_CRITERION:
        parts.append(criterion)
    if seed:
        parts.append(f"seed{seed}")
    return "_".join([*parts, precision])


def is_always_shown(variant: str) -> bool:
    """Whether a variant is one that tables and pictures always name, of whatever seed."""
    match = NAME_PATTERN.fullmatch(variant)
    return match is not None and match["method"] in ALWAYS_SHOWN


def criterion_name(stored):
    """Today's name of a criterion that a file names; any other value as it is."""
    return RENAMED_CRITERIA.get(stored, stored) if isinstance(stored, str) else stored

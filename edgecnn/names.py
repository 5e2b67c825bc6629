"""Where a run's files lie and how variants are called."""

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
AUGMENTATIONS = ("both", "flip", "crop", "none")  # random changes of training pictures
TEST_SET = "CIFAR-10 test set"  # what its figures say they are of
# What `prune_finetune.py --structure` takes and its criterion, left out of a name, like seed 0.
DEFAULT_CRITERIA = {"weights": "layer-rank", "channels": "macs"}
# `channels_30_bytes_pruned_80_energy_seed1_int8`: channels went first, then weights of what was left.
_LEVEL = r"_\d+(?:\.\d+)?"  # in percent
_CRITERION = r"(?!seed\d|control_|pruned_)[a-z][a-z0-9-]*"
NAME_PATTERN = re.compile(
    rf"(?P<method>baseline|(?=[cp])(?P<channels>channels{_LEVEL}(_{_CRITERION})?)?"
    rf"((?(channels)_)(control|pruned_(?P<percent>\d+(\.\d+)?)(_(?P<criterion>{_CRITERION}))?))?)"
    r"(_seed(?P<seed>\d+))?_(?P<precision>fp32|int8)"
)
EDGE, STEPS, FRONT = "edge", "steps", "front"  # folders below results/ that are no runs
# Runs whose figures are in git, and of their files only some: the rest is not missed.
COMMITTED_RUNS = ("reference", "headline", "channels", "edgeresnet", "taught")
COMMITTED_RUNS += ("wide", "sparse", "large", "cuda", "resnet8", "resnet8_taught")
COMMITTED_RUNS += ("deep", "tiny", "effort_22", "effort_44", "effort_66", "effort_88")
COMMITTED_RUNS += ("mnist", "ablation", FRONT)
RENAMED_CRITERIA = {"l1-normalized": "layer-rank"}  # as files made before call it


def checkpoints_dir(run: str = "") -> Path:
    """`checkpoints/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("checkpoints") / run


def results_dir(run: str = "") -> Path:
    """`results/`, or the run's own folder in it (`smoke`, `reference`)."""
    return Path("results") / run


def run_of_checkpoint(path: Path) -> str | None:
    """The run in whose folder a checkpoint lies, empty for the default one; None elsewhere."""
    folder, home = (Path(os.path.abspath(p)) for p in (path.parent, checkpoints_dir()))
    if folder == home:
        return ""
    return folder.name if folder.parent == home else None  # a link to it keeps its own name


def run_of_results(folder: Path) -> str:
    """The run whose figures lie in a folder, empty for results/ itself and any other."""
    return folder.name if folder.parent == results_dir() else ""


def run_flag(run: str) -> str:
    """The flag that makes a command work in a run's folders, a blank before it."""
    return f" --{run}" if run in ("smoke", "holdout") else f" --run {run}" * bool(run)


def command(script: str, folder: Path) -> str:
    """A script as typed for the run of a results folder: `python evaluate.py --run mine`."""
    return f"python {script}.py{run_flag(run_of_results(folder))}"


def method_name(structure: str, sparsity: float, parent: str) -> str:
    """`pruned_<percent>`, `channels_<percent>`, or `control` without pruning.

    After what the name of a parent without some of its channels says: `channels_30_pruned_80`.
    """
    if structure == "channels" and sparsity:
        return f"channels_{100 * sparsity:g}"
    return channels_prefix(parent) + (f"pruned_{100 * sparsity:g}" if sparsity else "control")


def channels_prefix(variant: str) -> str:
    """`channels_30_` of a variant that lost channels; empty for any other name."""
    match = NAME_PATTERN.fullmatch(variant)
    return f"{match['channels']}_" if match and match["channels"] else ""


def is_pruned(method: str) -> bool:
    """Whether a method takes weights or channels away, by its last part."""
    return method.startswith(("pruned", "channels")) and not method.endswith("control")


def variant_name(method: str, precision: str, criterion: str | None = None, seed: int = 0) -> str:
    """One naming scheme: `baseline_fp32`, `control_seed1_int8`, `pruned_50_l1_seed2_int8`.

    method: see `method_name`; or `baseline`.
    """
    parts = [method]
    if is_pruned(method) and criterion not in (None, *DEFAULT_CRITERIA.values()):
        parts.append(criterion)
    if seed:
        parts.append(f"seed{seed}")
    return "_".join([*parts, precision])


def criterion_name(stored):
    """Today's name of a criterion that a file names; any other value as it is."""
    return RENAMED_CRITERIA.get(stored, stored) if isinstance(stored, str) else stored

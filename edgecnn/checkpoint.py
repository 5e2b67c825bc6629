"""Checkpoints: tensors and plain values only, read with weights_only=True, written atomically.

A file is a dict: format, format_version, graph (graph.to_plain), data (DataSet.to_dict), precision
(fp32 or int8), tensors (a name of the graph's -> a tensor, or a packed weight as packing.py writes
it), quantization (int8 only: engine, scales and zero points) and provenance (variant, parent,
arguments, versions, commit, date). It needs nothing else to be evaluated, exported and simulated.
"""

import argparse
import functools
import hashlib
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from edgecnn.dataset import DataSet
from edgecnn.errors import UserError
from edgecnn.files import read_record, sha256
from edgecnn.graph import Graph, from_plain, to_plain
from edgecnn.module import module_of
from edgecnn.names import (
    COMMITTED_RUNS,
    NAME_PATTERN,
    checkpoints_dir,
    command,
    criterion_name,
    results_dir,
    run_flag,
    run_of_checkpoint,
)
from edgecnn.packing import pack, unpack
from edgecnn.records import plain_problem
from edgecnn.schema import check_header, check_layout, stored_bytes, value_problems
from edgecnn.step import COMMIT, Step
from edgecnn.text import is_name, one_line
from edgecnn.torch_files import SLACK_BYTES, read_torch, torch_bytes

FORMAT, FORMAT_VERSION = "edgecnn-checkpoint", 2
READS = (
    "this project reads the .pt files that its own train_baseline.py, prune_finetune.py and "
    "quantize.py write, no other network's"
)


def provenance(variant: str, args: argparse.Namespace, **fields) -> dict:
    """How a file came to be: plain values, the same in the checkpoint and in its JSON."""
    return {
        "variant": variant,
        **fields,
        "arguments": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if value is not None and key not in ("force", "data_dir")  # which decide nothing
        },
        "torch_version": str(torch.__version__),
        "commit": COMMIT,
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parent_fields(path: Path) -> dict:
    """The provenance keys that name a parent checkpoint."""
    return {"parent": Path(path).stem, "parent_sha256": sha256(path)}


def save_variant(
    step: Step,
    origin: dict,
    precision: str,
    network: tuple[Graph, dict[str, torch.Tensor]],
    dataset: DataSet,
    result: dict,
    quantization: dict | None = None,
) -> None:
    """Write a step's checkpoint and its JSON: provenance, the file's SHA-256, `result`, the record.

    network: the graph and its tensors; weights of a pruned variant are stored as packing.py does.
    Raises UserError when a file cannot be written.
    """
    graph, tensors = network
    packed = "pruned" in origin["method"]
    stored = {
        name: pack(tensor) if packed and tensor.ndim > 1 else tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    checkpoint = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "graph": to_plain(graph),
        "data": dataset.to_dict(),
        "precision": precision,
        "tensors": stored,
        "provenance": origin,
    }
    if quantization is not None:
        checkpoint["quantization"] = quantization
    (path,) = step.outputs
    content = torch_bytes(checkpoint)
    digest = {"checkpoint_sha256": hashlib.sha256(content).hexdigest()}
    step.commit({path: content}, {**origin, **digest, **result})
    print(f"wrote {path} ({len(content):,} bytes) and {step.record}")


def made_by(path: Path) -> str | None:
    """The command that makes a checkpoint of this name; None for a name of the user's own."""
    name = NAME_PATTERN.fullmatch(path.stem)
    if name is None:
        return None
    if name["method"] == "baseline":
        made = "python train_baseline.py"
    else:
        made = f"python prune_finetune.py {pruning_flags(path, name)}"
    made += f" --seed {name['seed']}" if name["seed"] else ""
    made += run_flag(run_of_checkpoint(path) or "")
    if name["precision"] == "int8":
        parent = path.with_name(path.name.removesuffix("_int8.pt") + "_fp32.pt")
        return f"python quantize.py --checkpoint {parent}"
    return made


def pruning_flags(path: Path, name: re.Match) -> str:
    """The flags of prune_finetune.py that make a variant of this name."""
    if name["channels"] == name["method"]:
        _, percent, *criterion = name["channels"].split("_")
        flags, criterion = "--structure channels ", "".join(criterion)
    else:
        percent, criterion, flags = name["percent"] or 0, name["criterion"], ""
        if name["channels"]:
            seed = f"_seed{name['seed']}" * bool(name["seed"])
            flags = f"--checkpoint {path.with_name(name['channels'] + seed + '_fp32.pt')} "
    flags += f"--sparsity {float(percent) / 100:g}"
    return flags + (f" --criterion {criterion}" if criterion else "")


@functools.cache
def note_other_digest(path: Path) -> None:
    """Say, once, where a checkpoint is not the file that the JSON of its step describes."""
    run = run_of_checkpoint(path)
    json_path = results_dir(run or "") / f"{path.stem}.json"
    if run is None or not json_path.is_file():
        return
    try:
        told = read_record(json_path, made_by(path) or "the step", {}).get("checkpoint_sha256")
    except UserError as error:
        print(f"note: {one_line(str(error))}", file=sys.stderr)
        return
    if told is not None and told != sha256(path):
        print(
            f"note: {path} is not the file that {json_path} describes: its SHA-256 differs; "
            "run the step again, unless you put it there yourself",
            file=sys.stderr,
        )


def load_checkpoint(path: Path, precision: str | None = None) -> dict:
    """Read and check a checkpoint; its weights come back unpacked. Nothing in it is executed.

    `precision` demands fp32 or int8. Raises UserError, saying what to do, on any other file.
    """
    path = Path(path)
    if not is_name(path.stem):
        raise UserError(f"{str(path)!a} is no name for a table; rename the file")
    made = made_by(path)
    again = f"make it again with: {made}" if made else READS
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file; {again.replace('again ', '')}")

    def check(checkpoint, total: int) -> None:
        found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
        if not isinstance(found, str) or found != FORMAT:
            raise UserError(f"{path} is not a checkpoint of this project; {READS}")
        others = {key: value for key, value in checkpoint.items() if key != "tensors"}
        problem = plain_problem(others)
        if problem:
            raise UserError(f"{path}: besides its tensors, {problem}; {again}")
        version = checkpoint.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format version {ascii(version):.20}, not {FORMAT_VERSION}; {again}"
            )
        try:
            check_header(checkpoint)
            if precision not in (None, checkpoint["precision"]):
                raise UserError(
                    f"{path} is {checkpoint['precision']}, and this step takes {precision}; "
                    f"give it {precision_hint(checkpoint['provenance'], precision)}"
                )
            check_layout(checkpoint)
            if total > stored_bytes(checkpoint) + SLACK_BYTES:
                raise ValueError(f"it holds {total:,} bytes, more than its network needs")
        except ValueError as error:
            raise UserError(f"{path}: {error}; {again}") from None

    try:
        checkpoint = read_torch(path, check)
    except ValueError as error:
        foreign = "Python objects" in str(error) or "not written by torch.save" in str(error)
        raise UserError(
            f"{path} is not a readable checkpoint ({error}); {READS if foreign else again}"
        ) from None
    origin = checkpoint["provenance"]
    origin["criterion"] = criterion_name(origin["criterion"])
    try:
        checkpoint["tensors"] = {
            name: unpack(value) if isinstance(value, dict) else value
            for name, value in checkpoint["tensors"].items()
        }
    except Exception as error:  # lzma, numpy and ValueError alike
        raise UserError(f"{path} has a damaged weight ({error}); {again}") from None
    for problem in value_problems(checkpoint["tensors"]):
        raise UserError(f"{path}: {problem}; {again}")
    note_other_digest(path)
    return checkpoint


def find_checkpoints(run: str, or_figures: bool = False) -> list[Path]:
    """Every finished checkpoint of a run; raises UserError when there is none.

    With `or_figures` a committed run may have none: of some, git has the figures alone.
    """
    folder = checkpoints_dir(run)
    paths = [path for path in sorted(folder.glob("*.pt")) if not path.stem.endswith(".resume")]
    paths = [path for path in paths if not path.name.startswith(".")]  # a killed run's leftovers
    figures = results_dir(run) / "metrics.json"
    if not paths and not (or_figures and run in COMMITTED_RUNS and figures.is_file()):
        made_by = command("train_baseline", results_dir(run))
        raise UserError(f"no checkpoint in {folder}; make one with: {made_by}")
    for path in paths:
        if not is_name(path.stem):
            raise UserError(f"{str(path)!a} cannot be shown in a table; rename the file")
    return paths


def int8_checkpoints(run: str) -> dict[Path, dict]:
    """The run's INT8 checkpoints, all checked; raises UserError without one."""
    checkpoints = {path: load_checkpoint(path) for path in find_checkpoints(run)}
    found = {path: c for path, c in checkpoints.items() if c["precision"] == "int8"}
    if not found:
        made_by = command("quantize", results_dir(run))
        raise UserError(f"this run has no int8 checkpoint; make one with: {made_by}")
    return found


def of_lowest_seed(checkpoints: dict[Path, dict]) -> dict[Path, dict]:
    """Those of the lowest seed among them."""
    first = min(checkpoint["provenance"]["seed"] for checkpoint in checkpoints.values())
    return {path: c for path, c in checkpoints.items() if c["provenance"]["seed"] == first}


def require_unseen_holdout(checkpoint: dict, holdout: bool) -> None:
    """Raise UserError when a validation figure is asked of weights that saw the validation images."""
    origin = checkpoint["provenance"]
    if holdout and not origin.get("holdout"):
        raise UserError(
            f"{origin['variant']} was trained on the validation images too; "
            "train it with --holdout, or leave --holdout out"
        )


def precision_hint(origin: dict, precision: str) -> str:
    """Which file to give instead of one of the other precision."""
    parent = origin.get("parent")
    return (
        f"its parent {parent}" if parent and parent.endswith(precision) else f"an {precision} one"
    )


def graph_of(checkpoint: dict) -> Graph:
    """The graph of a loaded checkpoint: as trained (fp32), as deployed (int8)."""
    return from_plain(checkpoint["graph"])


def dataset_of(checkpoint: dict) -> DataSet:
    """What the network of a loaded checkpoint was trained on."""
    return DataSet.from_dict(checkpoint["data"])


def float_module(checkpoint: dict) -> torch.nn.Module:
    """The network of an fp32 checkpoint, in training mode."""
    return module_of(graph_of(checkpoint), checkpoint["tensors"])

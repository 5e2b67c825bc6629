"""Checkpoints: tensors and plain values only, read with weights_only=True, written atomically.

A file is a dict: format, format_version, architecture, precision (fp32 or int8), tensors (a name ->
a tensor, or a packed weight as packing.py writes it), quantization (int8 only: scales and zero
points) and provenance (variant, parent, arguments, versions, commit, date).
"""

import argparse
import hashlib
import io
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.utils.serialization import config as serialization_config

from edgecnn.errors import UserError
from edgecnn.files import sha256, write_files
from edgecnn.model import ARCHITECTURE, EdgeCNN
from edgecnn.names import NAME_PATTERN, checkpoints_dir, criterion_name
from edgecnn.packing import pack, unpack
from edgecnn.step import COMMIT, Step

FORMAT, FORMAT_VERSION = "edgecnn-checkpoint", 1
COUNTER = "num_batches_tracked"
PRECISIONS = ("fp32", "int8")
ORIGIN_KEYS = ("method", "criterion", "seed", "parent", "arguments", "torch_version", "commit")
ORIGIN_KEYS += ("date_utc",)
KEYS = ("architecture", "precision", "tensors", "provenance")


def torch_bytes(value) -> bytes:
    """What torch.save writes; to a file of its own it would name every record after the path."""
    buffer = io.BytesIO()
    with serialization_config.patch("save.storage_alignment", 8):  # 64 pads every small tensor
        torch.save(value, buffer)
    return buffer.getvalue()


def write_torch(path: Path, value) -> None:
    """torch.save, atomically; raises UserError when the folder is unwritable or full."""
    write_files({path: torch_bytes(value)})


def provenance(variant: str, args: argparse.Namespace, **fields) -> dict:
    """How a file came to be: plain values, the same in the checkpoint and in its JSON."""
    return {
        "variant": variant,
        **fields,
        "arguments": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
            if value is not None and key != "force"
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
    tensors: dict[str, torch.Tensor],
    result: dict,
    quantization: dict | None = None,
    packed: bool = False,
) -> None:
    """Write a step's checkpoint and its JSON: provenance, the file's SHA-256, `result`, the record.

    `packed` stores the weights as packing.py does. Raises UserError when a file cannot be written.
    """
    stored = {
        name: pack(tensor) if packed and tensor.ndim > 1 else tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    checkpoint = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": ARCHITECTURE,
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


def made_by(path: Path) -> str:
    """The command that makes a checkpoint of this name."""
    name = NAME_PATTERN.fullmatch(path.stem)
    if name is None:
        return "the script that wrote it"
    if name["method"] == "baseline":
        command = "python train_baseline.py"
    elif name["method"] == "control":
        command = "python prune_finetune.py --sparsity 0"
    else:
        command = f"python prune_finetune.py --sparsity {float(name['percent']) / 100:g}"
        command += f" --criterion {name['criterion']}" if name["criterion"] else ""
    command += f" --seed {name['seed']}" if name and name["seed"] else ""
    folder = path.parent.name if path.parent.parent == checkpoints_dir() else ""
    command += (
        f" --{folder}" if folder in ("smoke", "holdout") else f" --run {folder}" * bool(folder)
    )
    if name and name["precision"] == "int8":
        parent = path.with_name(path.name.removesuffix("_int8.pt") + "_fp32.pt")
        return f"python quantize.py --checkpoint {parent}"
    return command


def load_checkpoint(path: Path, precision: str | None = None) -> dict:
    """Read and check a checkpoint; its weights come back unpacked. Nothing in it is executed.

    `precision` demands fp32 or int8. Raises UserError, saying what to do, on any other file.
    """
    path = Path(path)
    again = f"make it again with: {made_by(path)}"
    if not path.is_file():
        raise UserError(f"{path} is missing; make it with: {made_by(path)}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("truncated, or not written by torch.save")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle each have errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights only" in reason.lower():
            reason = "it holds Python objects besides tensors, which are refused, never executed"
        raise UserError(f"{path} is not a readable checkpoint ({reason}); {again}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project; {again}")
    if checkpoint.get("format_version") != FORMAT_VERSION:
        found = checkpoint.get("format_version")
        raise UserError(f"{path} has format version {found}, not {FORMAT_VERSION}; {again}")
    for key in KEYS:
        if key not in checkpoint:
            raise UserError(f"{path} lacks `{key}`; {again}")
    if checkpoint["architecture"] != ARCHITECTURE:
        raise UserError(
            f"{path} holds the architecture {checkpoint['architecture']}, not {ARCHITECTURE}; {again}"
        )
    origin = checkpoint["provenance"]
    missing = [key for key in ORIGIN_KEYS if key not in origin]
    if missing:
        raise UserError(f"{path}: its provenance lacks {', '.join(missing)}; {again}")
    origin["criterion"] = criterion_name(origin["criterion"])
    if checkpoint["precision"] not in PRECISIONS:
        raise UserError(f"{path}: precision {checkpoint['precision']} is not known; {again}")
    if checkpoint["precision"] == "int8" and "quantization" not in checkpoint:
        raise UserError(f"{path} lacks `quantization`, its scales and zero points; {again}")
    if precision not in (None, checkpoint["precision"]):
        raise UserError(
            f"{path} is {checkpoint['precision']}, and this step takes {precision}; "
            f"give it {precision_hint(checkpoint['provenance'], precision)}"
        )
    try:
        checkpoint["tensors"] = {
            name: unpack(value) if isinstance(value, dict) else value
            for name, value in checkpoint["tensors"].items()
        }
    except Exception as error:  # lzma, numpy and ValueError alike
        raise UserError(f"{path} has a damaged weight ({error}); {again}") from None
    for name, tensor in checkpoint["tensors"].items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite; {again}")
    return checkpoint


def find_checkpoints(run: str) -> list[Path]:
    """Every finished checkpoint of a run; raises UserError when there is none."""
    folder = checkpoints_dir(run)
    paths = [path for path in sorted(folder.glob("*.pt")) if not path.stem.endswith(".resume")]
    paths = [path for path in paths if not path.name.startswith(".")]  # a killed run's leftovers
    if not paths:
        raise UserError(f"no checkpoint in {folder}; make one with: python train_baseline.py")
    return paths


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
    return f"its parent {parent}" if parent and parent.endswith(precision) else f"a {precision} one"


def fp32_tensors(model: EdgeCNN) -> dict[str, torch.Tensor]:
    """The network's state without BN's batch counters, which a fixed momentum never reads."""
    return {name: t for name, t in model.state_dict().items() if not name.endswith(COUNTER)}


def fp32_model(checkpoint: dict) -> EdgeCNN:
    """The network of an fp32 checkpoint. Raises UserError when its tensors do not fit."""
    model = EdgeCNN()
    counters = {name: t for name, t in model.state_dict().items() if name.endswith(COUNTER)}
    try:
        model.load_state_dict({**counters, **checkpoint["tensors"]})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the checkpoint's tensors do not fit {ARCHITECTURE}: {reason}") from None
    return model

"""What a checkpoint holds and costs: tensors, provenance, and the network as deployed, counted."""

from pathlib import Path

from edgecnn.checkpoint import fp32_model, load_checkpoint, sha256
from edgecnn.energy import modelled_energy
from edgecnn.int8 import int8_model
from edgecnn.model import IMAGE_SHAPE, fold_batch_norm
from edgecnn.packing import storage_bytes
from edgecnn.tables import markdown_table


def counted(checkpoint: dict):
    """(the runnable network of a checkpoint, its EnergyReport as deployed: BN folded)."""
    if checkpoint["precision"] == "int8":
        model = int8_model(checkpoint)
        return model, modelled_energy(model, IMAGE_SHAPE)
    model = fp32_model(checkpoint)
    return model, modelled_energy(fold_batch_norm(model), IMAGE_SHAPE)


def inspection(path: Path) -> str:
    """What a checkpoint is, how it was made, its tensors, and where MACs and energy sit."""
    checkpoint = load_checkpoint(path)
    stored = storage_bytes(checkpoint["tensors"])
    origin = [f"  {key:<14} {value}" for key, value in checkpoint["provenance"].items()]
    lines = [
        [
            name,
            "x".join(map(str, tensor.shape)) or "scalar",
            str(tensor.dtype).removeprefix("torch."),
            f"{100 * (1 - int(tensor.count_nonzero()) / tensor.numel()):.1f}",
            *(f"{size:,}" for size in storage_bytes({name: tensor}).values()),
        ]
        for name, tensor in checkpoint["tensors"].items()
    ]
    header = ["Tensor", "Shape", "dtype", "Zeros %", "Raw B", "Non-zeros + bitmap B", "Coded B"]
    total = ["total", "", "", "", *(f"{size:,}" for size in stored.values())]
    return "\n".join(
        [
            f"{path}: {checkpoint['precision']} {checkpoint['architecture']}, "
            f"{path.stat().st_size:,} bytes, SHA-256 {sha256(path)}",
            *origin,
            "",
            markdown_table(header, [*lines, total]),
            "",
            counted(checkpoint)[1].table(),
        ]
    )

"""What a checkpoint holds and costs: its graph, tensors and provenance, the deployed network counted."""

from pathlib import Path

from edgecnn.cells import markdown_table
from edgecnn.checkpoint import dataset_of, float_module, graph_of, load_checkpoint
from edgecnn.describe import describe
from edgecnn.energy import modelled_energy
from edgecnn.files import sha256
from edgecnn.module import module_of
from edgecnn.packing import storage_bytes
from edgecnn.quantized import int8_module
from edgecnn.rewrite import deployed


def counted(checkpoint: dict):
    """(the runnable network of a checkpoint, its EnergyReport as deployed: batch norm folded)."""
    graph = graph_of(checkpoint)
    if checkpoint["precision"] == "int8":
        model = int8_module(checkpoint)
        return model, modelled_energy(model, graph.input_shape)
    folded = module_of(*deployed(graph, checkpoint["tensors"])).eval()
    return float_module(checkpoint), modelled_energy(folded, graph.input_shape)


def inspection(path: Path) -> str:
    """What a checkpoint is, how it was made, its graph and tensors, and where MACs and energy sit."""
    checkpoint = load_checkpoint(path)
    graph, dataset, tensors = graph_of(checkpoint), dataset_of(checkpoint), checkpoint["tensors"]
    stored = {name: storage_bytes(tensor) for name, tensor in tensors.items()}
    lines = [
        [
            name,
            "x".join(map(str, tensor.shape)) or "scalar",
            str(tensor.dtype).removeprefix("torch."),
            f"{100 * (1 - int(tensor.count_nonzero()) / tensor.numel()):.1f}",
            *(f"{size:,}" for size in stored[name]),
        ]
        for name, tensor in tensors.items()
    ]
    header = ["Tensor", "Shape", "dtype", "Zeros %", "Raw B", "Non-zeros + bitmap B", "Coded B"]
    total = [
        "total",
        "",
        "",
        "",
        *(f"{sum(sizes):,}" for sizes in zip(*stored.values(), strict=True)),
    ]
    return "\n".join(
        [
            f"{path}: {checkpoint['precision']}, {path.stat().st_size:,} bytes, SHA-256 {sha256(path)}",
            *(f"  {key:<14} {value}" for key, value in checkpoint["provenance"].items()),
            f"  {'data':<14} {dataset.name}: {', '.join(dataset.classes)}",
            "",
            describe(graph, tensors),
            "",
            markdown_table(header, [*lines, total]),
            "",
            counted(checkpoint)[1].table(),
        ]
    )

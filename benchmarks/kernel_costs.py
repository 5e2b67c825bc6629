"""What the kernels of firmware/ take on a Cortex-M4: the coefficients that choose a layer's kernel.

Reads   nothing
Writes  edgecnn/deploy/kernel_costs.json

    python benchmarks/kernel_costs.py            # about five minutes; once after a kernel has changed
    python benchmarks/kernel_costs.py --smoke    # seconds; two layers a kernel, writes nothing

Each kernel is run in QEMU on layers of other shapes and shares of zeros, and its instructions are
counted. A least-squares fit with no negative coefficient spreads them over what the kernel does: so
much a layer, a group, a word, an entry, an output (the features of edgecnn/deploy/kernels.py).
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from edgecnn.cli import Parser  # noqa: E402
from edgecnn.deploy import c_source, cortex_m, kernels  # noqa: E402
from edgecnn.deploy.tools import output_of  # noqa: E402
from edgecnn.errors import user_errors_exit_2  # noqa: E402
from edgecnn.files import write_json  # noqa: E402
from edgecnn.graph import INPUT, Graph, Node, tensor_shapes, to_plain  # noqa: E402

POOL = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}


class Layer(NamedTuple):
    """A layer to count: a convolution of `kernel` x `kernel`, or linear where that is 0."""

    kernel: int
    inputs: int
    side: int
    outputs: int
    stride: int = 1
    groups: int = 1
    pool: bool = False
    zeros: float = 0.0
    image: bool = False  # the layer reads the image itself


LAYERS = {
    "conv_direct": [
        Layer(3, 3, 32, 16, image=True),
        Layer(3, 3, 32, 32, pool=True, image=True),
        Layer(3, 3, 48, 8, stride=2, image=True),
        Layer(3, 16, 16, 32, stride=2),
        Layer(3, 32, 16, 64, stride=2),
        Layer(5, 6, 14, 16),
        Layer(5, 16, 12, 32, pool=True),
        Layer(1, 8, 24, 16),
        Layer(1, 32, 12, 64),
        Layer(1, 128, 6, 128),
        Layer(1, 256, 3, 256),
        Layer(1, 16, 32, 32, stride=2),
        Layer(7, 1, 28, 8, image=True),
    ],
    "conv_winograd": [
        Layer(3, 16, 32, 16),
        Layer(3, 32, 16, 32),
        Layer(3, 64, 8, 64),
        Layer(3, 32, 16, 64, pool=True),
        Layer(3, 64, 8, 128, pool=True),
        Layer(3, 8, 24, 8),
        Layer(3, 4, 9, 6),
        Layer(3, 128, 4, 32),
        Layer(3, 16, 28, 16, pool=True),
    ],
    "conv_sparse": [
        Layer(3, 3, 32, 32, pool=True, zeros=0.5, image=True),
        Layer(3, 32, 16, 64, pool=True, zeros=0.8),
        Layer(3, 64, 8, 128, pool=True, zeros=0.9),
        Layer(3, 16, 32, 16, zeros=0.9),
        Layer(3, 32, 16, 32, zeros=0.9),
        Layer(3, 64, 8, 64, zeros=0.7),
        Layer(3, 16, 32, 32, stride=2, zeros=0.9),
        Layer(3, 32, 16, 64, stride=2, zeros=0.5),
        Layer(1, 64, 12, 64, zeros=0.9),
        Layer(1, 128, 6, 128, zeros=0.95),
        Layer(1, 256, 3, 256, zeros=0.9),
        Layer(5, 6, 14, 16, zeros=0.8),
        Layer(5, 16, 12, 32, pool=True, zeros=0.95),
    ],
    "conv_depthwise": [
        Layer(3, 8, 48, 8, groups=8),
        Layer(3, 16, 24, 16, groups=16),
        Layer(3, 128, 6, 128, groups=128),
        Layer(3, 256, 3, 256, groups=256),
        Layer(3, 16, 48, 16, stride=2, groups=16),
        Layer(3, 64, 12, 64, stride=2, groups=64),
        Layer(3, 6, 20, 6, groups=6),
        Layer(3, 6, 20, 6, stride=2, groups=6),
        Layer(5, 16, 14, 16, groups=16),
        Layer(5, 12, 14, 12, stride=2, groups=12),
        Layer(7, 8, 10, 8, groups=8),
        Layer(4, 6, 10, 12, groups=6),
    ],
    "linear_dense": [
        Layer(0, 2048, 1, 256),
        Layer(0, 64, 1, 10),
        Layer(0, 784, 1, 100),
        Layer(0, 30, 1, 64),
        Layer(0, 500, 1, 7),
    ],
    "linear_sparse": [
        Layer(0, 2048, 1, 256, zeros=0.95),
        Layer(0, 64, 1, 10, zeros=0.5),
        Layer(0, 784, 1, 100, zeros=0.9),
        Layer(0, 30, 1, 64, zeros=0.3),
        Layer(0, 3000, 1, 7, zeros=0.99),
    ],
}


def nodes_of(layer: Layer) -> list[Node]:
    """The layer and what makes it a network; a 1x1 max pool keeps the image away where need be."""
    nodes, before = [], INPUT
    if not layer.image:
        window = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0]}
        nodes.append(Node("front", "max_pool", (INPUT,), window))
        before = "front"
    if layer.kernel == 0:
        nodes += [Node("flat", "flatten", (before,))]
        return [*nodes, Node("layer", "linear", ("flat",), {"outputs": layer.outputs, "bias": 1})]
    options = {"outputs": layer.outputs, "kernel": [layer.kernel] * 2, "bias": 1}
    options |= {"stride": [layer.stride] * 2, "padding": [layer.kernel // 2] * 2}
    nodes.append(Node("layer", "conv", (before,), options | {"groups": layer.groups}))
    nodes += [Node("pool", "max_pool", ("layer",), POOL)] if layer.pool else []
    nodes.append(Node("mean", "global_avg_pool", (nodes[-1].name,)))
    return [*nodes, Node("logits", "flatten", ("mean",))]


def checkpoint_of(layer: Layer) -> dict:
    """An int8 checkpoint of the layer alone, of random weights."""
    rng = np.random.default_rng(0)
    graph = Graph((layer.inputs, layer.side, layer.side), tuple(nodes_of(layer)))
    shapes = tensor_shapes(graph)
    weight = rng.integers(-127, 128, shapes["layer.weight"]).astype(np.int8)
    weight[rng.random(weight.shape) < layer.zeros] = 0
    sums = np.abs(weight.reshape(len(weight), -1).astype(int)).sum(1).max()
    activations = {name: {"scale": 1.0, "zero_point": 0} for name in (INPUT, "front", "flat")}
    behind = ("layer", "pool", "mean", "logits")
    activations |= {name: {"scale": float(sums), "zero_point": 3} for name in behind}
    scales = [1.0] * (layer.outputs if layer.kernel else 1)
    bias = torch.zeros(layer.outputs)
    return {
        "graph": to_plain(graph),
        "tensors": {"layer.weight": torch.from_numpy(weight), "layer.bias": bias},
        "quantization": {"activations": activations, "weights": {"layer": scales}},
        "data": {
            "classes": [""] * layer.outputs,
            "mean": [0.0] * layer.inputs,
            "std": [1.0] * layer.inputs,
        },
    }


def counted(
    checkpoint: dict, kernel: str, objects: list[Path], folder: Path
) -> tuple[dict[str, float], int]:
    """(what the step `layer` does how often, its instructions on the emulated Cortex-M4)."""
    source = c_source.c_source(checkpoint, kernel)
    files = [c_source.write_source(source, folder), c_source.FIRMWARE / cortex_m.STARTUP]
    own = cortex_m.compile_files(files, cortex_m.M4, folder)
    program = cortex_m.link([*own, *objects], cortex_m.M4)
    shape = tuple(checkpoint["graph"]["input_shape"])
    traced = cortex_m.trace(cortex_m.M4, program, torch.zeros(1, *shape, dtype=torch.int8))
    step = next(step for step in source.plan.steps if step.node == "layer")
    return step.features, cortex_m.instructions_by_node(source, traced)["layer"]


def code_bytes(objects: list[Path]) -> dict[str, int]:
    """{kernel: bytes of its code}: of its file, or of its function where a file holds several."""
    found = {}
    for path in objects:
        listed = output_of(["arm-none-eabi-nm", "-S", str(path)], cortex_m.INSTALL).split("\n")
        sizes = {w[3]: int(w[1], 16) for w in map(str.split, listed) if len(w) == 4}
        alone = {path.stem: sum(sizes.values())}
        found |= alone if path.stem in LAYERS else {k: v for k, v in sizes.items() if k in LAYERS}
    return found


def fit(features: list[dict], counts: list[int]) -> dict[str, float]:
    """Coefficients, none negative, of least relative error."""
    names = sorted({name for row in features for name in row})
    table = np.array([[row.get(name, 0) for name in names] for row in features], float)
    table /= np.array(counts, float)[:, None]
    kept = list(range(len(names)))
    while True:
        found = np.linalg.lstsq(table[:, kept], np.ones(len(counts)), rcond=None)[0]
        if (found >= 0).all():
            break
        del kept[int(found.argmin())]
    values = dict.fromkeys(names, 0.0)
    return values | {names[i]: round(float(v), 3) for i, v in zip(kept, found, strict=True)}


def measure(smoke: bool) -> dict:
    """{instructions: coefficients by kernel, code_bytes, layers: what was counted and estimated}."""
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [c_source.FIRMWARE / file for file in c_source.KERNELS]
        objects = cortex_m.compile_files(files, cortex_m.M4, folder)
        code = code_bytes(objects)
        for kernel, layers in LAYERS.items():
            layers = layers[: 2 if smoke else None]
            runs = [counted(checkpoint_of(layer), kernel, objects, folder) for layer in layers]
            features, counts = zip(*runs, strict=True)
            found[kernel] = fit(features, counts)
            for layer, (row, count) in zip(layers, runs, strict=True):
                estimate = sum(found[kernel][key] * value for key, value in row.items())
                rows.append({"kernel": kernel, "layer": layer._asdict(), "instructions": count})
                rows[-1]["estimated"] = round(estimate)
                print(f"{kernel} {layer}: {count:,} counted, {estimate / count - 1:+.1%} estimated")
    figures = {"instructions": found, "code_bytes": code, "layers": rows}
    return figures | cortex_m.tool_versions()


@user_errors_exit_2
def main():
    parser = Parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="two layers a kernel, writes nothing")
    args = parser.parse_args()
    cortex_m.require_tools()
    found = measure(args.smoke)
    if not args.smoke:
        write_json(kernels.COSTS, found)
        print(f"wrote {kernels.COSTS}")


if __name__ == "__main__":
    main()

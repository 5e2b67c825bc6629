"""INT8 checkpoints as full-INT8 TFLite files, and those files run by TensorFlow Lite Micro.

The file holds the checkpoint's own integers and scales: nothing is calibrated again. The schema's
classes and the interpreter both come from the package tflite-micro; there is no converter. Maps are
N, H, W, C. A padding that is TFLite's SAME or VALID is written so, any other as a PAD before.
"""

import importlib.util
import math
import os
import re
import sys
import tempfile

import numpy as np
import torch

from edgecnn.deploy.integer import flat_maps, hwc_columns
from edgecnn.errors import UserError
from edgecnn.graph import INPUT, Graph, GraphError, Node, from_plain, shapes_of
from edgecnn.quantized import MAX_BIAS, SIGNED_OFFSET

SCHEMA_VERSION, IDENTIFIER = 3, b"TFL3"
BUFFER_ALIGNMENT = 16  # bytes; the schema's force_align, which its Python writer leaves out
LOWEST = -128
# The version of each operator that first took int8, per-channel convolutions included.
OPERATOR_VERSIONS = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 4,
    "MAX_POOL_2D": 2,
    "PAD": 2,
    "PADV2": 2,
    "RELU": 2,
    "RELU6": 2,
    "RESHAPE": 1,
}
ACTIVATIONS = {"none": "NONE", "relu": "RELU", "relu6": "RELU6"}
ARENA_TOTAL = re.compile(r"Arena allocation total (\d+) bytes")


def tflite_micro():
    """(schema classes, runtime) of tflite-micro; raises UserError when it is not installed."""
    try:
        from tflite_micro.python.tflite_micro import runtime
        from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema
    except ImportError as error:
        raise UserError(
            f"tflite-micro cannot be imported ({error}); "
            "install it with: pip install -r firmware/requirements.txt"
        ) from None
    return schema, runtime


def tflite_micro_installed() -> bool:
    """Whether tflite-micro can be imported; where not, its figures are "not measured"."""
    return importlib.util.find_spec("tflite_micro") is not None


# ---- numbers -----------------------------------------------------------------------------------


def integer_bias(bias: np.ndarray, scales: np.ndarray, weight: np.ndarray, input_scale: float):
    """(int32 biases at input_scale x weight scale, the weight scales); one scale, or one a channel.

    Where every weight is zero torch stores its smallest scale, at which the bias may overflow; zeros
    are zeros at any scale, so that one just large enough takes its place. Raises UserError when a
    bias does not fit and the scale is in use.
    """
    smallest = np.abs(bias).reshape(len(scales), -1).max(axis=1) / (input_scale * MAX_BIAS)
    used = weight.reshape(len(scales), -1).any(axis=1)
    if (used & (scales < smallest)).any():
        raise UserError("a bias does not fit 32 bits at its layer's scales")
    scales = np.maximum(scales, smallest).astype(np.float32)
    return np.rint(bias / (input_scale * scales.astype(np.float64))).astype(np.int32), scales


def side_padding(size: int, kernel: int, stride: int, padding: int) -> tuple[set[str], int, int]:
    """(TFLite's words for torch's padding of a side, zeros before, zeros after); perhaps no word.

    Of what torch pads after the end only what a window reaches counts. Formula of SAME: ceil(size /
    stride) outputs, half of the zeros before, rounded down (tensorflow.org, tf.nn, "padding").
    """
    out, same = (size + 2 * padding - kernel) // stride + 1, -(-size // stride)
    after = max((out - 1) * stride + kernel - size - padding, 0)
    missing = max((same - 1) * stride + kernel - size, 0)
    words = {"VALID": padding == 0, "SAME": out == same and padding == missing // 2}
    return {word for word, fits in words.items() if fits}, padding, after


# ---- the file ----------------------------------------------------------------------------------


class Subgraph:
    """Tensors, buffers and operators of one subgraph, in the order in which they are added."""

    def __init__(self, schema):
        self.schema, self.tensors, self.buffers = schema, [], [schema.BufferT()]
        self.operators, self.codes = [], []

    def tensor(self, name: str, shape, dtype: str, scales=(), zero_point=0, values=None, axis=0):
        """Add a tensor, constant where it has `values`; its index. axis: that of several scales."""
        schema, tensor = self.schema, self.schema.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type = getattr(schema.TensorType, dtype)
        if len(scales):
            tensor.quantization = schema.QuantizationParametersT(
                scale=np.array(scales, np.float32),
                zeroPoint=np.full(len(scales), zero_point, np.int64),
                quantizedDimension=axis,
            )
        if values is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(aligned_buffer(schema, values))
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int, options=None) -> int:
        """Add an operator; the index of its output."""
        schema = self.schema
        if kind not in self.codes:
            self.codes.append(kind)
        operator = schema.OperatorT(
            opcodeIndex=self.codes.index(kind),
            inputs=np.array(inputs, np.int32),
            outputs=np.array([output], np.int32),
        )
        if options is not None:
            name = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = options
        self.operators.append(operator)
        return output

    def pack(self, inputs: list[int], outputs: list[int], name: str) -> bytes:
        """The FlatBuffer: the same bytes for the same graph."""
        import flatbuffers

        schema = self.schema
        codes = [getattr(schema.BuiltinOperator, kind) for kind in self.codes]
        subgraph = schema.SubGraphT(
            tensors=self.tensors,
            inputs=np.array(inputs, np.int32),
            outputs=np.array(outputs, np.int32),
            operators=self.operators,
            name=name,
        )
        model = schema.ModelT(
            version=SCHEMA_VERSION,
            operatorCodes=[
                schema.OperatorCodeT(code, None, OPERATOR_VERSIONS[kind], code)
                for kind, code in zip(self.codes, codes, strict=True)
            ],
            subgraphs=[subgraph],
            description=name,
            buffers=self.buffers,
        )
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())


def aligned_buffer(schema, values: np.ndarray):
    """A buffer whose bytes lie in the file, aligned as the schema demands."""

    class AlignedBuffer(schema.BufferT):
        def Pack(self, builder):
            content = values.tobytes()
            builder.StartVector(1, len(content), BUFFER_ALIGNMENT)
            builder.head -= len(content)
            builder.Bytes[builder.head : builder.head + len(content)] = content
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return schema.BufferEnd(builder)

    return AlignedBuffer()


def channels_last(shape) -> tuple[int, ...]:
    """(1, H, W, C) of a map (C, H, W), (1, features) of flat ones."""
    return (1, *shape[1:], shape[0])


class Writer:
    """One checkpoint's graph on its way into a subgraph: a method an operation."""

    def __init__(self, checkpoint: dict):
        self.graph: Graph = from_plain(checkpoint["graph"])
        self.tensors, self.quantization = checkpoint["tensors"], checkpoint["quantization"]
        self.shapes, self.flat = shapes_of(self.graph), flat_maps(self.graph)
        self.schema, _ = tflite_micro()
        self.file = Subgraph(self.schema)
        image = channels_last(self.graph.input_shape)
        self.index = {INPUT: self.activation(INPUT, image, INPUT)}

    def scale(self, name: str) -> float:
        """The scale of what a node gives, as the file holds it."""
        return float(np.float32(self.quantization["activations"][name]["scale"]))

    def zero_point(self, name: str) -> int:
        """Its zero point as int8."""
        return self.quantization["activations"][name]["zero_point"] - SIGNED_OFFSET

    def activation(self, tensor: str, shape, of: str) -> int:
        """Add a tensor with the scale and zero point of the node `of`; its index."""
        return self.file.tensor(tensor, shape, "INT8", [self.scale(of)], self.zero_point(of))

    def shape_in_file(self, name: str) -> tuple[int, ...]:
        """The shape of a node's output in the file: what a flatten gives stays the map it was."""
        return tuple(self.file.tensors[self.index[name]].shape.tolist())

    def output(self, node: Node) -> int:
        """Add the output tensor of a node."""
        shape = channels_last(self.shapes[node.name])
        if len(shape) == 2 and node.op != "linear":
            shape = self.shape_in_file(node.inputs[0])
        return self.activation(node.name, shape, node.name)

    def fused(self, node: Node) -> int:
        """The schema's code of the activation that is part of a node."""
        name = ACTIVATIONS[node.options.get("activation", "none")]
        return getattr(self.schema.ActivationFunctionType, name)

    def padded(self, node: Node, lowest: bool = False) -> tuple[int, int]:
        """(the input of a window operation, SAME or VALID), behind a PAD where neither is torch's.

        lowest: pad with what never wins a maximum, instead of the real zero.
        """
        (source,), o = node.inputs, node.options
        shape = self.shapes[source]
        sides = [
            side_padding(*side)
            for side in zip(shape[1:], o["kernel"], o["stride"], o["padding"], strict=True)
        ]
        code, common = self.schema.Padding, set.intersection(*(words for words, *_ in sides))
        if common:
            return self.index[source], code.VALID if "VALID" in common else code.SAME
        before_after = np.array([(0, 0), *(side[1:] for side in sides), (0, 0)], np.int32)
        larger = [
            n + int(b) + int(a) for n, (b, a) in zip(shape[1:], before_after[1:3], strict=True)
        ]
        inputs = [self.index[source]]
        inputs.append(self.file.tensor(f"{node.name}/sides", (4, 2), "INT32", values=before_after))
        out = self.activation(f"{node.name}/padded", (1, *larger, shape[0]), source)
        if not lowest or self.zero_point(source) == LOWEST:  # PAD writes the zero point
            self.file.operator("PAD", inputs, out, self.schema.PadOptionsT())
        else:
            scale, zero_point = [self.scale(source)], self.zero_point(source)
            value = np.array([LOWEST], np.int8)
            constant = (f"{node.name}/lowest", (1,), "INT8", scale, zero_point, value)
            inputs.append(self.file.tensor(*constant))
            self.file.operator("PADV2", inputs, out, self.schema.PadV2OptionsT())
        return out, code.VALID

    def constants(self, node: Node, weight: np.ndarray, axis: int = 0) -> list[int]:
        """Add a conv's or linear's weight, as the file orders it, and its int32 bias."""
        input_scale = self.scale(node.inputs[0])
        rows = self.tensors[f"{node.name}.weight"].numpy()
        bias, scales = integer_bias(
            self.tensors[f"{node.name}.bias"].double().numpy(),
            np.array(self.quantization["weights"][node.name]),
            rows,
            input_scale,
        )
        weight = np.ascontiguousarray(weight)
        named = f"{node.name}.weight", f"{node.name}.bias"
        return [
            self.file.tensor(named[0], weight.shape, "INT8", scales, 0, weight, axis),
            self.file.tensor(named[1], bias.shape, "INT32", scales * input_scale, 0, bias),
        ]

    def conv_tflite(self, node: Node) -> None:
        o, schema = node.options, self.schema
        x, padding = self.padded(node)
        (rows, columns), fused = o["stride"], self.fused(node)
        weight = self.tensors[f"{node.name}.weight"].numpy()
        if o["groups"] == 1:
            kind, weight, axis = "CONV_2D", weight.transpose(0, 2, 3, 1), 0  # (O, kh, kw, I)
            options = schema.Conv2DOptionsT(padding, columns, rows, fused)
        else:
            kind, weight, axis = "DEPTHWISE_CONV_2D", weight.transpose(1, 2, 3, 0), 3  # (1, .., O)
            multiplier = o["outputs"] // o["groups"]
            options = schema.DepthwiseConv2DOptionsT(padding, columns, rows, multiplier, fused)
        inputs = [x, *self.constants(node, weight, axis)]
        self.index[node.name] = self.file.operator(kind, inputs, self.output(node), options)

    def linear_tflite(self, node: Node) -> None:
        (source,) = node.inputs
        weight = self.tensors[f"{node.name}.weight"].numpy()
        if source in self.flat:
            weight = hwc_columns(weight, self.flat[source][0])
        inputs = [self.index[source], *self.constants(node, weight)]
        options = self.schema.FullyConnectedOptionsT(self.fused(node))
        output = self.output(node)
        self.index[node.name] = self.file.operator("FULLY_CONNECTED", inputs, output, options)

    def add_tflite(self, node: Node) -> None:
        inputs = [self.index[name] for name in node.inputs]
        options = self.schema.AddOptionsT(self.fused(node))
        self.index[node.name] = self.file.operator("ADD", inputs, self.output(node), options)

    def relu_tflite(self, node: Node) -> None:
        kind, inputs = node.op.upper(), [self.index[node.inputs[0]]]
        self.index[node.name] = self.file.operator(kind, inputs, self.output(node))

    def pool(self, node: Node, kind: str, x: int, padding: int, kernel, stride) -> None:
        """Add a pooling operator."""
        sides = stride[1], stride[0], kernel[1], kernel[0]
        options = self.schema.Pool2DOptionsT(padding, *sides)
        self.index[node.name] = self.file.operator(kind, [x], self.output(node), options)

    def max_pool_tflite(self, node: Node) -> None:
        x, padding = self.padded(node, lowest=True)
        o = node.options
        self.pool(node, "MAX_POOL_2D", x, padding, o["kernel"], o["stride"])

    def avg_pool_tflite(self, node: Node) -> None:
        x, o = self.index[node.inputs[0]], node.options
        valid = self.schema.Padding.VALID
        self.pool(node, "AVERAGE_POOL_2D", x, valid, o["kernel"], o["stride"])

    def global_avg_pool_tflite(self, node: Node) -> None:
        x, (_, *sides) = self.index[node.inputs[0]], self.shapes[node.inputs[0]]
        self.pool(node, "AVERAGE_POOL_2D", x, self.schema.Padding.VALID, sides, (1, 1))

    def flatten_tflite(self, node: Node) -> None:
        self.index[node.name] = self.index[node.inputs[0]]  # what reads it takes a map as well

    def flat_output(self) -> int:
        """The logits as (1, classes), behind a RESHAPE where they are a map."""
        name = self.graph.output
        shape = np.array((1, np.prod(self.shape_in_file(name))), np.int32)
        if len(self.shape_in_file(name)) == 2:
            return self.index[name]
        sides = self.file.tensor("logits/shape", shape.shape, "INT32", values=shape)
        out = self.activation("logits/flat", shape, name)
        options = self.schema.ReshapeOptionsT(newShape=shape)
        return self.file.operator("RESHAPE", [self.index[name], sides], out, options)

    def write(self, name: str) -> bytes:
        """The file."""
        for node in self.graph.nodes:
            WRITERS[node.op](self, node)
        return self.file.pack([self.index[INPUT]], [self.flat_output()], name)


WRITERS = {
    "conv": Writer.conv_tflite,
    "linear": Writer.linear_tflite,
    "add": Writer.add_tflite,
    "relu": Writer.relu_tflite,
    "relu6": Writer.relu_tflite,
    "max_pool": Writer.max_pool_tflite,
    "avg_pool": Writer.avg_pool_tflite,
    "global_avg_pool": Writer.global_avg_pool_tflite,
    "flatten": Writer.flatten_tflite,
}


def write_tflite(checkpoint: dict, name: str) -> bytes:
    """The .tflite file of an int8 checkpoint: int8 (1, H, W, C) -> int8 (1, classes).

    Raises UserError when a bias does not fit, the graph has no such form or tflite-micro is not
    installed.
    """
    try:
        return Writer(checkpoint).write(name)
    except GraphError as error:
        raise UserError(f"{name} has no .tflite form: {error}") from None


def operators(data: bytes) -> list[str]:
    """The operators of a .tflite file, in the order in which they run."""
    schema, _ = tflite_micro()
    model = schema.Model.GetRootAsModel(data, 0)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    subgraph = model.Subgraphs(0)
    indices = [subgraph.Operators(i).OpcodeIndex() for i in range(subgraph.OperatorsLength())]
    return [names[model.OperatorCodes(i).BuiltinCode()] for i in indices]


def tensor_shapes(data: bytes) -> dict[str, list[int]]:
    """{name: shape} of the tensors of a .tflite file, in the order of their numbers."""
    schema, _ = tflite_micro()
    graph = schema.Model.GetRootAsModel(data, 0).Subgraphs(0)
    tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
    return {tensor.Name().decode(): tensor.ShapeAsNumpy().tolist() for tensor in tensors}


# ---- the interpreter ---------------------------------------------------------------------------


def stderr_of(function) -> str:
    """What a C++ library writes to the process's standard error while `function()` runs."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            function()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        return file.read().decode(errors="replace")


def interpreted(data: bytes, images, config: str, read):
    """(tflite-micro's interpreter of a file, [read(interpreter) after each int8 image (C, H, W)]).

    config: a name of its InterpreterConfig. Raises UserError when tflite-micro refuses the file.
    """
    _, runtime = tflite_micro()
    # Its own guess, ten times the file, is too little for few weights on large images.
    arena_size = 2**20 + 2 * sum(math.prod(shape) for shape in tensor_shapes(data).values())
    rows = np.ascontiguousarray(np.asarray(images).transpose(0, 2, 3, 1))  # (N, H, W, C)
    kind, found = getattr(runtime.InterpreterConfig, config), []
    try:
        interpreter = runtime.Interpreter.from_bytes(
            data, arena_size=arena_size, intrepreter_config=kind
        )
        for image in rows:
            interpreter.set_input(image[None], 0)
            interpreter.invoke()
            found.append(read(interpreter))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tflite-micro cannot run the exported file: {reason}") from None
    return interpreter, found


def run_tflite(data: bytes, images) -> tuple[np.ndarray, int]:
    """(int8 (N, classes) logits, tensor arena bytes) of a .tflite under tflite-micro, one by one.

    images: int8 (N, C, H, W), a tensor or array. Raises UserError when tflite-micro refuses the file.
    """
    interpreter, logits = interpreted(
        data, images, "kAllocationRecording", lambda ran: ran.get_output(0)[0].copy()
    )
    arena = ARENA_TOTAL.search(stderr_of(interpreter.print_allocations))
    if arena is None:
        raise RuntimeError("this tflite-micro reports its arena in another form")
    return np.stack(logits), int(arena[1])


def tflite_values(data: bytes, images) -> dict[str, torch.Tensor]:
    """{tensor name: int8 (N, C, H, W) or (N, features)} of every activation of a .tflite file.

    images and errors as run_tflite.
    """
    names = list(tensor_shapes(data))

    def read(ran) -> dict[str, np.ndarray]:
        values = {name: ran.GetTensor(at, 0)["tensor_data"] for at, name in enumerate(names)}
        return {name: np.array(v) for name, v in values.items() if len(v) == 1}

    _, found = interpreted(data, images, "kPreserveAllTensors", read)
    rows = {name: np.concatenate([values[name] for values in found]) for name in found[0]}
    return {
        name: torch.from_numpy(v.transpose(0, 3, 1, 2) if v.ndim == 4 else v)
        for name, v in rows.items()
    }

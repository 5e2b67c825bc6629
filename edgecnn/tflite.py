"""INT8 checkpoints as full-INT8 TFLite files, and those files run by TensorFlow Lite Micro.

The file holds the checkpoint's own integers and scales: nothing is calibrated again. The schema's
classes and the interpreter both come from the package tflite-micro; there is no converter.
"""

import importlib.util
import os
import re
import sys
import tempfile

import numpy as np

from edgecnn.errors import UserError
from edgecnn.int8 import signed_zero_point
from edgecnn.model import IMAGE_SHAPE

SCHEMA_VERSION, IDENTIFIER = 3, b"TFL3"
BUFFER_ALIGNMENT = 16  # bytes; the schema's force_align, which its Python writer leaves out
# Where a bias has to stay for int32 accumulators: they add at most 2^25 to it (2048 x 127 x 128).
MAX_BIAS = 2**30
# The version of each operator that first took int8, per-channel convolutions included.
OPERATOR_VERSIONS = {"CONV_2D": 3, "MAX_POOL_2D": 2, "FULLY_CONNECTED": 4}
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


def channels_last(weight: np.ndarray, positions: int = 1) -> np.ndarray:
    """OIHW -> OHWI; (out, C x positions) -> (out, positions x C), the order of a flattened NHWC map."""
    if weight.ndim == 4:
        return weight.transpose(0, 2, 3, 1)  # (O, H, W, I)
    outputs, inputs = weight.shape
    grouped = weight.reshape(outputs, inputs // positions, positions)  # (O, C, H x W)
    return grouped.transpose(0, 2, 1).reshape(outputs, inputs)  # (O, H x W x C)


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


# ---- the file ----------------------------------------------------------------------------------


class Graph:
    """Tensors, buffers and operators of one subgraph, in the order in which they are added."""

    def __init__(self, schema):
        self.schema, self.tensors, self.buffers = schema, [], [schema.BufferT()]
        self.operators, self.codes = [], []

    def tensor(self, name: str, shape, dtype: str, scales, zero_point: int, values=None) -> int:
        """Add a tensor, constant where it has `values`; its index."""
        schema, tensor = self.schema, self.schema.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type = getattr(schema.TensorType, dtype)
        tensor.quantization = schema.QuantizationParametersT(
            scale=np.array(scales, np.float32), zeroPoint=np.full(len(scales), zero_point, np.int64)
        )
        if values is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(aligned_buffer(schema, values))
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int, options) -> int:
        """Add an operator; the index of its output."""
        schema = self.schema
        if kind not in self.codes:
            self.codes.append(kind)
        self.operators.append(
            schema.OperatorT(
                opcodeIndex=self.codes.index(kind),
                inputs=np.array(inputs, np.int32),
                outputs=np.array([output], np.int32),
                builtinOptionsType=getattr(
                    schema.BuiltinOptions, type(options).__name__.removesuffix("T")
                ),
                builtinOptions=options,
            )
        )
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


def write_tflite(checkpoint: dict, name: str) -> bytes:
    """The .tflite file of an int8 checkpoint: int8 (1, 32, 32, 3) -> int8 (1, 10).

    Convolutions are 3x3 with ReLU and a 2x2 max-pool each; every Linear layer but the last has ReLU.
    Raises UserError when a bias does not fit or tflite-micro is not installed.
    """
    schema, _ = tflite_micro()
    graph, quantization = Graph(schema), checkpoint["quantization"]
    channels, height, width = IMAGE_SHAPE
    scale = float(np.float32(quantization["input_scale"]))
    zero_point = signed_zero_point(quantization["input_zero_point"])
    first = x = graph.tensor("image", (1, height, width, channels), "INT8", [scale], zero_point)
    last = list(quantization["layers"])[-1]
    for layer_name, layer in quantization["layers"].items():
        weight = checkpoint["tensors"][f"{layer_name}.weight"].numpy()
        bias, scales = integer_bias(
            checkpoint["tensors"][f"{layer_name}.bias"].double().numpy(),
            np.array(layer["weight_scale"]),
            weight,
            scale,
        )
        convolution = weight.ndim == 4
        stored = np.ascontiguousarray(channels_last(weight, height * width))
        inputs = [
            x,
            graph.tensor(f"{layer_name}.weight", stored.shape, "INT8", scales, 0, stored),
            graph.tensor(f"{layer_name}.bias", bias.shape, "INT32", scales * scale, 0, bias),
        ]
        scale = float(np.float32(layer["output_scale"]))
        zero_point = signed_zero_point(layer["output_zero_point"])
        relu = schema.ActivationFunctionType.RELU
        activation = schema.ActivationFunctionType.NONE if layer_name == last else relu
        if convolution:
            shape = (1, height, width, len(weight))
            output = graph.tensor(layer_name, shape, "INT8", [scale], zero_point)
            options = schema.Conv2DOptionsT(schema.Padding.SAME, 1, 1, activation)
            x = graph.operator("CONV_2D", inputs, output, options)
            height, width = height // 2, width // 2
            shape = (1, height, width, len(weight))
            output = graph.tensor(f"{layer_name}_pool", shape, "INT8", [scale], zero_point)
            options = schema.Pool2DOptionsT(schema.Padding.VALID, 2, 2, 2, 2)
            x = graph.operator("MAX_POOL_2D", [x], output, options)
        else:
            shape = (1, len(weight))
            output = graph.tensor(layer_name, shape, "INT8", [scale], zero_point)
            options = schema.FullyConnectedOptionsT(activation)
            x = graph.operator("FULLY_CONNECTED", inputs, output, options)
            height = width = 1
    return graph.pack([first], [x], name)


def operators(data: bytes) -> list[str]:
    """The operators of a .tflite file, in the order in which they run."""
    schema, _ = tflite_micro()
    model = schema.Model.GetRootAsModel(data, 0)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
    subgraph = model.Subgraphs(0)
    indices = [subgraph.Operators(i).OpcodeIndex() for i in range(subgraph.OperatorsLength())]
    return [names[model.OperatorCodes(i).BuiltinCode()] for i in indices]


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


def run_tflite(data: bytes, images: np.ndarray) -> tuple[np.ndarray, int]:
    """(int8 (N, 10) logits, tensor arena bytes) of a .tflite under tflite-micro, an image at a time.

    images: int8 (N, 32, 32, 3). Raises UserError when tflite-micro refuses the file.
    """
    _, runtime = tflite_micro()
    logits = []
    try:
        interpreter = runtime.Interpreter.from_bytes(data)
        for image in images:
            interpreter.set_input(image[None], 0)
            interpreter.invoke()
            logits.append(interpreter.get_output(0)[0].copy())
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tflite-micro cannot run the exported file: {reason}") from None
    arena = ARENA_TOTAL.search(stderr_of(interpreter.print_allocations))
    if arena is None:
        raise RuntimeError("this tflite-micro reports its arena in another form")
    return np.stack(logits), int(arena[1])

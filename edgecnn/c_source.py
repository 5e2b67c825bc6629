"""C for a microcontroller: a checkpoint's weights as one file for the kernels in firmware/.

INT8 weights are stored densely, or as the non-zeros alone: two bytes each, the step from the last one
and the value. All integers are the checkpoint's own; a requantized value is rint((accumulator +
bias / (input scale * weight scale)) * multiplier) in single precision, as torch's fbgemm computes it.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from edgecnn.checkpoint import fp32_model
from edgecnn.data import normalize
from edgecnn.files import REPOSITORY, UserError
from edgecnn.model import ARCHITECTURE, CLASSES, IMAGE_SHAPE, fold_batch_norm

FIRMWARE = REPOSITORY / "firmware"
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
COMPILE_TIMEOUT_S = 120
STORAGES = ("dense", "sparse", "fastest")
# Share of zeros from which the sparse kernel takes fewer Cortex-M4 instructions than the dense one.
CONV_BREAK_EVEN, LINEAR_BREAK_EVEN = 0.65, 0.75
ROUNDING_LIMIT = 2.0**22  # above it, adding 1.5 * 2^23 in single precision no longer rounds
MAX_STEP = 255


# ---- storage of one layer ----------------------------------------------------------------------


def sparse_entries(rows: np.ndarray, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(entries, starts): the non-zeros of int8 rows (O, K) whose kth input lies at addresses[k].

    An entry is two bytes, the step from the entry before and the value; a step above 255 takes
    entries of value 0, and zero entries fill a row to an even number. starts: (O + 1,) byte offsets.
    """
    order = np.argsort(addresses, kind="stable")
    entries, starts = bytearray(), [0]
    for row in rows[:, order]:
        nonzero = np.flatnonzero(row)
        at = 0
        for address, value in zip(addresses[order][nonzero].tolist(), row[nonzero], strict=True):
            while address - at > MAX_STEP:
                entries += bytes((MAX_STEP, 0))
                at += MAX_STEP
            entries += bytes((address - at, int(value) & 0xFF))
            at = address
        entries += bytes(-len(entries) % 4)
        starts.append(len(entries))
    return np.frombuffer(bytes(entries), np.uint8), np.array(starts, np.uint32)


def conv_addresses(inputs: int, width: int) -> np.ndarray:
    """Where conv_sparse keeps each of the (inputs, 3, 3) values, in words; see kernels.h."""
    columns = 2 * -(-(width // 2) // 2) + 2
    channel, ky, kx = np.indices((inputs, 3, 3))
    return (channel * 4 * columns + 4 * kx + ky).reshape(-1)


def winograd_fits(inputs: int, outputs: int) -> bool:
    """Whether conv_winograd takes a layer of these channels."""
    return inputs % 4 == 0 and outputs % 2 == 0


def conv_order(weight: np.ndarray, winograd: bool) -> np.ndarray:
    """int8 (O, C, 3, 3) in the order of conv_winograd (O, C/4, 3, 3, 4) or conv_direct (O, 3, 3, C)."""
    if not winograd:
        return weight.transpose(0, 2, 3, 1)
    outputs, inputs = weight.shape[:2]
    return weight.reshape(outputs, inputs // 4, 4, 3, 3).transpose(0, 1, 3, 4, 2)


def linear_order(weight: np.ndarray) -> np.ndarray:
    """int8 (O, I) as linear_dense reads it: int16 (O/4, I/4, 2, 2, 2), two rows in a value.

    Zero-filled to multiples of 4. Rows 2i and 2i + 1 share 256 * upper + lower, which always fits.
    """
    outputs, inputs = weight.shape
    padded = np.pad(weight, ((0, -outputs % 4), (0, -inputs % 4))).astype(np.int16)
    paired = padded[0::2] + 256 * padded[1::2]  # (O/2, I)
    # (O/4, row pair, I/4, k, j) -> (O/4, I/4, row pair, j, k): a word holds the inputs j and j + 2
    return paired.reshape(len(paired) // 2, 2, -1, 2, 2).transpose(0, 2, 1, 4, 3)


def hwc_columns(weight: np.ndarray, channels: int) -> np.ndarray:
    """Columns of a Linear weight (O, C * H * W) reordered for an input flattened as H, W, C."""
    return weight.reshape(len(weight), channels, -1).swapaxes(1, 2).reshape(len(weight), -1)


# ---- the layers of a checkpoint ----------------------------------------------------------------


def fbgemm_constants(layer: dict, input_scale: float, bias: np.ndarray):
    """(multiplier, bias in accumulator units): two (O,) float32, rounded as torch's fbgemm does.

    Source: ATen/native/quantized/cpu (act_times_w_scale) and fbgemm's requantization, which divides
    the bias for a scale a channel and multiplies it by the reciprocal for a scale a tensor.
    """
    scales = np.float32(input_scale) * np.array(layer["weight_scale"], np.float32)
    bias = bias / scales if len(scales) > 1 else bias * (np.float32(1) / scales)
    multiplier = np.broadcast_to(scales / np.float32(layer["output_scale"]), bias.shape)
    return multiplier, bias


def int8_layers(checkpoint: dict) -> list[dict]:
    """The layers of an int8 checkpoint in order, with numpy values.

    Keys: name, weight, multiplier, bias, low, high, shift, and for convolutions height and width.
    Raises UserError when the tensors do not fit the network or the kernels' arithmetic.
    """
    quantization, layers = checkpoint["quantization"], []
    scale, (inputs, height, width) = quantization["input_scale"], IMAGE_SHAPE
    zero_point = quantization["input_zero_point"]
    try:
        for name, entry in quantization["layers"].items():
            weight = checkpoint["tensors"][f"{name}.weight"].numpy()
            bias = checkpoint["tensors"][f"{name}.bias"].numpy()
            multiplier, bias = fbgemm_constants(entry, scale, bias)
            scale, output_zero = entry["output_scale"], entry["output_zero_point"]
            layer = {"name": name, "weight": weight, "multiplier": multiplier, "bias": bias}
            if name == "fc2":  # the logits leave as q - 128, signed
                layer |= {"low": -output_zero, "high": 255 - output_zero, "shift": output_zero - 128}
            else:
                layer |= {"low": 0, "high": 255 - output_zero, "shift": 0}
            if weight.ndim == 4:
                first = not layers
                layer |= {"height": height, "width": width}
                layer |= {"flip": 128 if first else 0, "zero": zero_point if first else 0}
                inputs, height, width = len(weight), height // 2, width // 2
            elif name == "fc1":
                layer["weight"] = hwc_columns(weight, inputs)
            sums = 255 * np.abs(weight.reshape(len(weight), -1).astype(np.int64)).sum(axis=1)
            if not (np.all((sums + np.abs(bias)) * multiplier < ROUNDING_LIMIT) and sums.max() < 2**29):
                raise ValueError(f"{name} can overflow the kernels' arithmetic")
            layers.append(layer)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the checkpoint's tensors do not fit {ARCHITECTURE}: {reason}") from None
    return layers


def exact_logits(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """The network in exact integers, without C: int8 images (N, 3, 32, 32) -> int8 logits (N, 10).

    Float64 holds every accumulator exactly, so this reference depends on no CPU's instructions.
    """
    values = images.double() + 128 - checkpoint["quantization"]["input_zero_point"]
    for layer in int8_layers(checkpoint):
        weight = torch.from_numpy(layer["weight"].astype(np.float64))
        if weight.ndim == 4:
            sums = torch.nn.functional.conv2d(values, weight, padding=1)
            sums = torch.nn.functional.max_pool2d(sums, 2)
        else:
            if values.ndim == 4:
                values = values.permute(0, 2, 3, 1).flatten(1)  # (N, H * W * C)
            sums = values @ weight.T
        shape = (1, -1, 1, 1)[: sums.ndim]
        bias, multiplier = (
            torch.from_numpy(layer[key].copy()).reshape(shape) for key in ("bias", "multiplier")
        )
        rounded = torch.round((sums.float() + bias) * multiplier).double()
        values = rounded.clamp(layer["low"], layer["high"]) + layer["shift"]
    return values.to(torch.int8)


def quantize_images(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (N, 3, 32, 32) -> int8 network inputs: normalized, quantized, less 128."""
    quantization = checkpoint["quantization"]
    quantized = torch.quantize_per_tensor(
        normalize(images), quantization["input_scale"], quantization["input_zero_point"], torch.quint8
    )
    return (quantized.int_repr().int() - 128).to(torch.int8)


# ---- C text ------------------------------------------------------------------------------------


def c_array(kind: str, name: str, values: np.ndarray) -> str:
    """A static const array, aligned for 8-byte loads; floats in hexadecimal, so exact."""
    flat = values.reshape(-1)
    if flat.dtype == np.float32:
        words = [float(value).hex() + "f" for value in flat]
    else:
        words = list(map(str, flat.tolist()))
    lines = [", ".join(words[i : i + 24]) for i in range(0, len(words), 24)]
    body = ",\n".join(lines) or "0"
    return f"static const {kind} {name}[] __attribute__((aligned(8))) = {{\n{body}}};\n"


def int8_layer_source(layer: dict, storage: str) -> tuple[str, str, str]:
    """(definitions, kernel, scratch bytes as C) of one layer."""
    name, weight = layer["name"], layer["weight"]
    outputs, inputs = weight.shape[:2]
    conv = weight.ndim == 4
    zeros = np.count_nonzero(weight == 0) / weight.size
    sparse = storage == "sparse" or (
        storage == "fastest" and zeros > (CONV_BREAK_EVEN if conv else LINEAR_BREAK_EVEN)
    )
    text = c_array("float", f"{name}_multiplier", layer["multiplier"])
    text += c_array("float", f"{name}_bias", layer["bias"])
    winograd = conv and winograd_fits(inputs, outputs) and not layer["flip"]
    if sparse:
        addresses = conv_addresses(inputs, layer["width"]) if conv else np.arange(inputs)
        entries, starts = sparse_entries(weight.reshape(outputs, -1), addresses)
        text += c_array("uint8_t", f"{name}_entries", entries)
        text += c_array("uint32_t", f"{name}_starts", starts)
    else:
        if conv:
            text += c_array("int8_t", f"{name}_weights", conv_order(weight, winograd))
        else:
            text += c_array("int16_t", f"{name}_weights", linear_order(weight))
    stored = f"0, {name}_entries, {name}_starts" if sparse else f"{name}_weights, 0, 0"
    scale = f"{{{name}_multiplier, {name}_bias, {layer['low']}, {layer['high']}, {layer['shift']}}}"
    if conv:
        shape = f"{layer['height']}, {layer['width']}, {inputs}, {outputs}, "
        shape += f"{layer['flip']}, {layer['zero']}"
        kernel = "conv_sparse" if sparse else "conv_winograd" if winograd else "conv_direct"
        scratch = f"{kernel.removeprefix('conv_').upper()}_SCRATCH({layer['width']}, {inputs})"
    else:
        shape = f"{inputs}, {outputs}"
        kernel = "linear_sparse" if sparse else "linear_dense"
        scratch = "0" if sparse else f"LINEAR_SCRATCH({inputs})"
    kind = "conv_t" if conv else "linear_t"
    text += f"static const {kind} {name} = {{{shape}, {stored}, {scale}}};\n\n"
    return text, kernel, scratch


def c_source(checkpoint: dict, storage: str = "fastest") -> str:
    """The generated weights.c of an int8 or fp32 checkpoint.

    storage (int8): `dense`, `sparse`, or `fastest`, which decides a layer by its share of zeros.
    Raises UserError when the tensors do not fit the network.
    """
    if checkpoint["precision"] == "fp32":
        return fp32_source(checkpoint)
    text = '/* Generated by edgecnn/c_source.py. */\n#include "kernels.h"\n#include "network.h"\n\n'
    calls, needs, at = [], [], 0
    for layer in int8_layers(checkpoint):
        definitions, kernel, scratch = int8_layer_source(layer, storage)
        text += definitions
        name, weight = layer["name"], layer["weight"]
        source, target = f"memory + {at}", f"memory + {at}"
        if weight.ndim == 4:
            output_bytes = len(weight) * (layer["height"] // 2) * (layer["width"] // 2)
            held = output_bytes
            if not calls:
                source = "(const uint8_t *)image"
            else:
                held = max(held, weight.shape[1] * layer["height"] * layer["width"])
        else:
            last = name == "fc2"
            at += -(-weight.shape[1] // 8) * 8
            target = "(uint8_t *)logits" if last else f"memory + {at}"
            held = at + (0 if last else len(weight))
        held = -(-held // 8) * 8
        needs.append(f"{held} + {scratch}")
        tail = "" if kernel == "linear_sparse" else f", memory + {held}"
        calls.append(f"    {kernel}(&{name}, {source}, {target}{tail});\n")
    return text + infer_source("uint8_t", "int8_t", needs, calls)


def infer_source(memory: str, value: str, needs: list[str], calls: list[str]) -> str:
    """The function infer and its static memory; `needs`: bytes a layer needs, as C expressions."""
    largest = needs[0]
    for need in needs[1:]:
        largest = f"LARGER({largest},\n    {need})"
    text = "/* Activations at the front, a layer's scratch behind them. */\n"
    text += f"static {memory} memory[({largest}) / sizeof({memory})]\n"
    text += "    __attribute__((aligned(8)));\n\n"
    text += f"void infer(const {value} *image, {value} *logits)\n{{\n"
    return text + "".join(calls) + "}\n"


def fp32_source(checkpoint: dict) -> str:
    """c_source for an fp32 checkpoint: BN folded, four output channels side by side."""
    model = fold_batch_norm(fp32_model(checkpoint))
    text = '/* Generated by edgecnn/c_source.py. */\n#include "kernels_fp32.h"\n#include "network.h"\n\n'
    text += "#define LARGER(a, b) ((a) > (b) ? (a) : (b))\n\n"
    calls, needs, (channels, height, width), at = [], [], IMAGE_SHAPE, 0
    for name in ("block1", "block2", "block3", "fc1", "fc2"):
        layer = getattr(model, name)
        module = layer.conv if name.startswith("block") else layer
        weight, bias = (t.detach().numpy() for t in (module.weight, module.bias))
        conv, outputs = weight.ndim == 4, len(weight)
        source = target = f"memory + {at}"
        if conv:
            rows = weight.transpose(0, 2, 3, 1).reshape(outputs, -1)
            held = max(
                outputs * (height // 2) * (width // 2), channels * height * width if calls else 0
            )
            source = source if calls else "image"
            shape = f"{height}, {width}, {channels}, {outputs}"
            needs.append(f"4 * {held} + CONV_FP32_SCRATCH({width}, {channels})")
            tail = f", memory + {held}"
            channels, height, width = outputs, height // 2, width // 2
        else:
            rows = hwc_columns(weight, channels) if name == "fc1" else weight
            shape = f"{rows.shape[1]}, {outputs}, {int(name == 'fc1')}"
            at += rows.shape[1]
            target = "logits" if name == "fc2" else f"memory + {at}"
            needs.append(f"4 * {at + outputs}")
            tail = ""
        padded = np.pad(rows, ((0, -outputs % 4), (0, 0)))
        interleaved = padded.reshape(-(-outputs // 4), 4, -1).swapaxes(1, 2)
        text += c_array("float", f"{name}_weights", interleaved)
        text += c_array("float", f"{name}_bias", bias)
        kind = "conv_fp32" if conv else "linear_fp32"
        text += f"static const {kind}_t {name} = {{{shape}, {name}_weights, {name}_bias}};\n\n"
        calls.append(f"    {kind}(&{name}, {source}, {target}{tail});\n")
    return text + infer_source("float", "float", needs, calls)


# ---- on this machine ---------------------------------------------------------------------------


def run_compiler(command: list[str], missing: str) -> None:
    """Run a compiler; raises UserError with its message, or `missing` when it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; {missing}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not finish within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode:
        raise UserError(f"{command[0]} failed: {' | '.join(done.stderr.split(chr(10))[:6])}")


def kernel_flags(precision: str) -> list[str]:
    """The C flags of a precision: int8 forbids fused multiply-add, fp32 wants it."""
    return ["-ffp-contract=off"] if precision == "int8" else ["-DNETWORK_FP32", "-ffp-contract=fast"]


def kernel_files(precision: str) -> list[Path]:
    """The hand-written kernels of a precision."""
    return [FIRMWARE / ("kernels.c" if precision == "int8" else "kernels_fp32.c")]


def compile_host(source: str, precision: str, library: Path) -> ctypes.CDLL:
    """Compile a generated weights file with this machine's compiler ($CC, or cc) and load it.

    Raises UserError when the compiler is missing or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.c"
        weights.write_text(source)
        command = [os.environ.get("CC", "cc"), *WARNINGS, "-O2", "-fPIC", "-shared"]
        command += [*kernel_flags(precision), f"-I{FIRMWARE}", str(weights)]
        command += [*map(str, kernel_files(precision)), "-o", str(library)]
        run_compiler(command, "install a C compiler, or name one in CC")
    return ctypes.CDLL(str(Path(library).resolve()))


def run_host(library: ctypes.CDLL, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) of images (N, 3, 32, 32), both int8 or both float32 as the library was built."""
    rows = images.permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, 3)
    logits = torch.empty(len(rows), len(CLASSES), dtype=rows.dtype)
    library.infer.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.infer.restype = None
    for image, out in zip(rows, logits, strict=True):
        library.infer(image.data_ptr(), out.data_ptr())
    return logits

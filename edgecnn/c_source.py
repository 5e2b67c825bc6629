"""C for a microcontroller: a checkpoint's weights as one file for the kernels in firmware/.

INT8 weights are stored densely, or as the non-zeros alone: two bytes each, the step from the last one
and the value, or for a Linear layer a bitmap where that is smaller. All integers are the
checkpoint's own; a requantized value is rint((accumulator + bias / (input scale * weight scale)) *
multiplier) in single precision, as torch's fbgemm computes it.
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from edgecnn.checkpoint import fp32_model
from edgecnn.data import normalize
from edgecnn.errors import UserError
from edgecnn.int8 import integer_logits, quantize_images
from edgecnn.model import ARCHITECTURE, CLASSES, IMAGE_SHAPE, fold_batch_norm, weight_layers
from edgecnn.names import REPOSITORY

FIRMWARE = REPOSITORY / "firmware"
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
COMPILE_TIMEOUT_S = 120
# Share of zeros from which a sparse kernel took fewer Cortex-M4 instructions than this dense one.
BREAK_EVEN = {"conv_direct": 0.40, "conv_winograd": 0.66}
MEMORY_TYPES = {"int8": ("uint8_t", "int8_t"), "fp32": ("float", "float")}  # activations, ends
ROUNDING_LIMIT = 2.0**22  # above it, adding 1.5 * 2^23 in single precision no longer rounds
MAX_STEP = 255
BATCH = 250  # images at once in the references


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


def bitmap_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(masks, values, starts) of int8 rows (O, K): 32 inputs a mask, the first in the highest bit.

    masks: (O, ceil(K / 32)) uint32; values: the non-zeros; starts: (O + 1,) offsets into values.
    """
    padded = np.pad(rows != 0, ((0, 0), (0, -rows.shape[1] % 32)))
    masks = np.packbits(padded, axis=1).view(">u4").astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))])
    return masks, rows[rows != 0], starts.astype(np.uint32)


def conv_addresses(inputs: int, width: int) -> np.ndarray:
    """Where conv_sparse keeps each of the (inputs, 3, 3) values, in words; see kernels.h."""
    columns = 2 * -(-(width // 2) // 2) + 2
    channel, ky, kx = np.indices((inputs, 3, 3))
    return (channel * 4 * columns + 4 * kx + ky).reshape(-1)


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
                layer |= {
                    "low": -output_zero,
                    "high": 255 - output_zero,
                    "shift": output_zero - 128,
                }
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
            if not (
                np.all((sums + np.abs(bias)) * multiplier < ROUNDING_LIMIT) and sums.max() < 2**29
            ):
                raise ValueError(f"{name} can overflow the kernels' arithmetic")
            layers.append(layer)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"the checkpoint's tensors do not fit {ARCHITECTURE}: {reason}") from None
    return layers


def fp32_layers(checkpoint: dict) -> list[dict]:
    """The layers of an fp32 checkpoint in order, BN folded; keys as int8_layers gives them, and relu.

    Raises UserError when the tensors do not fit the network.
    """
    model, layers = fold_batch_norm(fp32_model(checkpoint)), []
    channels, height, width = IMAGE_SHAPE
    for name, module in weight_layers(model).items():
        weight, bias = (tensor.detach().numpy() for tensor in (module.weight, module.bias))
        layer = {"name": name.removesuffix(".conv"), "weight": weight, "bias": bias}
        if weight.ndim == 4:
            layer |= {"height": height, "width": width}
            channels, height, width = len(weight), height // 2, width // 2
        else:
            layer["relu"] = int(name == "fc1")
            layer["weight"] = hwc_columns(weight, channels) if name == "fc1" else weight
        layers.append(layer)
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


def network_inputs(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """What the firmware takes for uint8 pixels (N, 3, 32, 32): int8, or normalized float32."""
    if checkpoint["precision"] == "fp32":
        return normalize(images)
    return torch.from_numpy(quantize_images(checkpoint, images)).permute(0, 3, 1, 2)


# ---- how each layer is stored ------------------------------------------------------------------


def dense_kernel(layer: dict) -> str:
    """The dense kernel that takes a layer."""
    weight = layer["weight"]
    if weight.ndim == 2:
        return "linear_dense"
    fits = weight.shape[1] % 4 == 0 and len(weight) % 2 == 0 and not layer["flip"]
    return "conv_winograd" if fits else "conv_direct"


def sparse_storage(layer: dict) -> tuple[str, dict[str, np.ndarray]]:
    """(kernel, arrays) of the non-zeros: for a Linear layer the smaller of entries and a bitmap."""
    weight = layer["weight"]
    rows = weight.reshape(len(weight), -1)
    if weight.ndim == 4:
        entries, starts = sparse_entries(rows, conv_addresses(weight.shape[1], layer["width"]))
        return "conv_sparse", {"entries": entries, "starts": starts}
    entries, starts = sparse_entries(rows, np.arange(rows.shape[1]))
    masks, values, value_starts = bitmap_rows(rows)
    if masks.nbytes + values.nbytes < entries.nbytes:
        return "linear_bitmap", {"masks": masks, "values": values, "starts": value_starts}
    return "linear_sparse", {"entries": entries, "starts": starts}


def dense_storage(layer: dict) -> tuple[str, dict[str, np.ndarray]]:
    """(kernel, arrays) of every weight, zeros included."""
    weight, kernel = layer["weight"], dense_kernel(layer)
    if weight.ndim == 2:
        return kernel, {"weights": linear_order(weight)}
    return kernel, {"weights": conv_order(weight, kernel == "conv_winograd")}


def int8_storage(layer: dict, storage: str) -> tuple[str, dict[str, np.ndarray]]:
    """(kernel, arrays by member of the layer's struct) of one int8 layer; see stored_layers."""
    dense, sparse = dense_storage(layer), sparse_storage(layer)
    if storage != "balanced":
        return {"dense": dense, "sparse": sparse}[storage]
    weight = layer["weight"]
    if weight.ndim == 2:
        return min(dense, sparse, key=lambda stored: sum(a.nbytes for a in stored[1].values()))
    return sparse if np.mean(weight == 0) > BREAK_EVEN[dense[0]] else dense


def fp32_storage(layer: dict) -> tuple[str, dict[str, np.ndarray]]:
    """(kernel, arrays) of one fp32 layer: four outputs side by side, zero-filled."""
    weight = layer["weight"]
    rows = weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
    rows = rows.reshape(len(rows), -1)
    padded = np.pad(rows, ((0, -len(rows) % 4), (0, 0)))
    interleaved = padded.reshape(len(padded) // 4, 4, -1).swapaxes(1, 2)  # (O/4, K, 4)
    kernel = "conv_fp32" if weight.ndim == 4 else "linear_fp32"
    return kernel, {"weights": interleaved, "bias": layer["bias"]}


def stored_layers(checkpoint: dict, storage: str = "balanced") -> list[dict]:
    """The layers of a checkpoint, each with its `kernel` and `arrays`: what c_source writes.

    storage (int8): `dense`, `sparse` (a layer's non-zeros alone), or `balanced`: of convolutions, where
    the instructions are, the faster of the two, of Linear layers, where the bytes are, the smaller.
    Raises UserError when the tensors do not fit the network.
    """
    if checkpoint["precision"] == "fp32":
        layers = fp32_layers(checkpoint)
        stored = [fp32_storage(layer) for layer in layers]
    else:
        layers = int8_layers(checkpoint)
        stored = [int8_storage(layer, storage) for layer in layers]
    return [
        {**layer, "kernel": kernel, "arrays": arrays}
        for layer, (kernel, arrays) in zip(layers, stored, strict=True)
    ]


def weight_bytes_read(layer: dict) -> int:
    """Bytes of weights that the kernel of a stored layer reads from flash in one inference.

    A kernel reads its weights once a row of windows (direct), a block of tiles (Winograd), a block of
    windows (sparse), a window (fp32), or once in all (Linear).
    """
    arrays = layer["arrays"]
    once = sum(
        arrays[key].nbytes for key in arrays if key in ("weights", "entries", "masks", "values")
    )
    if layer["weight"].ndim == 2:
        return once
    rows, windows = layer["height"] // 2, layer["width"] // 2
    tile_rows = max(8 // max(windows, 1), 1)  # WINOGRAD_TILE_ROWS
    passes = {
        "conv_direct": rows,
        "conv_winograd": -(-rows // tile_rows),
        "conv_sparse": rows * -(-windows // 2),
        "conv_fp32": rows * windows,
    }
    return once * passes[layer["kernel"]]


# ---- C text ------------------------------------------------------------------------------------


def c_array(name: str, values: np.ndarray) -> str:
    """A static const array, aligned for 8-byte loads; floats in their shortest exact form."""
    flat = values.reshape(-1)
    if flat.dtype == np.float32:
        kind, words = "float", [f"{text}f" for text in flat.astype(str)]
    else:
        kind, words = f"{flat.dtype}_t", list(map(str, flat.tolist()))
    lines = [",".join(words[i : i + 32]) for i in range(0, len(words), 32)]
    body = ",\n".join(lines) or "0"
    return f"static const {kind} {name}[] __attribute__((aligned(8))) = {{\n{body}}};\n"


def c_name(index: int) -> str:
    """What a layer is called in C: never the name that a file gives it."""
    return f"layer_{index}"


def layer_source(index: int, layer: dict) -> str:
    """The constants of one stored layer and the struct that holds them."""
    name, arrays, weight = c_name(index), dict(layer["arrays"]), layer["weight"]
    outputs, inputs = weight.shape[:2]
    members = {"inputs": inputs, "outputs": outputs}
    members |= {
        key: layer[key] for key in ("height", "width", "flip", "zero", "relu") if key in layer
    }
    members |= {key: f"{name}_{key}" for key in arrays}
    if "multiplier" in layer:
        arrays |= {"multiplier": layer["multiplier"], "bias": layer["bias"]}
        limits = f"{layer['low']}, {layer['high']}, {layer['shift']}"
        members["requantize"] = f"{{{name}_multiplier, {name}_bias, {limits}}}"
    text = "".join(c_array(f"{name}_{key}", values) for key, values in arrays.items())
    kind = layer["kernel"].split("_")[0] + ("_t" if "multiplier" in layer else "_fp32_t")
    fields = ",\n    ".join(f".{key} = {value}" for key, value in members.items())
    return f"{text}static const {kind} {name} = {{\n    {fields}}};\n\n"


def scratch_source(layer: dict) -> str:
    """The scratch of a stored layer's kernel, in elements of the activations, as C."""
    kernel, inputs = layer["kernel"], layer["weight"].shape[1]
    if kernel in ("linear_sparse", "linear_bitmap", "linear_fp32"):
        return "0"
    macro = kernel.removeprefix("conv_").upper() if kernel.startswith("conv") else "LINEAR"
    macro = "CONV_FP32" if kernel == "conv_fp32" else macro
    arguments = f"{layer['width']}, {inputs}" if kernel.startswith("conv") else f"{inputs}"
    return f"{macro}_SCRATCH({arguments})"


def infer_source(layers: list[dict], precision: str) -> str:
    """The function infer and its static memory: activations in front, a layer's scratch behind.

    A convolution writes over its own input; a Linear layer writes behind it.
    """
    memory, value = MEMORY_TYPES[precision]
    calls, needs, at = [], [], 0
    for index, layer in enumerate(layers):
        outputs, inputs = layer["weight"].shape[:2]
        source = target = f"memory + {at}"
        if layer["weight"].ndim == 4:
            pixels = layer["height"] * layer["width"]
            source = source if index else f"(const {memory} *)image"
            windows = (layer["height"] // 2) * (layer["width"] // 2)
            held = max(outputs * windows, inputs * pixels if index else 0)
        else:
            last = index == len(layers) - 1
            at += -(-inputs // 8) * 8
            target = f"({memory} *)logits" if last else f"memory + {at}"
            held = at if last else at + outputs
        held, scratch = -(-held // 8) * 8, scratch_source(layer)
        needs.append(f"{held} + {scratch}")
        tail = "" if scratch == "0" else f", memory + {held}"
        calls.append(f"    {layer['kernel']}(&{c_name(index)}, {source}, {target}{tail});\n")
    largest = needs[0]
    for need in needs[1:]:
        largest = f"LARGER({largest},\n    {need})"
    text = "/* Activations in front, a layer's scratch behind them. */\n"
    text += f"static {memory} memory[{largest}]\n    __attribute__((aligned(8)));\n\n"
    return text + f"void infer(const {value} *image, {value} *logits)\n{{\n{''.join(calls)}}}\n"


def c_source(layers: list[dict], precision: str) -> str:
    """The generated weights.c of stored_layers' answer."""
    header = "kernels.h" if precision == "int8" else "kernels_fp32.h"
    text = f'/* Generated by edgecnn/c_source.py. */\n#include "{header}"\n#include "network.h"\n\n'
    constants = "".join(layer_source(index, layer) for index, layer in enumerate(layers))
    return text + constants + infer_source(layers, precision)


# ---- on this machine ---------------------------------------------------------------------------


def run_compiler(command: list[str], missing: str) -> None:
    """Run a compiler; raises UserError with its message, or `missing` when it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; {missing}") from None
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run ({error.strerror}); {missing}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not finish within {COMPILE_TIMEOUT_S} s") from None
    if done.returncode:
        message = " | ".join(done.stderr.strip().splitlines()[:6]) or "it said nothing"
        raise UserError(f"{command[0]} failed with exit code {done.returncode}: {message}")


def kernel_flags(precision: str) -> list[str]:
    """The C flags of a precision: int8 forbids fused multiply-add, fp32 wants it."""
    return (
        ["-ffp-contract=off"] if precision == "int8" else ["-DNETWORK_FP32", "-ffp-contract=fast"]
    )


def kernel_files(precision: str) -> list[Path]:
    """The hand-written kernels of a precision."""
    return [FIRMWARE / ("kernels.c" if precision == "int8" else "kernels_fp32.c")]


def host_compiler() -> list[str]:
    """The command of this machine's C compiler; raises UserError where CC is no command line."""
    try:
        return shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise UserError(f"CC is no command line ({error}); name a C compiler in it") from None


def compile_host(source: str, precision: str, library: Path) -> ctypes.CDLL:
    """Compile a generated weights file with this machine's compiler ($CC, or cc) and load it.

    Raises UserError when the compiler is missing or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.c"
        weights.write_text(source)
        compiler = host_compiler()
        command = [*compiler, *WARNINGS, "-O2", "-fPIC", "-shared"]
        command += [*kernel_flags(precision), f"-I{FIRMWARE}", str(weights)]
        command += [*map(str, kernel_files(precision)), "-o", str(library)]
        run_compiler(command, "install a C compiler, or name one in CC")
    try:
        return ctypes.CDLL(str(Path(library).resolve()))
    except OSError:
        raise UserError(
            f"{compiler[0]} left no library that loads; name a C compiler in CC"
        ) from None


def run_host(library: ctypes.CDLL, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) of images (N, 3, 32, 32), both int8 or both float32 as the library was built."""
    rows = images.permute(0, 2, 3, 1).contiguous()  # (N, 32, 32, 3)
    logits = torch.empty(len(rows), len(CLASSES), dtype=rows.dtype)
    library.infer.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.infer.restype = None
    for image, out in zip(rows, logits, strict=True):
        library.infer(image.data_ptr(), out.data_ptr())
    return logits


def agreement(logits: torch.Tensor, other: torch.Tensor) -> dict:
    """How far two sets of int8 logits (N, 10) agree, in plain values."""
    difference = (logits.int() - other.int()).abs()
    same_class = logits.int().argmax(1) == other.int().argmax(1)
    return {
        "images": len(logits),
        "bit_exact_images": int((difference.amax(1) == 0).sum()),
        "top1_agreement_percent": 100 * same_class.double().mean().item(),
        "max_difference_lsb": int(difference.max()),
    }


def host_parity(
    checkpoint: dict, images: torch.Tensor, graphs: dict, storage: str = "balanced"
) -> dict:
    """The generated C, compiled here, against torch and against exact integers.

    images: uint8 pixels (N, 3, 32, 32). graphs: {engine: a function that selects the engine and
    returns its quantized modules}. Keys of the result: exact_integers and each engine, with
    `agreement`'s values. fbgemm equals the C bit for bit where the CPU has VNNI; its 8-bit dot product
    saturates on older x86, so exact_integers, which no CPU changes, is the one to insist on.
    """
    values = network_inputs(checkpoint, images)
    source = c_source(stored_layers(checkpoint, storage), "int8")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_host(source, "int8", Path(folder) / "network.so")
        logits = run_host(library, values)
    exact = torch.cat([exact_logits(checkpoint, batch) for batch in values.split(BATCH)])
    found = {"exact_integers": agreement(logits, exact)}
    for engine, graph in graphs.items():
        found[engine] = agreement(logits, torch.from_numpy(integer_logits(graph(), images)))
    return found

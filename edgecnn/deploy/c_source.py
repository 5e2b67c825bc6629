"""C of an INT8 checkpoint: its weights and its calls as one file for the kernels in firmware/.

`model.c` and `model.h` hold names that are made here alone; what comes from a file is a number or an
escaped string. All integers are the checkpoint's own, and the result is edgecnn/deploy/integer.py's,
bit for bit.
"""

import ctypes
import math
import os
import shlex
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from edgecnn.deploy.integer import exact_logits
from edgecnn.deploy.plan import Plan, Step, planned
from edgecnn.deploy.tools import output_of
from edgecnn.errors import UserError
from edgecnn.graph import INPUT, shapes_of
from edgecnn.names import REPOSITORY
from edgecnn.quantized import SIGNED_OFFSET, int8_module, integer_logits, quantize_images

FIRMWARE = REPOSITORY / "firmware"
KERNELS = ("conv_direct.c", "conv_winograd.c", "conv_sparse.c", "conv_depthwise.c", "linear.c")
KERNELS += ("pool.c", "elementwise.c")
HEADERS = ("layers.h", "simd.h", "requantize.h", "multiply.h")
EXAMPLE = "example_main.c"
C_NAMES = (*KERNELS, *HEADERS, "main.c", "model.c", "model.h")  # a folder that compiles by itself
WARNINGS = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
ARITHMETIC = (
    "-ffp-contract=off"  # a fused multiply-add would round once where the reference does twice
)
PIXELS = 256
STRUCTS = {"linear": "linear_t", "max": "pool_t", "avg": "pool_t", "add": "add_layer_t"}
STRUCTS |= {"conv": "conv_t", "clamp": "clamp_t"}
WITH_SCRATCH = ("conv_direct", "conv_winograd", "conv_sparse", "conv_depthwise", "linear_dense")


class Source(NamedTuple):
    """A generated network: its plan, and the text of model.c and model.h."""

    plan: Plan
    code: str
    header: str


# ---- C text ------------------------------------------------------------------------------------


def c_float(value: float) -> str:
    """A float literal in the shortest form that reads back exactly."""
    return f"{np.float32(value)!s}f"


def c_string(text: str) -> str:
    """A string literal of any text: UTF-8, all but plain letters, digits and spaces in octal."""
    plain = [
        chr(b) if chr(b).isalnum() and b < 128 or b == 32 else f"\\{b:03o}"
        for b in text.encode("utf-8", "replace")
    ]
    return f'"{"".join(plain)}"'


def c_array(name: str, values: np.ndarray) -> str:
    """A static const array, aligned for 8-byte loads."""
    flat = values.reshape(-1)
    if flat.dtype == np.float32:
        kind, words = "float", list(map(c_float, flat))
    else:
        kind, words = f"{flat.dtype}_t", list(map(str, flat.tolist()))
    lines = [",".join(words[i : i + 32]) for i in range(0, len(words), 32)]
    body = ",\n".join(lines) or "0"
    return f"static const {kind} {name}[] __attribute__((aligned(8))) = {{\n{body}}};\n"


def braces(members: dict) -> str:
    """A designated initializer of numbers, names and further dicts."""
    fields = (
        f".{key} = {braces(value) if isinstance(value, dict) else value}"
        for key, value in members.items()
    )
    return f"{{{', '.join(fields)}}}"


def add_members(add: tuple) -> dict:
    scale_a, scale_b, zero_a, zero_b, zero = add
    scales = {"scale_a": c_float(scale_a), "scale_b": c_float(scale_b)}
    return scales | {"zero_a": zero_a, "zero_b": zero_b, "zero": zero}


def step_source(step: Step, name: str) -> str:
    """The constants of a step and the struct that holds them, all under names that begin with `name`."""
    if step.kernel == "flip_signs":
        return ""
    text = "".join(c_array(f"{name}_{key}", values) for key, values in step.arrays.items())
    members = {k: c_float(v) if isinstance(v, float) else v for k, v in step.members.items()}
    if "requantize" in members:
        constants = [key for key in ("multiplier", "bias", "offset") if key in step.arrays]
        members["requantize"] = members["requantize"] | {k: f"{name}_{k}" for k in constants}
        members |= {k: f"{name}_{k}" for k in step.arrays if k not in constants}
    if step.add is not None and step.kernel == "add":
        members["scales"] = add_members(step.add)
    elif step.add is not None:
        text += f"static const add_t {name}_add = {braces(add_members(step.add))};\n"
        members["add"] = f"&{name}_add"
    kind = STRUCTS[step.kernel.split("_")[0]]
    return f"{text}static const {kind} {name} = {braces(members)};\n\n"


def call_source(plan: Plan, at: int) -> str:
    """The call of a step."""
    step = plan.steps[at]

    def place(value: str) -> str:
        if value == INPUT:
            return "(const uint8_t *)image"
        if value == plan.output:
            return "(uint8_t *)logits"
        return f"memory + {plan.offsets[value]}"

    inputs = [place(value) for value in step.inputs]
    output = place(step.output)
    if step.kernel == "flip_signs":
        return f"    flip_signs({inputs[0]}, {output}, {step.members['count']});\n"
    if step.kernel.startswith("conv_") and len(inputs) == 1:
        inputs.append("NULL")
    arguments = [f"&layer_{at}", *inputs, output]
    if step.kernel in WITH_SCRATCH:
        arguments.append(f"memory + {plan.scratch_offsets[at]}")
    return f"    {step.kernel}({', '.join(arguments)});\n"


def pixel_table(checkpoint: dict) -> np.ndarray:
    """int8 (C, 256): what each uint8 pixel of a channel becomes, by torch's own Quantize."""
    data = checkpoint["data"]
    mean, std = (torch.tensor(data[key], dtype=torch.float32) * 255 for key in ("mean", "std"))
    pixels = torch.arange(PIXELS, dtype=torch.float32).view(PIXELS, 1)
    values = ((pixels - mean) / std).view(PIXELS, -1, 1, 1)  # (256, C, 1, 1)
    return quantize_images(checkpoint, values).view(PIXELS, -1).T.contiguous().numpy()


def c_source(checkpoint: dict, storage: str = "balanced") -> Source:
    """model.c and model.h of an int8 checkpoint. Raises UserError where its numbers do not fit."""
    plan = planned(checkpoint, storage)
    shapes, data = shapes_of(plan.graph), checkpoint["data"]
    channels, height, width = plan.graph.input_shape
    logits = math.prod(shapes[plan.graph.output])
    image = checkpoint["quantization"]["activations"][INPUT]
    classes = [str(name) for name in data["classes"]]
    if len(classes) != logits:
        raise UserError(f"the checkpoint names {len(classes)} classes and gives {logits} logits")
    own = checkpoint["quantization"]["activations"][plan.graph.output]
    header = f"""/* Generated by edgecnn/deploy/c_source.py. */
#ifndef MODEL_H
#define MODEL_H

#include <stdint.h>

#define IMAGE_HEIGHT {height}
#define IMAGE_WIDTH {width}
#define IMAGE_CHANNELS {channels}
#define IMAGE_VALUES (IMAGE_HEIGHT * IMAGE_WIDTH * IMAGE_CHANNELS)
#define LOGITS {logits}
#define ARENA_BYTES {plan.arena_bytes}

/* real = (value - zero point) * scale */
#define IMAGE_SCALE {c_float(image["scale"])}
#define IMAGE_ZERO_POINT {image["zero_point"] - SIGNED_OFFSET}
#define LOGITS_SCALE {c_float(own["scale"])}
#define LOGITS_ZERO_POINT {own["zero_point"] - SIGNED_OFFSET}

extern const char *const class_names[LOGITS];

/* Pixels of 0 to 255, in height, width, channels, to the image that infer takes. */
void image_from_pixels(const uint8_t *pixels, int8_t *image);

/* image[IMAGE_VALUES] -> logits[LOGITS]. Not reentrant: activations are static. */
void infer(const int8_t *image, int8_t *logits);

#endif
"""
    code = "/* Generated by edgecnn/deploy/c_source.py. */\n#include <stddef.h>\n\n"
    code += '#include "layers.h"\n#include "model.h"\n\n'
    code += "".join(step_source(step, f"layer_{at}") for at, step in enumerate(plan.steps))
    names = ",\n    ".join(map(c_string, classes))
    code += f"const char *const class_names[LOGITS] = {{\n    {names}}};\n\n"
    code += c_array("pixel_table", pixel_table(checkpoint))
    code += """
void image_from_pixels(const uint8_t *pixels, int8_t *image)
{
    for (int i = 0; i < IMAGE_VALUES; i++)
        image[i] = pixel_table[i % IMAGE_CHANNELS * 256 + pixels[i]];
}

/* Activations and scratch; edgecnn/deploy/plan.py decides what lies where. */
static uint8_t memory[ARENA_BYTES] __attribute__((aligned(8)));

void infer(const int8_t *image, int8_t *logits)
{
"""
    code += "".join(call_source(plan, at) for at in range(len(plan.steps)))
    code += "    flip_signs((uint8_t *)logits, (uint8_t *)logits, LOGITS);\n}\n"
    return Source(plan, code, header)


# ---- on this machine ---------------------------------------------------------------------------


def write_source(source: Source, folder: Path) -> Path:
    """Write model.c and model.h; the path of model.c."""
    (folder / "model.h").write_text(source.header)
    (folder / "model.c").write_text(source.code)
    return folder / "model.c"


def host_compiler() -> list[str]:
    """The command of this machine's C compiler; raises UserError where CC is no command line."""
    try:
        return shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise UserError(f"CC is no command line ({error}); name a C compiler in it") from None


def compile_host(files: list[Path], library: Path) -> ctypes.CDLL:
    """Compile C files and the kernels with this machine's compiler ($CC, or cc), and load the result.

    Raises UserError when the compiler is missing or fails.
    """
    compiler = host_compiler()
    command = [*compiler, *WARNINGS, "-O2", ARITHMETIC, "-fPIC", "-shared", f"-I{FIRMWARE}"]
    command += [*map(str, files), *(str(FIRMWARE / name) for name in KERNELS)]
    output_of([*command, "-o", str(library)], "install a C compiler, or name one in CC")
    try:
        return ctypes.CDLL(str(Path(library).resolve()))
    except OSError:
        raise UserError(
            f"{compiler[0]} left no library that loads; name a C compiler in CC"
        ) from None


def run_host(library: ctypes.CDLL, images: torch.Tensor, logits: int) -> torch.Tensor:
    """int8 logits (N, logits) of int8 images (N, C, H, W)."""
    rows = images.permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
    found = torch.empty(len(rows), logits, dtype=torch.int8)
    library.infer.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.infer.restype = None
    for image, out in zip(rows, found, strict=True):
        library.infer(image.data_ptr(), out.data_ptr())
    return found


def host_logits(checkpoint: dict, images: torch.Tensor) -> torch.Tensor:
    """int8 logits (N, classes) of the generated C, compiled here, for int8 images (N, C, H, W)."""
    source = c_source(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        library = compile_host([write_source(source, Path(folder))], Path(folder) / "model.so")
        return run_host(library, images, len(checkpoint["data"]["classes"]))


def agreement(logits: torch.Tensor, other: torch.Tensor) -> dict:
    """How far two sets of int8 logits (N, classes) agree, in plain values."""
    difference = (logits.int() - other.int()).abs()
    same_class = logits.int().argmax(1) == other.int().argmax(1)
    return {
        "images": len(logits),
        "bit_exact_images": int((difference.amax(1) == 0).sum()),
        "top1_agreement_percent": 100 * same_class.double().mean().item(),
        "max_difference_lsb": int(difference.max()),
    }


def host_parity(checkpoint: dict, images: torch.Tensor, engines: tuple[str, ...]) -> dict:
    """The generated C, compiled here, against exact integers and torch's engines.

    images: normalized float (N, C, H, W). Keys of the result: exact_integers and each engine, with
    `agreement`'s values. fbgemm equals the C bit for bit where the CPU has VNNI; its 8-bit dot product
    saturates on older x86, so exact_integers, which no CPU changes, is the one to insist on.
    """
    values = quantize_images(checkpoint, images)
    logits = host_logits(checkpoint, values)
    found = {"exact_integers": agreement(logits, exact_logits(checkpoint, values))}
    for engine in engines:
        found[engine] = agreement(logits, integer_logits(int8_module(checkpoint, engine), images))
    return found


# ---- a folder that compiles by itself ----------------------------------------------------------


def c_files(checkpoint: dict) -> dict[str, str]:
    """The texts of C_NAMES: kernels, model.c, model.h and an example: `cc *.c && ./a.out picture.ppm`.

    Raises UserError where the checkpoint does not fit the kernels.
    """
    source = c_source(checkpoint)
    texts = {name: (FIRMWARE / name).read_text() for name in (*KERNELS, *HEADERS)}
    texts |= {"main.c": (FIRMWARE / EXAMPLE).read_text()}
    return texts | {"model.c": source.code, "model.h": source.header}

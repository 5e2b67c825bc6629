"""A generated network on an emulated Cortex-M: instructions, flash and RAM measured, cycles modelled.

QEMU executes the program block by block and says which block ran; its own disassembly says what is in
one. So every instruction of an inference is counted exactly, by layer and by mnemonic, and SysTick
under `-icount shift=0` has to give the same total. QEMU models no pipeline and no flash: cycles come
from Arm's table of instruction timings, and are named modelled.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from edgecnn.deploy.c_source import (
    ARITHMETIC,
    FIRMWARE,
    KERNELS,
    WARNINGS,
    Source,
    c_source,
    write_source,
)
from edgecnn.deploy.tools import complaint, first_line, output_of, run_tool
from edgecnn.errors import UserError

COMPILER, SIZES, EMULATOR = "arm-none-eabi-gcc", "arm-none-eabi-size", "qemu-system-arm"
STARTUP = "startup.c"
INSTALL = "sudo apt-get install gcc-arm-none-eabi qemu-system-arm"
OPTIMIZE = "-O3 -fno-schedule-insns -ffreestanding -ffunction-sections -fdata-sections".split()
LINK = "-nostdlib -Wl,--gc-sections -Wl,--no-warn-rwx-segments".split()
QEMU_TIMEOUT_S, IMAGE_TIMEOUT_S = 60, 1  # and as much for each image
INSTRUCTIONS_A_TICK = 40  # SysTick at the boards' 25 MHz; an instruction is 1 ns of virtual time

# What sets the program counter, as QEMU's disassembler spells it.
CONDITIONS = "eq|ne|hs|lo|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le|al"
BRANCHES = ("cbz", "cbnz", "tbb", "tbh")

# STM32L4R5 at 120 MHz: flash wait states (RM0432, table of wait states for range 1 boost mode) and the
# bytes that one flash access fetches in its dual-bank mode.
FLASH_WAIT_CYCLES, FLASH_LINE_BYTES = 5, 8


class Assumption(NamedTuple):
    """What Arm's table leaves open, and what the flash does."""

    refill: int  # cycles of a taken branch beyond its own: the table says 1 to 3
    divide: int  # cycles of a division: 2 to 12
    pipelined: bool  # a load or store right after another one takes 1 cycle, not 2
    branch_wait: int  # flash wait cycles of a taken branch
    weight_wait: int  # flash wait cycles of each line of weights read


# low: no access ever waits. modelled: instructions come from the ART cache (its 1 KB holds the
# innermost loops), weights wait once a line. high: in addition every taken branch misses the cache.
ASSUMPTIONS = {
    "_low": Assumption(1, 2, True, 0, 0),
    "": Assumption(2, 7, True, 0, FLASH_WAIT_CYCLES),
    "_high": Assumption(3, 12, False, FLASH_WAIT_CYCLES, FLASH_WAIT_CYCLES),
}


class Board(NamedTuple):
    """A machine of QEMU's, with the compiler flags of its processor."""

    machine: str
    linker_script: str
    flags: tuple[str, ...]


M4_FLAGS = ("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16")
M7_FLAGS = ("-mcpu=cortex-m7", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv5-sp-d16")
M4 = Board("mps2-an386", "mps2_an386.ld", M4_FLAGS)
M7 = Board("mps2-an500", "mps2_an500.ld", M7_FLAGS)
STM32F405 = Board("netduinoplus2", "stm32f405.ld", M4_FLAGS)


class NotMeasured(UserError):
    """There is no figure, and the message says why: report "not measured"."""


class NotInstalled(NotMeasured):
    """The cross-compiler or the emulator is missing."""


class DoesNotFit(NotMeasured):
    """The program is larger than the board's memories."""


def require_tools() -> None:
    """Raise NotInstalled, naming the command that installs them, when a tool is missing."""
    missing = [tool for tool in (COMPILER, SIZES, EMULATOR) if shutil.which(tool) is None]
    if missing:
        raise NotInstalled(f"{', '.join(missing)} not installed; {INSTALL}")


def tool_versions() -> dict[str, str]:
    """The first line that the compiler and the emulator say of themselves; raises NotInstalled."""
    require_tools()
    found = {"m4_compiler": COMPILER, "m4_emulator": EMULATOR}
    return {key: first_line([tool, "--version"]) for key, tool in found.items()}


# ---- building and running ----------------------------------------------------------------------


def compile_files(files: list[Path], board: Board, folder: Path) -> list[Path]:
    """Cross-compile C files that may include what lies in `folder`; the object files.

    Raises UserError when the compiler fails.
    """
    command = [COMPILER, *WARNINGS, *board.flags, *OPTIMIZE, ARITHMETIC]
    command += [f"-I{FIRMWARE}", f"-I{folder}", "-c"]
    objects = [folder / f"{file.stem}.o" for file in files]
    for file, made in zip(files, objects, strict=True):
        output_of([*command, str(file), "-o", str(made)], INSTALL)
    return objects


def compile_objects(source: Source, board: Board, folder: Path) -> list[Path]:
    """Cross-compile a generated network, the kernels and the start-up code; the object files."""
    kernels = [FIRMWARE / name for name in (*KERNELS, STARTUP)]
    return compile_files([write_source(source, folder), *kernels], board, folder)


def link(objects: list[Path], board: Board) -> Path:
    """The ELF file of a board, beside its objects. Raises DoesNotFit, or UserError as above."""
    program = objects[0].with_name(f"{board.machine}.elf")
    command = [COMPILER, *board.flags, *LINK, f"-L{FIRMWARE}", "-T"]
    command += [str(FIRMWARE / board.linker_script), *map(str, objects), "-lgcc"]
    try:
        output_of([*command, "-o", str(program)], INSTALL)
    except UserError as error:
        if "will not fit in region" in str(error):
            raise DoesNotFit(f"the program does not fit the emulated {board.machine}") from None
        raise
    return program


def fits(objects: list[Path], board: Board) -> bool:
    """Whether the program links for a board's memories."""
    try:
        link(objects, board)
    except DoesNotFit:
        return False
    return True


def section_bytes(program: Path) -> dict[str, int]:
    """{section name: bytes} of an ELF file."""
    text = output_of([SIZES, "-A", str(program)])
    return {name: int(size) for name, size in re.findall(r"^(\.\w+)\s+(\d+)", text, re.M)}


def write_images(images: torch.Tensor, folder: Path) -> None:
    """int8 images (N, C, H, W) as the file that the start-up code reads."""
    (folder / "images.bin").write_bytes(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


def emulate(
    board: Board, program: Path, images: torch.Tensor, *options: str
) -> subprocess.CompletedProcess:
    """Run a program on images in QEMU, in its own folder; no devices but the processor, and files.

    Raises UserError when it does not end in time.
    """
    write_images(images, program.parent)
    timeout_s = QEMU_TIMEOUT_S + IMAGE_TIMEOUT_S * len(images)
    command = [EMULATOR, "-M", board.machine, "-kernel", str(program), "-display", "none"]
    command += ["-monitor", "none", "-serial", "none"]
    command += ["-semihosting-config", "enable=on,target=native", *options]
    return run_tool(command, hint=INSTALL, timeout_s=timeout_s, folder=program.parent)


def run(board: Board, program: Path, images: torch.Tensor) -> dict:
    """{ticks, stack_bytes, logits (N, classes)} of images on the emulated board.

    ticks: SysTick's count of the first inference. Raises UserError when the program fails or hangs.
    """
    done = emulate(board, program, images, "-icount", "shift=0")
    report = re.search(r"^(\d+) (\d+)$", done.stdout + done.stderr, re.M)
    if done.returncode or report is None:
        words = f"{EMULATOR} {board.machine} ended with {done.returncode}: {complaint(done)}"
        raise UserError(words)
    values = bytearray((program.parent / "logits.bin").read_bytes())
    logits = torch.frombuffer(values, dtype=torch.int8).reshape(len(images), -1)
    return {"ticks": int(report[1]), "stack_bytes": int(report[2]), "logits": logits}


# ---- counting every instruction ----------------------------------------------------------------


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    size: int  # in bytes
    mnemonic: str
    operands: str


Block = list[Instruction]
Layer = list[tuple[Block, int, int]]  # (block, address that ran after it, times)


def read_trace(lines) -> list[Layer]:
    """What ran in the first inference, by layer.

    `lines`: QEMU's log of `-d in_asm,exec,nochain`. A layer ends where the function `infer` goes on
    to the next kernel, the last one with the return to `run`.
    """
    blocks, layers, block = {}, [], []
    seen: dict[str, tuple[int, str]] = {}  # the same block's line is the same text: read it once
    previous, was_infer, kernels = None, False, 0
    for line in lines:
        if line.startswith("0x"):
            words = line[23:].split(None, 1)
            operands = words[1].strip() if len(words) > 1 else ""
            size = 2 * len(line[11:23].split())  # of halfwords, as `f000 f806`
            block.append(Instruction(int(line[:10], 16), size, words[0], operands))
        elif line.startswith("Trace"):
            if line not in seen:
                _, pc, rest = line.split("/", 2)
                seen[line] = int(pc, 16), rest.rpartition(" ")[2].strip()
            if block:
                blocks[block[0].address], block = block, []
            pc, symbol = seen[line]
            is_infer = symbol == "infer"
            if previous is None and not is_infer:
                continue
            if previous is None:
                layers.append(defaultdict(int))
            else:
                layers[-1][previous, pc] += 1
                if symbol == "run":
                    break
                kernels += was_infer and not is_infer
                if kernels > len(layers):
                    layers.append(defaultdict(int))
            previous, was_infer = pc, is_infer
    return [[(blocks[at], after, times) for (at, after), times in x.items()] for x in layers]


def trace(board: Board, program: Path, images: torch.Tensor) -> list[Layer]:
    """read_trace of the first image's inference. Raises UserError when QEMU hangs."""
    log = program.parent / "trace.log"
    done = emulate(board, program, images[:1], "-d", "in_asm,exec,nochain", "-D", str(log))
    if done.returncode or not log.exists():
        words = f"left no log, exit code {done.returncode}: {complaint(done)}"
        raise UserError(f"{EMULATOR} {board.machine} {words}")
    with open(log) as lines:
        return read_trace(lines)


def is_branch(mnemonic: str, operands: str) -> bool:
    """Whether an instruction can set the program counter."""
    name = mnemonic.removesuffix(".w")
    if name in BRANCHES or re.fullmatch(f"(b|bl|bx|blx)({CONDITIONS})?", name):
        return True
    loaded = operands.partition(",")[0] if name.startswith("ldr") else operands.partition("{")[2]
    return name.startswith(("pop", "ldm", "ldr")) and "pc" in loaded


# ---- classes and cycles ------------------------------------------------------------------------


def kind(mnemonic: str, operands: str) -> str:
    """The class of an instruction: branch, load, store, multiply, divide, float or other."""
    if is_branch(mnemonic, operands):
        return "branch"
    if mnemonic.startswith(("ldr", "ldm", "pop", "vldr", "vldm", "vpop")):
        return "load"
    if mnemonic.startswith(("str", "stm", "push", "vstr", "vstm", "vpush")):
        return "store"
    if mnemonic.startswith("v"):
        return "float"
    if mnemonic.startswith(("sdiv", "udiv")):
        return "divide"
    if mnemonic.startswith(("mul", "mla", "mls", "sml", "smu", "smm", "uml", "umu")):
        return "multiply"
    return "other"


def transfers(mnemonic: str, operands: str) -> int | None:
    """Registers that a multiple load or store moves; None for a single one."""
    if mnemonic.startswith(("ldrd", "strd")):
        return 2
    if "{" not in operands:
        return None
    count = 0
    for part in operands[operands.index("{") + 1 : operands.index("}")].split(","):
        first, _, last = part.strip().partition("-")
        count += int(last[1:]) - int(first[1:]) + 1 if last else 1
    return count * (2 if "{d" in operands.replace(" ", "") else 1)


def block_cycles(block: Block, taken: bool, assumption: Assumption) -> int:
    """Cycles of one run of a block with zero-wait memory.

    Source: Arm, Cortex-M4 Technical Reference Manual (DDI 0439; 100166), section 3.3.1 "Table of
    processor instructions", 3.3.2 "Load/store timings", and section 7.2.3, the FPU's table.
    """
    cycles, after_single = 0, False
    for _, _, mnemonic, operands in block:
        what, count = kind(mnemonic, operands), transfers(mnemonic, operands)
        single = what in ("load", "store") and count is None
        if single:
            cycles += 1 if after_single and assumption.pipelined else 2
        elif what in ("load", "store"):
            cycles += 1 + count
        elif what == "branch":
            cycles += 1 + (count or 0)
        elif what == "divide":
            cycles += assumption.divide
        elif mnemonic.startswith(("vmla", "vmls", "vfma", "vfms", "vnml", "vfnm")):
            cycles += 3
        elif mnemonic.startswith(("vdiv", "vsqrt")):
            cycles += 14
        else:
            cycles += 1
        after_single = single
    return cycles + (assumption.refill + assumption.branch_wait if taken else 0)


def was_taken(block: Block, following: int) -> bool:
    """Whether a block ended in a branch that was taken; `following`: the block that ran next."""
    address, size, mnemonic, operands = block[-1]
    return is_branch(mnemonic, operands) and following != address + size


def instruction_classes(layer: Layer) -> Counter:
    """{class: instructions executed} of one layer; branches are told apart by whether taken."""
    classes = Counter()
    for block, following, times in layer:
        for _, _, mnemonic, operands in block[:-1]:
            classes[kind(mnemonic, operands)] += times
        what = kind(block[-1].mnemonic, block[-1].operands)
        if what == "branch":
            what += "_taken" if was_taken(block, following) else "_not_taken"
        classes[what] += times
    return classes


def layer_cycles(layer: Layer, assumption: Assumption) -> int:
    """Cycles of one layer with its weights at hand."""
    return sum(
        times * block_cycles(block, was_taken(block, following), assumption)
        for block, following, times in layer
    )


# ---- one variant -------------------------------------------------------------------------------


def count_layers(board: Board, program: Path, images: torch.Tensor) -> tuple[dict, list[Layer]]:
    """(run's result, trace's layers), which must agree on the instructions of the first inference.

    Raises UserError when they do not: then this QEMU's log or its clock cannot be relied on.
    """
    ran, layers = run(board, program, images), trace(board, program, images)
    logged = sum(times * len(block) for layer in layers for block, _, times in layer)
    clocked = INSTRUCTIONS_A_TICK * ran["ticks"]
    # SysTick counts whole ticks, and a few instructions around the call.
    if abs(logged - clocked) > 2 * INSTRUCTIONS_A_TICK:
        raise UserError(
            f"{EMULATOR}'s log has {logged:,} instructions and its clock {clocked:,}; "
            "use a QEMU whose two counts agree, such as 7.2"
        )
    return ran, layers


def instructions_by_node(source: Source, layers: list[Layer]) -> dict[str, int]:
    """{user's node: instructions}: a node may take several calls; the last call turns the logits."""
    nodes = [step.node for step in source.plan.steps]
    counts = dict.fromkeys(nodes, 0)
    for node, layer in zip([*nodes, nodes[-1]], layers, strict=True):
        counts[node] += sum(times * len(block) for block, _, times in layer)
    return counts


def cortex_m_row(checkpoint: dict, images: torch.Tensor, storage: str = "balanced") -> dict:
    """The plain keys of one variant: Cortex-M4 measured, its cycles modelled, M7 counted.

    images: int8 (N, C, H, W) as the network takes them; the first one's inference is counted. The
    logits of all are in `m4_logits`, for the host's to be compared with; the M7's count is to within
    a tick of 40. Raises NotMeasured where a tool is missing or the program is larger than the board,
    UserError where a tool fails or hangs, and where the M7 gives another logit.
    """
    require_tools()
    source = c_source(checkpoint, storage)
    with tempfile.TemporaryDirectory() as folder:
        objects = compile_objects(source, M4, Path(folder))
        program = link(objects, M4)
        sizes = section_bytes(program)
        ran, layers = count_layers(M4, program, images)
        on_stm32f405 = fits(objects, STM32F405)
        m7 = link(compile_objects(source, M7, Path(folder)), M7)
        m7_ran = run(M7, m7, images[:1])
    if not torch.equal(m7_ran["logits"], ran["logits"][:1]):
        raise UserError("the emulated Cortex-M7 gives other logits than the M4; check the compiler")
    counts = instructions_by_node(source, layers)
    row = {
        "m4_instructions": sum(counts.values()),
        "m4_instructions_per_layer": counts,
        "m4_instructions_by_class": dict(sum(map(instruction_classes, layers), Counter())),
        "m4_kernels": {step.node: step.kernel for step in source.plan.steps},
        "m4_flash_bytes": sizes[".text"] + sizes[".data"],
        "m4_ram_bytes": sizes[".data"] + sizes[".bss"] + ran["stack_bytes"],
        "m7_instructions": INSTRUCTIONS_A_TICK * m7_ran["ticks"],
        "stm32f405_fits": on_stm32f405,
    }
    reads = [step.weight_bytes_read for step in source.plan.steps]
    lines = sum(-(-read // FLASH_LINE_BYTES) for read in reads)
    for suffix, assumption in ASSUMPTIONS.items():
        cycles = sum(layer_cycles(layer, assumption) for layer in layers)
        cycles += lines * assumption.weight_wait
        row[f"m4_cycles_modelled{suffix}"] = cycles
    return row | tool_versions() | {"m4_logits": ran["logits"].tolist()}

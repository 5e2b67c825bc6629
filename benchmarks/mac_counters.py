"""How fast and how right mac_hooks.py counts, beside other counters of MACs.

Reads   nothing
Writes  results/mac_counters.json  results/mac_counters.md

    pip install fvcore ptflops thop torchinfo     # the peers; those not installed are left out
    python benchmarks/mac_counters.py             # about 10 minutes on two cores
    python benchmarks/mac_counters.py --smoke     # seconds: one small model, results/smoke/

Speed: processor time of this process (all its threads), the counters in turn, round after round, so
that a change of the machine's speed meets all of them; medians, and ratios taken round by round. The
plain forward is what a count cannot be faster than on real weights.

Figures: what each counter returns for networks whose MACs follow from a few lines of arithmetic, or
are published. FlopCounterMode counts 2 a MAC; its figure is halved. Others count normalisation, biases
or activation functions too: their differences are those of convention and those of what is not seen.
"""

import contextlib
import gc
import importlib.metadata
import io
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from edgecnn.cells import markdown_table
from edgecnn.checkpoint import COMMIT
from edgecnn.cli import Parser, run_folder, run_name
from edgecnn.errors import user_errors_exit_2
from edgecnn.files import json_bytes, require_writable, write_files
from edgecnn.names import results_dir
from edgecnn.train import environment
from mac_hooks import count_macs

ROUNDS = 9
TIMED = ("resnet50", "vit_b_16", "mobilenet_v3_large")
DEVICES = {"cpu": None, "meta": ("plain_forward", "FlopCounterMode", "mac_hooks")}
IMAGE = (3, 224, 224)


# ---- the counters: (model in eval mode, one example without the batch) -> MACs --------------------


def plain_forward(model: nn.Module, size: tuple[int, ...]) -> float:
    model(example(model, size))
    return math.nan


def flop_counter_mode(model: nn.Module, size: tuple[int, ...]) -> float:
    with FlopCounterMode(display=False) as counter:
        model(example(model, size))
    return counter.get_total_flops() / 2


def mac_hooks(model: nn.Module, size: tuple[int, ...]) -> float:
    return count_macs(model, example_inputs=example(model, size)).total_macs


def fvcore(model: nn.Module, size: tuple[int, ...]) -> float:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, example(model, size))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def ptflops(model: nn.Module, size: tuple[int, ...]) -> float:
    from ptflops import get_model_complexity_info

    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
    return get_model_complexity_info(model, size, **options)[0]


def thop(model: nn.Module, size: tuple[int, ...]) -> float:
    from thop import profile

    return profile(model, inputs=(example(model, size),), verbose=False)[0]


def torchinfo(model: nn.Module, size: tuple[int, ...]) -> float:
    from torchinfo import summary

    return summary(model, input_data=example(model, size), verbose=0).total_mult_adds


PEERS = (fvcore, ptflops, thop, torchinfo)


def example(model: nn.Module, size: tuple[int, ...]) -> torch.Tensor:
    """A batch of one example of zeros."""
    device = next((p.device for p in model.parameters()), "cpu")
    return torch.zeros(1, *size, device=device)


def counters() -> dict[str, Callable]:
    """The counters that are installed, by the name of their row."""
    functions = {"plain_forward": plain_forward, "FlopCounterMode": flop_counter_mode}
    functions["mac_hooks"] = mac_hooks
    for peer in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(peer.__name__)
            functions[peer.__name__] = peer
    return functions


def quietly(counter: Callable, model: nn.Module, size: tuple[int, ...]) -> float:
    """A counter's figure, without what it prints and warns of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return counter(model, size)


# ---- speed ----------------------------------------------------------------------------------------


def timings(name: str, device: str, chosen: dict[str, Callable], rounds: int) -> list[dict]:
    """A row a counter: median milliseconds of processor time, and its ratio to FlopCounterMode."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval().to(device)
    spent: dict[str, list[float]] = {counter: [] for counter in chosen}
    for index in range(rounds + 1):  # the first one warms up
        for counter, function in chosen.items():
            gc.collect()
            start = time.process_time()
            quietly(function, model, IMAGE)
            if index:
                spent[counter].append(time.process_time() - start)
    reference = spent["FlopCounterMode"]
    return [
        {
            "model": name,
            "device": device,
            "counter": counter,
            "cpu_ms": 1e3 * statistics.median(seconds),
            "ratio_to_flop_counter_mode": statistics.median(
                own / other for own, other in zip(seconds, reference, strict=True)
            ),
        }
        for counter, seconds in spent.items()
    ]


# ---- figures --------------------------------------------------------------------------------------


class Function(nn.Module):
    """Two layers called as functions on parameters of the module's own."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32, 3, 3))
        self.v = nn.Parameter(torch.randn(64, 10))

    def forward(self, x):
        return torch.relu(nn.functional.conv2d(x, self.w)).mean(dim=(2, 3)) @ self.v


def encoder_macs(length: int, width: int, hidden: int) -> int:
    """One layer of a transformer's encoder: projections, two products of activations, the MLP."""
    return length * (4 * width * width + 2 * width * hidden) + 2 * length * length * width


def cases() -> dict[str, tuple]:
    """name -> (how to make it, size of an example, MACs, where that figure is from)."""
    vit = 196 * 768 * 3 * 256 + 12 * encoder_macs(197, 768, 3072) + 768 * 1000
    table = {
        "transposed convolution 64->32, 4x4, stride 2": (
            lambda: nn.ConvTranspose2d(64, 32, 4, stride=2),
            (64, 16, 16),
            64 * 32 * 16 * 16 * 16,
        ),
        "convolution and product as functions": (Function, (32, 10, 10), 64 * 32 * 9 * 64 + 640),
        "LSTM 128->256, 2 layers, 50 steps": (
            lambda: nn.LSTM(128, 256, 2, batch_first=True),
            (50, 128),
            50 * 4 * 256 * (128 + 256 + 256 + 256),
        ),
        "GRU 128->256, 50 steps": (
            lambda: nn.GRU(128, 256, batch_first=True),
            (50, 128),
            50 * 3 * 256 * (128 + 256),
        ),
        "transformer encoder layer 512, 100 tokens": (
            lambda: nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True),
            (100, 512),
            encoder_macs(100, 512, 2048),
        ),
        "vit_b_16": (lambda: models.get_model("vit_b_16"), IMAGE, vit),
    }
    rows = {name: (*case, "arithmetic") for name, case in table.items()}
    for name in ("resnet50", "mobilenet_v3_large", "swin_t", "efficientnet_b0"):
        published = models.get_model_weights(name).DEFAULT.meta["_ops"] * 1e9
        make = lambda name=name: models.get_model(name)  # noqa: E731
        rows[name] = (make, IMAGE, round(published), "published, three decimals of 1e9")
    return rows


def figures(names: list[str], chosen: dict[str, Callable]) -> list[dict]:
    """A row a case and counter: its figure or its error, and how far it is from what is right."""
    rows = []
    for name in names:
        make, size, expected, source = cases()[name]
        for counter, function in chosen.items():
            if function is plain_forward:
                continue
            torch.manual_seed(0)
            row = {"case": name, "counter": counter, "macs_expected": expected, "source": source}
            row |= {"macs": None, "difference_percent": None, "error": None}
            try:
                macs = quietly(function, make().eval(), size)
                row["macs"] = macs
                row["difference_percent"] = 100 * (macs / expected - 1)
            except Exception as error:  # a peer may fail in any way; the table says so
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            rows.append(row)
    return rows


def table(rows: list[dict], title: str, key: str, value: Callable[[dict], str]) -> str:
    """Rows as a Markdown table: a line for each `key`, a column for each counter but the forward."""
    rows = [row for row in rows if row["counter"] != "plain_forward"]
    columns = list(dict.fromkeys(row["counter"] for row in rows))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row[key], {})[row["counter"]] = value(row)
    lines = [[name, *(line.get(c, "-") for c in columns)] for name, line in cells.items()]
    return markdown_table([title, *columns], lines)


def tables(result: dict) -> str:
    """mac_counters.md: times, then differences from the right figure."""
    speed = [r | {"model": f"{r['model']}, {r['device']}"} for r in result["speed"]]
    show = "{cpu_ms:.0f} ({ratio_to_flop_counter_mode:.2f})"
    times = table(speed, "Processor time, ms", "model", lambda row: show.format(**row))
    percent = "{difference_percent:+.2f}"
    differ = table(
        result["figures"],
        "Difference, %",
        "case",
        lambda row: "failed" if row["error"] else percent.format(**row),
    )
    return f"{times}\n\n{differ}\n"


@user_errors_exit_2
def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "--run", type=run_folder, default="", metavar="NAME", help="write to results/NAME/"
    )
    parser.add_argument("--smoke", action="store_true", help="one small model, seconds")
    args = parser.parse_args()
    folder = results_dir(run_name(args))
    require_writable(folder)
    chosen = counters()
    timed, speed = ("mobilenet_v3_small",) if args.smoke else TIMED, []
    for name in timed:
        for device, only in DEVICES.items():
            used = {k: f for k, f in chosen.items() if only is None or k in only}
            speed += timings(name, device, used, 1 if args.smoke else ROUNDS)
    counted = figures(list(cases())[: 2 if args.smoke else None], chosen)
    result = {
        "speed": speed,
        "figures": counted,
        "rounds": 1 if args.smoke else ROUNDS,
        "versions": {
            name: importlib.metadata.version(name)
            for name in (p.__name__ for p in PEERS)
            if name in chosen
        },
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **environment(torch.device("cpu")),
        "commit": COMMIT,
    }
    path = folder / "mac_counters.json"
    write_files({path: json_bytes(result), path.with_suffix(".md"): tables(result).encode()})
    print(tables(result))
    print(f"wrote {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()

"""How fast the pipeline trains: against the ordinary tutorial loop and against the machine itself.

Reads   data/ (the 50,000 training images)
Writes  results/training_speed.json

    python benchmarks/training_speed.py           # about 12 minutes; leave the machine alone meanwhile
    python benchmarks/training_speed.py --smoke   # seconds, on the small sample: figures mean nothing

Every figure is taken in a process of its own, the contestants in turn, round after round, so that a
change of the machine's speed meets all of them. The tutorial loop is a DataLoader over PIL images with
per-sample torchvision transforms (zero-padded crop, flip, normalization), NCHW, and its best
num_workers of 0 to 2; same network, same batch.
"""

import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from edgecnn.capture import capture
from edgecnn.cli import Parser, add_run_arguments, run_name
from edgecnn.data import crop_padding, load_training
from edgecnn.dataset import CIFAR10
from edgecnn.errors import user_errors_exit_2
from edgecnn.files import write_json
from edgecnn.module import module_of
from edgecnn.names import results_dir
from edgecnn.networks import EdgeCNN
from edgecnn.step import COMMIT
from edgecnn.train import (
    BASELINE_RECIPE,
    LABEL_SMOOTHING,
    MOMENTUM,
    WEIGHT_DECAY,
    Recipe,
    environment,
    fit,
)
from mac_hooks import count_macs

ROUNDS = 3
TIMED_BATCHES = 50  # a contestant and round, after WARM_UP_BATCHES
WARM_UP_BATCHES = 10
WORKERS = (0, 1, 2)  # what the tutorial loop may choose from
MATRIX = 2048  # edge of the square FP32 product that gives the machine's own rate
TARGET_PERCENT = 78.73  # the original project's baseline accuracy
SCHEDULES = (3, 4, 5, 6, 8)  # epochs, tried from the shortest
# An image: 2 a MAC, for the forward pass, the gradient of inputs and the gradient of weights.
TRAINING_FLOPS = 6 * count_macs(EdgeCNN(), CIFAR10.shape).macs


def recipe(epochs: int) -> Recipe:
    """The baseline's recipe over another number of epochs."""
    rate, batch = BASELINE_RECIPE["learning_rate"], BASELINE_RECIPE["batch_size"]
    return Recipe(epochs, batch, rate, seed=0, start="benchmark")


def matrix_flops_per_s() -> float:
    """Median rate of a MATRIX^3 FP32 product in this process."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / statistics.median(seconds[2:])


def pipeline_images_per_s(data_dir: str, smoke: bool) -> float:
    """The pipeline's own loop, augmentation included, after a warm-up epoch of a few batches."""
    _, (images, labels), _ = load_training("sample" if smoke else "cifar10", data_dir)
    batch = BASELINE_RECIPE["batch_size"]
    count = min(TIMED_BATCHES * batch, len(labels))
    torch.manual_seed(0)
    model = module_of(*capture(EdgeCNN(), CIFAR10.shape))
    warm_up = min(WARM_UP_BATCHES * batch, len(labels))
    fit(model, (images[:warm_up], labels[:warm_up]), CIFAR10, recipe(1), torch.device("cpu"))
    (row,) = fit(model, (images[:count], labels[:count]), CIFAR10, recipe(1), torch.device("cpu"))
    return count // batch * batch / row["seconds"]


class Pictures(Dataset):
    """PIL images transformed one by one, as torchvision's CIFAR10 gives them."""

    def __init__(self, images, labels):
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels.tolist()
        padding = crop_padding(CIFAR10)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=padding),  # reflecting is slow on PIL images
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR10.mean, CIFAR10.std),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def tutorial_network() -> nn.Sequential:
    """The same network as a tutorial writes it: Conv -> BN -> ReLU -> MaxPool."""
    layers = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, *head)


def tutorial_images_per_s(data_dir: str, smoke: bool, workers: int) -> float:
    """The tutorial loop over the same images, batch, loss and optimizer settings."""
    _, (images, labels), _ = load_training("sample" if smoke else "cifar10", data_dir)
    batch = BASELINE_RECIPE["batch_size"]
    loader = DataLoader(
        Pictures(images, labels), batch, shuffle=True, drop_last=True, num_workers=workers
    )
    model = tutorial_network()
    optimizer = torch.optim.SGD(
        model.parameters(),
        BASELINE_RECIPE["learning_rate"],
        MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
    )
    last = min(WARM_UP_BATCHES + TIMED_BATCHES, len(loader))
    warm_up = min(WARM_UP_BATCHES, last - 1)
    start = time.perf_counter()
    for step, (inputs, targets) in enumerate(loader):
        if step == last:
            break
        if step == warm_up:
            start = time.perf_counter()
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (last - warm_up) * batch / (time.perf_counter() - start)


def time_to_target(data_dir: str) -> list[dict]:
    """Schedules from the shortest up to the first whose end reaches the target on the holdout."""
    _, train, validation = load_training("cifar10", data_dir, holdout=True)
    tried = []
    for epochs in SCHEDULES:
        torch.manual_seed(0)
        start = time.perf_counter()
        model = module_of(*capture(EdgeCNN(), CIFAR10.shape))
        history = fit(model, train, CIFAR10, recipe(epochs), torch.device("cpu"), validation)
        accuracy = history[-1]["validation_accuracy_percent"]
        seconds = time.perf_counter() - start
        tried.append(
            {"epochs": epochs, "validation_accuracy_percent": accuracy, "seconds": seconds}
        )
        if accuracy >= TARGET_PERCENT:
            break
    return tried


def in_a_fresh_process(function, *arguments):
    """Run a measurement where nothing of the others is left, such as their allocator settings."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_rounds(data_dir: str, smoke: bool, rounds: int) -> list[dict]:
    """One flat row a round: every contestant once."""
    measured = []
    for index in range(rounds):
        row = {
            "matrix_gflops_per_s": in_a_fresh_process(matrix_flops_per_s) / 1e9,
            "pipeline_images_per_s": in_a_fresh_process(pipeline_images_per_s, data_dir, smoke),
        }
        for workers in () if smoke else WORKERS:
            key = f"tutorial_{workers}_workers_images_per_s"
            row[key] = in_a_fresh_process(tutorial_images_per_s, data_dir, smoke, workers)
        print(f"round {index + 1}/{rounds}", {key: round(value) for key, value in row.items()})
        measured.append(row)
    return measured


def summarize(rounds: list[dict]) -> dict:
    """Medians, and the ratios taken round by round before their median."""
    summary = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    tutorials = [key for key in summary if key.startswith("tutorial")]
    if tutorials:
        best = max(tutorials, key=summary.get)
        ratios = [row["pipeline_images_per_s"] / row[best] for row in rounds]
        summary |= {"tutorial_best": best, "speedup_over_tutorial": statistics.median(ratios)}
    shares = [
        100 * row["pipeline_images_per_s"] * TRAINING_FLOPS / (row["matrix_gflops_per_s"] * 1e9)
        for row in rounds
    ]
    return summary | {"share_of_matrix_rate_percent": statistics.median(shares)}


@user_errors_exit_2
def main():
    parser = Parser(__doc__)
    add_run_arguments(parser)
    args = parser.parse_args()
    rounds = measure_rounds(args.data_dir, args.smoke, 1 if args.smoke else ROUNDS)
    result = {
        "summary": summarize(rounds),
        "rounds": rounds,
        "time_to_target": [] if args.smoke else time_to_target(args.data_dir),
        "target_validation_accuracy_percent": TARGET_PERCENT,
        "batch_size": BASELINE_RECIPE["batch_size"],
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **environment(torch.device("cpu")),
        "commit": COMMIT,
    }
    path = results_dir(run_name(args)) / "training_speed.json"
    write_json(path, result)
    for key, value in result["summary"].items():
        print(f"{key:40} {value if isinstance(value, str) else f'{value:,.2f}'}")
    for row in result["time_to_target"]:
        print(
            f"{row['epochs']} epochs: {row['validation_accuracy_percent']:.2f} % validation "
            f"in {row['seconds']:.0f} s"
        )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""What each part of the headline recipe adds, on the validation split: a trial a row, one part each.

Reads   data/ (45,000 training images; accuracy is that of the other 5,000, never the test set)
Writes  checkpoints/ablation/<trial>.pt  results/ablation/<trial>.json  results/ablation/table.md

    python benchmarks/ablation.py                  # every trial, in order; finished ones are kept
    python benchmarks/ablation.py --seed 1 one_shot_90 distilled_90
    python benchmarks/ablation.py --smoke          # a minute, on a small real sample

A pruned trial starts from the one that it names; the dense one teaches. `averaged` is the same run
seen through a moving average of its weights and BN statistics, tracked beside it.
"""

import functools
import re
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgecnn.capture import capture
from edgecnn.cells import markdown_table
from edgecnn.cli import SMOKE_EPOCHS, Parser, add_force_argument, data_source, seed
from edgecnn.data import load_training
from edgecnn.dataset import CIFAR10
from edgecnn.errors import UserError, user_errors_exit_2
from edgecnn.files import read_record, write_text
from edgecnn.module import module_of
from edgecnn.names import checkpoints_dir, results_dir
from edgecnn.networks import EdgeCNN
from edgecnn.pruning import hold_zeros, layer_sparsity_percent, prune_globally
from edgecnn.step import Step, variant_step
from edgecnn.torch_files import read_torch, torch_bytes
from edgecnn.train import (
    WEIGHT_DECAY,
    Recipe,
    accuracy_percent,
    environment,
    fit,
    pick_device,
)
from mac_hooks import count_macs

RUN = "ablation"
BATCH_SIZE = 256
# Of a trial's JSON, what its table shows.
READ = dict.fromkeys(("trial", "seed", "history", "averaged_validation_accuracy_percent"))
READ |= {"validation_accuracy_percent": (0, 100), "macs_nonzero": (0, 1e15)}
DECAYS = (0.99, 0.998)  # of the moving averages, a step: horizons of 100 and 500 steps


@dataclass(frozen=True)
class Trial:
    """A training run; what differs from the row it is held against is the part on trial."""

    epochs: int
    learning_rate: float  # the peak
    parent: str | None = None  # the trial that is pruned
    sparsity: float = 0.0
    criterion: str = "energy"
    distillation: float = 0.0
    weight_decay: float = WEIGHT_DECAY
    against: str | None = None


TEACHER = "dense_30"
DENSE = Trial(30, 0.2)
PRUNED = Trial(8, 0.1, TEACHER, 0.9)
DISTILLED = replace(PRUNED, distillation=0.7, against="one_shot_90")
LATER = replace(DISTILLED, against="distilled_90")
TRIALS = {
    "dense_30": DENSE,
    "one_shot_90": PRUNED,
    "distilled_90": DISTILLED,
    "distilled_90_slow": replace(LATER, learning_rate=0.05),
    "distilled_90_decay": replace(LATER, weight_decay=1e-4),
    "distilled_95": replace(DISTILLED, parent="distilled_90", sparsity=0.95, against=None),
}


def moving_average(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of weights and BN statistics, from the first update on."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def name_of(trial: str, seed: int) -> str:
    """A trial's file name, without its ending."""
    return f"{trial}_seed{seed}" if seed else trial


def is_of(path: Path, trial: str) -> bool:
    """Whether a file is that trial's, of whatever seed: another's name may begin alike."""
    return re.fullmatch(rf"{trial}(_seed\d+)?", path.stem) is not None


def network() -> torch.nn.Module:
    """The first network with random weights, as every step trains it."""
    return module_of(*capture(EdgeCNN(), CIFAR10.shape))


def load_trial(name: str, seed: int, run: str) -> torch.nn.Module:
    """The network that a trial left; raises UserError where it is missing."""
    path = checkpoints_dir(run) / f"{name_of(name, seed)}.pt"
    if not path.exists():
        raise UserError(
            f"{path} is missing; make it with: benchmarks/ablation.py {name} --seed {seed} --force"
        )
    model = network()
    try:
        model.load_state_dict(read_torch(path))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path} holds no trial's weights; delete it and its JSON") from None
    return model


def train_trial(model, teacher, trial: Trial, seed: int, data, device) -> tuple[list[dict], dict]:
    """Train `model` in place; its history, and the validation accuracy of its averages by decay."""
    dataset, train, validation = data
    masks = prune_globally(model, trial.sparsity, trial.criterion)
    averages = {decay: moving_average(model, decay) for decay in DECAYS}

    def after_step():
        hold_zeros(model, masks)
        for average in averages.values():
            average.update_parameters(model)

    parts = trial.epochs, BATCH_SIZE, trial.learning_rate, seed, trial.parent or "random weights"
    recipe = Recipe(*parts, weight_decay=trial.weight_decay, distillation=trial.distillation)
    rest = {"after_step": after_step, "teacher": teacher}
    history = fit(model, train, dataset, recipe, device, validation, **rest)
    averaged = {}
    for decay, average in averages.items():
        averaged[str(decay)] = accuracy_percent(average.module, validation, dataset, device)
    return history, averaged


def trial_step(name: str, trial: Trial, seed: int, run: str, force: bool) -> Step:
    """The step of one row: from its parent's weights, and with distillation the teacher's."""
    arguments = {key: value for key, value in asdict(trial).items() if key != "against"}
    needed = {trial.parent, TEACHER if trial.distillation else None} - {None}
    parents = [checkpoints_dir(run) / f"{name_of(other, seed)}.pt" for other in sorted(needed)]
    script = "benchmarks/ablation.py"
    return variant_step(run, name_of(name, seed), script, arguments, parents, force)


def run_trial(step: Step, name: str, trial: Trial, seed: int, run: str, data, device) -> None:
    """Train a row; write its weights and its JSON."""
    torch.manual_seed(seed)
    model = load_trial(trial.parent, seed, run) if trial.parent else network()
    teacher = load_trial(TEACHER, seed, run).eval() if trial.distillation else None
    history, averaged = train_trial(model, teacher, trial, seed, data, device)
    result = {
        "trial": name,
        "seed": seed,
        **asdict(trial),
        "validation_accuracy_percent": history[-1]["validation_accuracy_percent"],
        "averaged_validation_accuracy_percent": averaged,
        "macs_nonzero": count_macs(model, data[0].shape).nonzero_macs,
        "layer_sparsity_percent": layer_sparsity_percent(model),
        **environment(device),
        "history": history,
    }
    step.commit({step.outputs[0]: torch_bytes(model.state_dict())}, result)


def part(trial: Trial) -> str:
    """What a trial changes of the one it is held against, as `distillation 0.7 for 0`; or a dash."""
    if not trial.against:
        return "-"
    other = TRIALS[trial.against]
    names = [field.name for field in fields(Trial) if field.name != "against"]
    pairs = {name: (getattr(trial, name), getattr(other, name)) for name in names}
    changes = [
        f"{n} {ours:g} for {theirs:g}" for n, (ours, theirs) in pairs.items() if ours != theirs
    ]
    return ", ".join(changes).replace("_", " ")


def table(results: list[dict]) -> str:
    """A line a trial, in the order of TRIALS: every seed's accuracy, and the change on the same seed."""
    found = {(r["trial"], r["seed"]): r for r in results}

    def accuracy(name: str, seed: int) -> float:
        return found[name, seed]["validation_accuracy_percent"]

    lines = []
    for name, trial in TRIALS.items():
        seeds = sorted(seed for other, seed in found if other == name)
        runs = [found[name, seed] for seed in seeds]
        if not runs:
            continue
        both = [seed for seed in seeds if (trial.against, seed) in found]
        changes = [accuracy(name, seed) - accuracy(trial.against, seed) for seed in both]
        averaged = [
            statistics.mean(
                run["averaged_validation_accuracy_percent"][str(decay)]
                - run["validation_accuracy_percent"]
                for run in runs
            )
            for decay in DECAYS
        ]
        lines.append(
            [
                *(name, trial.against or "-", part(trial), str(len(runs[0]["history"]))),
                ", ".join(f"{accuracy(name, seed):.2f}" for seed in seeds),
                ", ".join(f"{change:+.2f}" for change in changes) or "-",
                " / ".join(f"{change:+.2f}" for change in averaged),
            ]
        )
    header = "Trial;Against;Part on trial;Epochs;Accuracy %, a seed;Change, points, a seed;".split(
        ";"
    )
    header[-1] = f"Averaged weights, decay {' / '.join(map(str, DECAYS))}: change"
    return markdown_table(header, lines) + "\n"


@user_errors_exit_2
def main():
    parser = Parser(__doc__)
    parser.add_argument(
        "trials",
        nargs="*",
        choices=[[], *TRIALS],
        metavar="TRIAL",
        help=f"any of {', '.join(TRIALS)} (default: all)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="(default: 0)")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="(default: data)")
    parser.add_argument("--smoke", action="store_true", help="two epochs on the small sample")
    add_force_argument(parser)
    args = parser.parse_args()
    device, run = pick_device("auto"), f"{RUN}_smoke" if args.smoke else RUN
    load = functools.cache(lambda: load_training(data_source(args), args.data_dir, holdout=True))
    for name in args.trials or TRIALS:
        trial = replace(TRIALS[name], epochs=SMOKE_EPOCHS) if args.smoke else TRIALS[name]
        step = trial_step(name, trial, args.seed, run, args.force)
        if not step.kept():
            run_trial(step, name, trial, args.seed, run, load(), device)
    paths = [p for n in TRIALS for p in results_dir(run).glob(f"{n}*.json") if is_of(p, n)]
    results = [read_record(path, "this script", READ) for path in paths]
    text = table(sorted(results, key=lambda result: result["seed"]))
    write_text(results_dir(run) / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()

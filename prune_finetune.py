"""Step 3: global unstructured magnitude pruning, then fine-tuning with the zeros held.

Reads   an FP32 checkpoint (default checkpoints/baseline_fp32.pt), the training images
Writes  checkpoints/pruned_<percent>_fp32.pt  results/pruned_<percent>_fp32.json, a pair a level
        (control_fp32 with --sparsity 0: the same fine-tuning without pruning)

    python prune_finetune.py                            # 50 % zeros, 4 minutes on two CPU cores
    python prune_finetune.py --sparsity 0.5 0.7 0.8 0.9 # gradually: each level from the last one
    python prune_finetune.py --criterion l1             # plain global L1: most zeros fall in fc1
    python prune_finetune.py --sparsity 0               # the dense control of equal effort
    python prune_finetune.py --headline                 # longer, and taught by the run's baseline
    python prune_finetune.py --smoke                    # seconds; reads checkpoints/smoke/

Zeros save storage, and energy only on hardware that skips them; dense kernels multiply them.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune

from edgecnn.checkpoint import (
    fp32_model,
    fp32_tensors,
    load_checkpoint,
    parent_fields,
    provenance,
    publish,
    require_unseen_holdout,
    sha256,
)
from edgecnn.cli import Parser, data_source, parse_training_arguments, run_name, sparsity
from edgecnn.data import load_training
from edgecnn.files import (
    DEFAULT_CRITERION,
    UserError,
    checkpoints_dir,
    require_writable,
    results_dir,
    user_errors_exit_2,
    variant_name,
)
from edgecnn.model import IMAGE_SHAPE, fold_batch_norm, weight_layers
from edgecnn.train import WEIGHT_DECAY, Recipe, environment, fit, pick_device
from mac_hooks import count_macs, weight_energy_pj

# The fine-tuning recipe, settled with --holdout; distillation is the teacher's share of the loss.
RECIPE = {"epochs": 5, "batch_size": 256, "learning_rate": 0.1}
RECIPE |= {"weight_decay": WEIGHT_DECAY, "distillation": 0.0}
# Teacher and weight decay were tried in benchmarks/ablation.py, at 8 epochs; 15 were not tried.
HEADLINE_RECIPE = RECIPE | {"epochs": 15, "weight_decay": 1e-4, "distillation": 0.7}
SPARSITY = 0.5
CRITERIA = ("l1", "l1-normalized", "lamp", "energy")
DEPLOYED_BITS = 8  # the width at which the energy criterion prices a weight
# The arguments that decide a level's weights, besides its parent's.
DECISIVE = (
    *("sparsity", "criterion", "epochs", "batch_size", "learning_rate", "weight_decay"),
    *("distillation", "seed", "holdout"),
)


# ---- masks -------------------------------------------------------------------------------------


def lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    """Each weight's square over the sum of its own and all larger squares of the layer, in [0, 1].

    Removing in rising order, that is the share of the layer's remaining squared norm which goes.
    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021.
    """
    squares = weight.detach().double().square().flatten()
    order = squares.argsort(stable=True)
    remaining = squares[order].flip(0).cumsum(0).flip(0)
    scores = torch.zeros_like(squares)
    scores[order] = (squares[order] / remaining).nan_to_num(0.0)  # 0 / 0 where all are zero
    return scores.view_as(weight)


def importance(weight: torch.Tensor, criterion: str, energy_pj: float = 1.0) -> torch.Tensor:
    """Scores of a layer's weights, same shape; the lowest of all layers are pruned, zeros first.

    l1: magnitude. l1-normalized: the magnitude's rank within its layer, in (0, 1], so that one
    global threshold takes the same share of every layer and MACs fall along with weights.
    lamp: lamp_scores. energy: lamp_scores per picojoule that the weight's removal saves
    (`energy_pj`), so that of two equally dispensable weights the dearer one goes first. Yang et
    al., CVPR 2017, prune whole layers in the order of their energy; here each weight has a price.
    """
    magnitude = weight.detach().abs()
    if criterion == "l1":
        return magnitude
    if criterion == "l1-normalized":
        ranks = torch.empty(magnitude.numel(), dtype=torch.float64)
        ranks[magnitude.flatten().argsort(stable=True)] = torch.arange(
            1, magnitude.numel() + 1, dtype=torch.float64
        )
        scores = (ranks / magnitude.numel()).view_as(weight)
        return scores.masked_fill(magnitude == 0, 0.0)  # what an earlier level took stays taken
    return lamp_scores(weight) / (energy_pj if criterion == "energy" else 1.0)


def layer_energy_pj(model: nn.Module) -> dict[str, float]:
    """What one weight costs an inference, by layer: its MACs and its fetch, weights in SRAM."""
    rows = {row.name: row for row in count_macs(model, IMAGE_SHAPE).layers}
    return {
        name: weight_energy_pj(rows[name].macs // layer.weight.numel(), DEPLOYED_BITS)
        for name, layer in weight_layers(model).items()
    }


def prune_globally(model: nn.Module, sparsity: float, criterion: str) -> dict[str, torch.Tensor]:
    """Zero the given share of all weights (biases and BN excluded), exact to one weight.

    Returns the masks by layer: bool, True where a weight is kept. Weights that are zero already go
    first, so a mask only shrinks. Raises UserError when more of them are zero than asked for.
    """
    layers, prices = weight_layers(model), layer_energy_pj(model)
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    count = sum(layer.weight.numel() for layer in layers.values())
    if zeros > round(sparsity * count):
        raise UserError(
            f"{100 * zeros / count:.2f} % of the weights are zero already; "
            f"give a --sparsity above that, or a --checkpoint with fewer zeros"
        )
    prune.global_unstructured(
        [(layer, "weight") for layer in layers.values()],
        prune.L1Unstructured,
        importance_scores={
            (layer, "weight"): importance(layer.weight, criterion, prices[name])
            for name, layer in layers.items()
        },
        amount=sparsity,
    )
    masks = {name: layer.weight_mask.bool() for name, layer in layers.items()}
    for layer in layers.values():
        prune.remove(layer, "weight")
    hold_zeros(model, masks)
    return masks


@torch.no_grad()
def hold_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Set every masked weight to +0.0 (a product with the mask could leave -0.0)."""
    for name, layer in weight_layers(model).items():
        layer.weight.masked_fill_(~masks[name], 0.0)


def layer_sparsity_percent(model: nn.Module) -> dict[str, float]:
    """Zeros in percent, for each layer that owns MACs."""
    return {
        name: 100 * (layer.weight == 0).double().mean().item()
        for name, layer in weight_layers(model).items()
    }


# ---- the step ----------------------------------------------------------------------------------


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="FP32 checkpoint to start from (default: the run's baseline of the same seed)",
    )
    parser.add_argument(
        "--sparsity",
        type=sparsity,
        nargs="+",
        default=[SPARSITY],
        metavar="SHARE",
        help="share of all weights set to zero, in [0, 1); several in rising order prune gradually, "
        "keeping levels made before; 0 = the dense control (default: 0.5)",
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default=DEFAULT_CRITERION,
        help="what goes first: l1 = smallest magnitudes of the network; l1-normalized = lowest "
        "magnitude ranks within a layer; lamp = smallest share of the layer's remaining norm; "
        "energy = lamp per picojoule saved (default: %(default)s)",
    )
    args = parse_training_arguments(parser, RECIPE, HEADLINE_RECIPE)
    for low, high in itertools.pairwise(args.sparsity):
        if not 0 < low < high:
            parser.error(f"--sparsity {low:g} {high:g}: levels must rise from above 0")
    return args


def method_name(sparsity: float) -> str:
    """`pruned_<percent>`, or `control` without pruning."""
    return f"pruned_{100 * sparsity:g}" if sparsity else "control"


def split_levels(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The arguments of each level; the levels that follow one count among its later epochs."""
    count = len(args.sparsity)
    later = [args.epochs_after + args.epochs * (count - i) for i in range(1, count + 1)]
    pairs = zip(args.sparsity, later, strict=True)
    return [argparse.Namespace(**vars(args) | {"sparsity": s, "epochs_after": n}) for s, n in pairs]


def level_paths(args: argparse.Namespace, run: str) -> tuple[Path, Path]:
    """A level's checkpoint and JSON."""
    name = variant_name(method_name(args.sparsity), "fp32", args.criterion, args.seed)
    return checkpoints_dir(run) / f"{name}.pt", results_dir(run) / f"{name}.json"


def changed_arguments(origin: dict, args: argparse.Namespace, parent: str) -> str:
    """What of an existing level differs from what is asked for; empty when nothing does."""
    older = {"distillation": 0.0, "weight_decay": WEIGHT_DECAY}  # what older files lack
    theirs = older | origin["arguments"] | {"parent": origin["parent"]}
    ours = vars(args) | {"parent": parent}
    keys = (*DECISIVE, "parent")
    return ", ".join(f"{key} {theirs.get(key)}" for key in keys if theirs.get(key) != ours[key])


def require_one_sweep(levels: list[argparse.Namespace], run: str, parent_path: Path) -> None:
    """Raise UserError, naming what differs, where levels of another sweep would be lost."""
    for args in levels:
        path, _ = level_paths(args, run)
        if path.exists():
            origin = load_checkpoint(path)["provenance"]
            changed = changed_arguments(origin, args, parent_path.stem)
            if changed:
                raise UserError(
                    f"{path} was made with {changed}; give the same, or delete the file"
                )
        parent_path = path


def lineage(args: argparse.Namespace, parent_path: Path, baseline_path: Path) -> dict:
    """The provenance keys that name a level's parent and, with distillation, its teacher."""
    taught = {"teacher_sha256": sha256(baseline_path)} if args.distillation else {}
    return parent_fields(parent_path) | taught


def load_teacher(args: argparse.Namespace, baseline_path: Path) -> nn.Module | None:
    """The run's baseline, BN folded, for distillation; None without it."""
    if not args.distillation:
        return None
    checkpoint = load_checkpoint(baseline_path, "fp32")
    require_unseen_holdout(checkpoint, args.holdout)
    return fold_batch_norm(fp32_model(checkpoint))


def made_before(args: argparse.Namespace, run: str, ancestors: dict) -> bool:
    """Whether a level is finished, of these arguments and this very lineage."""
    path, json_path = level_paths(args, run)
    if not (path.exists() and json_path.exists()):
        return False
    origin = load_checkpoint(path)["provenance"]
    return ancestors.items() <= origin.items() and not changed_arguments(
        origin, args, ancestors["parent"]
    )


def prune_level(args, parent_path, run: str, data, device, ancestors: dict, teacher) -> Path:
    """Prune the parent to args.sparsity, fine-tune, write the checkpoint and JSON; their path."""
    name, method = level_paths(args, run)[0].stem, method_name(args.sparsity)
    model = fp32_model(load_checkpoint(parent_path, "fp32"))
    train, validation = data
    masks = prune_globally(model, args.sparsity, args.criterion)
    masks = {layer: mask.to(device) for layer, mask in masks.items()}
    pruning = f"{ancestors['parent_sha256']} at {args.sparsity} {args.criterion}"
    taught = f" taught by {ancestors['teacher_sha256']}" if teacher else ""
    start = f"{pruning}{taught}, {len(train[1])} images"
    parts = {"weight_decay": args.weight_decay, "distillation": args.distillation}
    recipe = Recipe.from_arguments(args, start, **parts)
    resume_path = checkpoints_dir(run) / f"{name}.resume.pt"
    history = fit(
        model,
        train,
        recipe,
        device,
        validation,
        resume_path,
        args.resume,
        after_step=lambda: hold_zeros(model, masks),
        teacher=teacher,
        epochs_after=args.epochs_after,
    )
    made = {"method": method, "criterion": args.criterion if args.sparsity else None}
    origin = provenance(name, args, **ancestors, **made, seed=args.seed, holdout=args.holdout)
    zeros = {"layer_sparsity_percent": layer_sparsity_percent(model)}
    result = {**environment(device), **zeros, "history": history}
    path = publish(run, origin, "fp32", fp32_tensors(model), result, packed=args.sparsity > 0)
    resume_path.unlink(missing_ok=True)
    return path


@user_errors_exit_2
def main():
    args = parse_arguments()
    device, run = pick_device(args.device), run_name(args)
    require_writable(checkpoints_dir(run), results_dir(run))
    baseline_path = checkpoints_dir(run) / f"{variant_name('baseline', 'fp32', seed=args.seed)}.pt"
    parent_path = args.checkpoint or baseline_path
    require_unseen_holdout(load_checkpoint(parent_path, "fp32"), args.holdout)
    teacher = load_teacher(args, baseline_path)
    _, *data = load_training(data_source(args), args.data_dir, holdout=args.holdout)
    levels = split_levels(args)
    if len(levels) > 1:
        require_one_sweep(levels, run, parent_path)
    for level in levels:
        ancestors = lineage(level, parent_path, baseline_path)
        if len(levels) > 1 and made_before(level, run, ancestors):
            parent_path = level_paths(level, run)[0]
            print(f"{parent_path} was made before, with the same arguments: kept")
        else:
            parent_path = prune_level(level, parent_path, run, data, device, ancestors, teacher)


if __name__ == "__main__":
    main()

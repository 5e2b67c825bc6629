"""Step 3: global unstructured magnitude pruning, then fine-tuning with the zeros held.

Reads   an FP32 checkpoint (default checkpoints/baseline_fp32.pt), the training images
Writes  checkpoints/pruned_<percent>_fp32.pt  results/pruned_<percent>_fp32.json
        (control_fp32 with --sparsity 0: the same fine-tuning without pruning)

    python prune_finetune.py                  # 50 % zeros, about 4 minutes on two CPU cores
    python prune_finetune.py --criterion l1   # plain global L1: most zeros fall in fc1
    python prune_finetune.py --sparsity 0     # the dense control of equal effort
    python prune_finetune.py --smoke          # seconds; reads checkpoints/smoke/baseline_fp32.pt

Zeros save storage, and energy only on hardware that skips them; dense kernels multiply them.
"""

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
)
from edgecnn.cli import Parser, parse_training_arguments, run_name, sparsity
from edgecnn.data import load_training
from edgecnn.files import (
    DEFAULT_CRITERION,
    checkpoints_dir,
    require_writable,
    results_dir,
    user_errors_exit_2,
    variant_name,
)
from edgecnn.model import weight_layers
from edgecnn.train import Recipe, environment, fit, pick_device

# The fine-tuning recipe, settled with --holdout.
RECIPE = {"epochs": 5, "batch_size": 256, "learning_rate": 0.1}
SPARSITY = 0.5
CRITERIA = ("l1", "l1-normalized")


# ---- masks -------------------------------------------------------------------------------------


def importance(weight: torch.Tensor, criterion: str) -> torch.Tensor:
    """Scores of a layer's weights, same shape; the lowest of all layers are pruned.

    l1: magnitude. l1-normalized: the magnitude's rank within its layer, in (0, 1], so that one
    global threshold takes the same share of every layer and MACs fall along with weights.
    """
    magnitude = weight.detach().abs()
    if criterion == "l1":
        return magnitude
    ranks = torch.empty(magnitude.numel(), dtype=torch.float64)
    ranks[magnitude.flatten().argsort(stable=True)] = torch.arange(
        1, magnitude.numel() + 1, dtype=torch.float64
    )
    return (ranks / magnitude.numel()).view_as(weight)


def prune_globally(model: nn.Module, sparsity: float, criterion: str) -> dict[str, torch.Tensor]:
    """Zero the given share of all weights (biases and BN excluded), exact to one weight.

    Returns the masks by layer: bool, True where a weight is kept.
    """
    layers = weight_layers(model)
    targets = [(layer, "weight") for layer in layers.values()]
    prune.global_unstructured(
        targets,
        prune.L1Unstructured,
        importance_scores={target: importance(target[0].weight, criterion) for target in targets},
        amount=sparsity,
    )
    masks = {name: layer.weight_mask.bool() for name, layer in layers.items()}
    for target in targets:
        prune.remove(*target)
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
        default=SPARSITY,
        help="share of all weights set to zero, in [0, 1); 0 = the dense control (default: 0.5)",
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default=DEFAULT_CRITERION,
        help="l1 = smallest magnitudes of the whole network; l1-normalized = lowest magnitude "
        "ranks within their layer (default: %(default)s)",
    )
    return parse_training_arguments(parser, RECIPE)


@user_errors_exit_2
def main():
    args = parse_arguments()
    device, run = pick_device(args.device), run_name(args)
    require_writable(checkpoints_dir(run), results_dir(run))
    method = f"pruned_{100 * args.sparsity:g}" if args.sparsity else "control"
    name = variant_name(method, "fp32", args.criterion, args.seed)
    default_parent = checkpoints_dir(run) / f"{variant_name('baseline', 'fp32', seed=args.seed)}.pt"
    parent_path = args.checkpoint or default_parent
    parent = load_checkpoint(parent_path, "fp32")
    require_unseen_holdout(parent, args.holdout)
    model = fp32_model(parent)
    train, validation = load_training(args.data_dir, args.holdout, args.smoke)

    masks = prune_globally(model, args.sparsity, args.criterion)
    masks = {layer: mask.to(device) for layer, mask in masks.items()}
    lineage = parent_fields(parent_path)
    pruning = f"{lineage['parent_sha256']} at {args.sparsity} {args.criterion}"
    recipe = Recipe.from_arguments(args, f"{pruning}, {len(train[1])} images")
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
    )

    lineage |= {"method": method, "criterion": args.criterion if args.sparsity else None}
    origin = provenance(name, args, **lineage, seed=args.seed, holdout=args.holdout)
    zeros = {"layer_sparsity_percent": layer_sparsity_percent(model)}
    result = {**environment(device), **zeros, "history": history}
    publish(run, origin, "fp32", fp32_tensors(model), result, packed=args.sparsity > 0)
    resume_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

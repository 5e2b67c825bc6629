"""Step 3: prune single weights or whole channels of the network, then fine-tune what is left.

Reads   an FP32 checkpoint (default checkpoints/baseline_fp32.pt), the training images
Writes  checkpoints/pruned_<percent>_fp32.pt  results/pruned_<percent>_fp32.json, a pair a level
        (channels_<percent>_fp32 with --structure channels; control_fp32 with --sparsity 0: the same
        fine-tuning without pruning)

    python prune_finetune.py                            # 50 % zeros, 4 minutes on two CPU cores
    python prune_finetune.py --sparsity 0.5 0.7 0.8 0.9 # gradually: each level from the last one
    python prune_finetune.py --criterion l1             # plain global L1: most zeros fall in fc1
    python prune_finetune.py --structure channels --sparsity 0.3      # 30 % fewer MACs, dense
    python prune_finetune.py --checkpoint checkpoints/channels_30_fp32.pt    # then weights of that
    python prune_finetune.py --sparsity 0               # the dense control of equal effort
    python prune_finetune.py --headline                 # longer, and taught by the run's baseline
    python prune_finetune.py --teacher checkpoints/large/baseline_fp32.pt   # taught by another one
    python prune_finetune.py --smoke                    # seconds; reads checkpoints/smoke/

Zeros save storage, and energy only on hardware that skips them; dense kernels multiply them. A network
with fewer channels is smaller and faster everywhere.
Finished levels are kept, a stopped training goes on after its last epoch; --force starts anew.
"""

import argparse
import functools
import itertools
import sys
from pathlib import Path

from torch import nn

from edgecnn.channels import (
    CHANNEL_CRITERIA,
    KERNEL_COSTS,
    MULTIPLE,
    macs,
    prune_channels,
    require_reachable,
)
from edgecnn.checkpoint import (
    dataset_of,
    float_module,
    graph_of,
    load_checkpoint,
    parent_fields,
    provenance,
    require_unseen_holdout,
    save_variant,
)
from edgecnn.cli import (
    TEACHER_SHARE,
    Parser,
    parse_training_arguments,
    positive_int,
    run_name,
    sparsity,
)
from edgecnn.data import reload_training
from edgecnn.distributed import process_0_leads
from edgecnn.errors import user_errors_exit_2
from edgecnn.module import module_of, tensors_of
from edgecnn.names import DEFAULT_CRITERIA, checkpoints_dir, method_name, variant_name
from edgecnn.pruning import CRITERIA, hold_zeros, layer_sparsity_percent, prune_globally
from edgecnn.step import Step, source_digests, variant_step
from edgecnn.teacher import load_teacher
from edgecnn.train import DECISIVE, LATER, Recipe, environment, fit, follow, pick_device

# The fine-tuning recipe, settled with --holdout.
RECIPE = {"epochs": 5, "batch_size": 256, "learning_rate": 0.1} | LATER
# Teacher and weight decay were tried in benchmarks/ablation.py, at 8 epochs; 15 were not tried.
HEADLINE_RECIPE = RECIPE | {"epochs": 15, "weight_decay": 1e-4, "distillation": TEACHER_SHARE}
SPARSITY = 0.5
PRUNING = ("structure", "sparsity", "criterion", "multiple")  # decide, as DECISIVE does
CRITERIA_OF = {"weights": CRITERIA, "channels": CHANNEL_CRITERIA}


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
        help="share in [0, 1) of all weights set to zero or, with --structure channels, of the whole "
        "network's MACs (at least) that go with channels; several in rising order prune gradually, "
        "0 = the dense control (default: 0.5)",
    )
    parser.add_argument(
        "--structure",
        choices=CRITERIA_OF,
        default="weights",
        help="what goes: single weights, or channels with all that makes and reads them, which leaves "
        "a smaller dense network (default: %(default)s)",
    )
    parser.add_argument(
        "--criterion",
        choices=dict.fromkeys(itertools.chain(*CRITERIA_OF.values())),
        help="what goes first: l1 = smallest magnitudes of the network; layer-rank = lowest "
        "magnitude ranks within a layer; lamp = smallest share of the layer's (channels: the "
        "group's) remaining norm; energy = lamp per picojoule saved; of channels also lamp per macs, "
        "bytes of INT8 weights, or estimated Cortex-M4 instructions saved (default: layer-rank; "
        "macs of channels)",
    )
    parser.add_argument(
        "--multiple",
        type=positive_int,
        metavar="CHANNELS",
        help=f"with --structure channels: to what multiple a group shrinks (default: {MULTIPLE})",
    )
    args = parse_training_arguments(parser, RECIPE, HEADLINE_RECIPE)
    args.criterion = args.criterion or DEFAULT_CRITERIA[args.structure]
    known = CRITERIA_OF[args.structure]
    if args.criterion not in known:
        parser.error(f"--criterion {args.criterion}: {args.structure} go by {', '.join(known)}")
    if args.structure == "channels":
        args.multiple = args.multiple or MULTIPLE
    elif args.multiple:
        parser.error("--multiple is of channels; give --structure channels too")
    for low, high in itertools.pairwise(args.sparsity):
        if not 0 < low < high:
            parser.error(f"--sparsity {low:g} {high:g}: levels must rise from above 0")
    return args


def level_step(args: argparse.Namespace, run: str, parent: Path, baseline: Path) -> Step:
    """The step of one level: made from its parent, and with distillation taught by a third."""
    method = method_name(args.structure, args.sparsity, parent.stem)
    name = variant_name(method, "fp32", args.criterion, args.seed)
    deciding = DECISIVE + (PRUNING if args.sparsity else ("sparsity",))  # of zero, how is no matter
    arguments = {key: getattr(args, key) for key in deciding} | {"parent": parent.stem}
    parents = (parent, args.teacher or baseline) if args.distillation else (parent,)
    step = variant_step(run, name, "prune_finetune.py", arguments, parents, args.force, LATER)
    if args.criterion == "instructions":
        step.code = step.code | source_digests(*KERNEL_COSTS)
    return step


def whole_macs(checkpoint: dict) -> int:
    """MACs of the network that a checkpoint's own was before any channel went."""
    return checkpoint["provenance"].get("whole_macs", macs(graph_of(checkpoint)))


def warn_of_empty_layers(model: nn.Module) -> None:
    """Say which layers pruning left without a weight: nothing of an image gets through them."""
    empty = [name for name, zeros in layer_sparsity_percent(model).items() if zeros == 100]
    if empty:
        print(
            f"warning: no weight is left in {', '.join(empty)}: try another --criterion or fewer "
            "zeros",
            file=sys.stderr,
        )


def prune_level(args, step: Step, parent: dict, data, device, teacher, epochs_after: int) -> None:
    """Prune the parent's network to args.sparsity, fine-tune, write the checkpoint and JSON."""
    graph, dataset, model, masks = graph_of(parent), dataset_of(parent), float_module(parent), {}
    train, validation = data
    made = {"method": method_name(args.structure, args.sparsity, step.parents[0].stem)}
    made["criterion"] = args.criterion if args.sparsity else None
    made["whole_macs"] = whole_macs(parent)
    if args.structure == "channels" and args.sparsity:
        most = (1 - args.sparsity) * made["whole_macs"]
        graph, tensors = prune_channels(parent, most, args.criterion, args.multiple)
        model = module_of(graph, tensors)
    else:
        masks = prune_globally(model, args.sparsity, args.criterion)
        warn_of_empty_layers(model)
    masks = {layer: mask.to(device) for layer, mask in masks.items()}
    lineage = parent_fields(step.parents[0])
    if teacher:
        lineage["teacher_sha256"] = step.digest_of(step.parents[1])
    start = f"{sorted(step.digests.items())} at {args.sparsity} {args.criterion} {args.multiple}"
    history = fit(
        model,
        train,
        dataset,
        Recipe.from_arguments(args, start),
        device,
        validation,
        step.resume_path,
        step.code,
        after_step=functools.partial(hold_zeros, model, masks),
        teacher=teacher,
        epochs_after=epochs_after,
    )
    name = step.record.stem
    origin = provenance(name, args, **lineage, **made, seed=args.seed, holdout=args.holdout)
    zeros = {"layer_sparsity_percent": layer_sparsity_percent(model)}
    result = {**environment(device), **zeros, "history": history}
    save_variant(step, origin, "fp32", (graph, tensors_of(model)), dataset, result)


@user_errors_exit_2
@process_0_leads(follow)
def main():
    args = parse_arguments()
    device, run = pick_device(args.device), run_name(args)
    baseline = checkpoints_dir(run) / f"{variant_name('baseline', 'fp32', seed=args.seed)}.pt"
    parent, levels = args.checkpoint or baseline, []
    for share in args.sparsity:  # each level starts from the one before
        level = argparse.Namespace(**vars(args) | {"sparsity": share})
        levels.append((level, level_step(level, run, parent, baseline)))
        parent = levels[-1][1].outputs[0]
    for _, step in levels:
        step.require_same_arguments()

    @functools.cache
    def inputs(dataset):
        """Loaded only for a level that is not kept."""
        data = reload_training(dataset, args.data_dir, args.holdout)
        teacher = None
        if args.distillation:
            teacher = load_teacher(args.teacher or baseline, dataset, args.holdout)
        return data, device, teacher

    for done, (level, step) in enumerate(levels, start=1):
        if not step.kept():
            checkpoint = load_checkpoint(step.parents[0], "fp32")
            require_unseen_holdout(checkpoint, args.holdout)
            if args.structure == "channels":  # the last level too, before the first one's epochs
                most = (1 - args.sparsity[-1]) * whole_macs(checkpoint)
                require_reachable(graph_of(checkpoint), most, args.multiple)
            epochs_after = (len(levels) - done) * args.epochs
            prune_level(level, step, checkpoint, *inputs(dataset_of(checkpoint)), epochs_after)


if __name__ == "__main__":
    main()

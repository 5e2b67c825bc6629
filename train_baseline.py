"""Step 1: capture a network as data and train it in FP32.

Reads   --data: CIFAR-10 (fetched and verified at the first run), a folder of pictures or an .npz;
        no test image. --network: a shipped one, or a user's own Python file, here and never again
Writes  checkpoints/baseline_fp32.pt  results/baseline_fp32.json

    python train_baseline.py             # about 8 minutes on two CPU cores
    python train_baseline.py --network nets.py:MyNet --data my_images/ --input-size 3 64 64 --run mine
    python train_baseline.py --network nets.py:MyNet --weights mine.pt --data my_images/ --run mine
    python train_baseline.py --holdout   # reports on a held-out tenth of the training images
    python train_baseline.py --network resnet8 --teacher checkpoints/baseline_fp32.pt --run taught
    python train_baseline.py --headline  # the longer recipe of `make headline`
    python train_baseline.py --smoke     # seconds, on a small real sample, no network

A finished baseline is kept, a stopped training goes on after its last epoch; --force starts anew.
"""

from pathlib import Path

import torch

from edgecnn.capture import capture, check_classes
from edgecnn.checkpoint import provenance, save_variant
from edgecnn.cli import (
    SMOKE_EPOCHS,
    Parser,
    add_data_arguments,
    data_source,
    parse_training_arguments,
    run_name,
)
from edgecnn.data import describe as describe_data
from edgecnn.data import kind_of, load_training, picture_digests
from edgecnn.describe import describe
from edgecnn.distributed import process_0_leads
from edgecnn.errors import user_errors_exit_2
from edgecnn.module import module_of, tensors_of
from edgecnn.names import variant_name
from edgecnn.networks import (
    NETWORKS,
    default_input_shape,
    load_network,
    load_weights,
    network_file,
)
from edgecnn.rewrite import pool_before_relu
from edgecnn.step import Step, variant_step
from edgecnn.teacher import load_teacher
from edgecnn.train import (
    BASELINE_RECIPE,
    DECISIVE,
    LATER,
    Recipe,
    accuracy_percent,
    environment,
    fit,
    follow,
    pick_device,
)

# Only the number of epochs differs; 30 were tried (benchmarks/ablation.py), 60 were not.
HEADLINE_RECIPE = BASELINE_RECIPE | {"epochs": 60}
FEW_STEPS = 200  # below which a training gets a note
GIVEN_IMAGES = 2000  # about so many tell how well --weights fit
# The decisive arguments of this step alone.
NETWORK = ("network", "weights", "data", "input_size", "augment")


def parse_arguments():
    parser = Parser(__doc__)
    parser.add_argument(
        "--network",
        default="edgecnn",
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}, or file.py:Name, a class or function that takes no argument, "
        "`classes` or `input_shape` (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="a float state_dict of the network, written by torch.save: taken as it is, not trained",
    )
    add_data_arguments(parser)
    args = parse_training_arguments(parser, BASELINE_RECIPE, HEADLINE_RECIPE)
    untrained = BASELINE_RECIPE | ({"epochs": SMOKE_EPOCHS} if args.smoke else {})
    idle = [key for key, value in untrained.items() if getattr(args, key) != value]
    idle = ["headline"] * args.headline + [key for key in idle if key != "distillation"]
    if args.weights and idle:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in idle)
        parser.error(f"--weights are taken as they are, not trained: leave out {flags}")
    return args


def captured(args, dataset):
    """(graph, tensors) of the network that the arguments ask for, freshly initialised or as given."""
    torch.manual_seed(args.seed)
    module = load_network(args.network, len(dataset.classes), dataset.shape)
    if args.weights:
        load_weights(module, args.weights)
    graph, tensors = capture(module, dataset.shape)
    check_classes(graph, len(dataset.classes))
    return pool_before_relu(graph), tensors


def baseline_step(args, run: str) -> Step:
    """The step of one baseline: its file of the network, its weights and its teacher are parents."""
    name = variant_name("baseline", "fp32", seed=args.seed)
    arguments = {key: getattr(args, key) for key in (*DECISIVE, *NETWORK)}
    parents = [path for path in (network_file(args.network), args.weights, args.teacher) if path]
    before = LATER | dict.fromkeys(NETWORK) | {"network": "edgecnn", "data": "cifar10"}
    step = variant_step(run, name, "train_baseline.py", arguments, parents, args.force, before)
    step.pictures = picture_digests(data_source(args), "train")
    return step


def note_few_steps(args, images: int) -> None:
    """Say where the recipe, drawn for 50,000 images, leaves a small data set all but untrained."""
    steps = args.epochs * max(1, images // args.batch_size)
    if steps < FEW_STEPS and not args.smoke:
        smaller = "a smaller --batch-size or " if args.batch_size > 1 else ""
        print(f"note: few steps in all, {steps}: give {smaller}more --epochs")


def note_given(args, model, train, dataset, device) -> None:
    """Say how well given weights know these pictures: badly where theirs had another mean or scale."""
    every = max(1, len(train[1]) // GIVEN_IMAGES)
    part = train[0][::every], train[1][::every]
    percent = accuracy_percent(model.to(device), part, dataset, device)
    print(f"{args.weights}: right on {percent:.2f} % of {len(part[1]):,} training pictures")


@user_errors_exit_2
@process_0_leads(follow)
def main():
    args = parse_arguments()
    device, run = pick_device(args.device), run_name(args)
    step = baseline_step(args, run)
    if step.kept():
        return
    source, augment, shape = data_source(args), args.augment, args.input_size
    if shape is None and kind_of(source) != "npz":  # which has a size of its own
        shape = default_input_shape(args.network)
    dataset, train, validation = load_training(
        source, args.data_dir, shape and tuple(shape), args.holdout, augment
    )
    graph, tensors = captured(args, dataset)
    print(f"{describe_data(dataset, train, validation)}\n\n{describe(graph)}\n")

    model = module_of(graph, tensors)
    start = f"weights of {args.network} {sorted(step.digests.items())}"
    recipe, history = Recipe.from_arguments(args, start), []
    lineage = {"method": "baseline", "criterion": None, "parent": None}
    if args.weights:
        note_given(args, model, train, dataset, device)
    else:
        note_few_steps(args, len(train[1]))
        parts, teacher = (validation, step.resume_path, step.code), None
        if args.teacher:
            teacher = load_teacher(args.teacher, dataset, args.holdout)
            lineage["teacher_sha256"] = step.digest_of(args.teacher)
        history = fit(model, train, dataset, recipe, device, *parts, teacher=teacher)

    origin = provenance(step.record.stem, args, **lineage, seed=args.seed, holdout=args.holdout)
    result = {**environment(device), "history": history}
    save_variant(step, origin, "fp32", (graph, tensors_of(model)), dataset, result)


if __name__ == "__main__":
    main()

"""Step 1: train the FP32 baseline CNN on CIFAR-10.

Reads   data/ (the 50,000 training images, fetched and verified at the first run; no test image)
Writes  checkpoints/baseline_fp32.pt  results/baseline_fp32.json

    python train_baseline.py             # about 8 minutes on two CPU cores
    python train_baseline.py --holdout   # reports on 5,000 held-out training images: for choices
    python train_baseline.py --headline  # the longer recipe of `make headline`
    python train_baseline.py --smoke     # seconds, on a small real sample, no network
"""

import torch

from edgecnn.checkpoint import fp32_tensors, provenance, publish
from edgecnn.cli import Parser, data_source, parse_training_arguments, run_name
from edgecnn.data import load_training
from edgecnn.files import (
    checkpoints_dir,
    require_writable,
    results_dir,
    user_errors_exit_2,
    variant_name,
)
from edgecnn.model import EdgeCNN
from edgecnn.train import Recipe, environment, fit, pick_device

# The recipe, settled with --holdout.
RECIPE = {"epochs": 12, "batch_size": 256, "learning_rate": 0.2}
# Only their number differs; 30 were tried (benchmarks/ablation.py), 60 were not.
HEADLINE_RECIPE = RECIPE | {"epochs": 60}


@user_errors_exit_2
def main():
    args = parse_training_arguments(Parser(__doc__), RECIPE, HEADLINE_RECIPE)
    device, run = pick_device(args.device), run_name(args)
    require_writable(checkpoints_dir(run), results_dir(run))
    name = variant_name("baseline", "fp32", seed=args.seed)
    resume_path = checkpoints_dir(run) / f"{name}.resume.pt"
    source = data_source(args)
    _, train, validation = load_training(source, args.data_dir, holdout=args.holdout)

    torch.manual_seed(args.seed)
    model = EdgeCNN()
    recipe = Recipe.from_arguments(args, f"random weights, {len(train[1])} images")
    history = fit(
        model,
        train,
        recipe,
        device,
        validation,
        resume_path,
        args.resume,
        epochs_after=args.epochs_after,
    )

    lineage = {"method": "baseline", "criterion": None, "parent": None}
    origin = provenance(name, args, **lineage, seed=args.seed, holdout=args.holdout)
    result = {**environment(device), "history": history}
    publish(run, origin, "fp32", fp32_tensors(model), result)
    resume_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

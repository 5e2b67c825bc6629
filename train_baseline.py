"""Step 1: train the FP32 baseline CNN on CIFAR-10.

Reads   data/ (the 50,000 training images, fetched and verified at the first run; no test image)
Writes  checkpoints/baseline_fp32.pt  results/baseline_fp32.json

    python train_baseline.py             # about 8 minutes on two CPU cores
    python train_baseline.py --holdout   # reports on 5,000 held-out training images: for choices
    python train_baseline.py --headline  # the longer recipe of `make headline`
    python train_baseline.py --smoke     # seconds, on a small real sample, no network

A finished baseline is kept, a stopped training goes on after its last epoch; --force starts anew.
"""

import torch

from edgecnn.checkpoint import fp32_tensors, provenance, save_variant
from edgecnn.cli import Parser, parse_training_arguments, run_name
from edgecnn.data import load_training
from edgecnn.errors import user_errors_exit_2
from edgecnn.model import EdgeCNN
from edgecnn.names import variant_name
from edgecnn.step import variant_step
from edgecnn.train import BASELINE_RECIPE, DECISIVE, Recipe, environment, fit, pick_device

# Only the number of epochs differs; 30 were tried (benchmarks/ablation.py), 60 were not.
HEADLINE_RECIPE = BASELINE_RECIPE | {"epochs": 60}


@user_errors_exit_2
def main():
    args = parse_training_arguments(Parser(__doc__), BASELINE_RECIPE, HEADLINE_RECIPE)
    device, run = pick_device(args.device), run_name(args)
    name = variant_name("baseline", "fp32", seed=args.seed)
    arguments = {key: getattr(args, key) for key in DECISIVE}
    step = variant_step(run, name, "train_baseline.py", arguments, force=args.force)
    if step.kept():
        return
    train, validation = load_training(args.data_dir, args.holdout, args.smoke)

    torch.manual_seed(args.seed)
    model = EdgeCNN()
    recipe = Recipe.from_arguments(args, f"random weights, {len(train[1])} images")
    history = fit(model, train, recipe, device, validation, step.resume_path, step.code)

    lineage = {"method": "baseline", "criterion": None, "parent": None}
    origin = provenance(name, args, **lineage, seed=args.seed, holdout=args.holdout)
    result = {**environment(device), "history": history}
    save_variant(step, origin, "fp32", fp32_tensors(model), result)


if __name__ == "__main__":
    main()

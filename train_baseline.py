"""Step 1: train the FP32 baseline CNN on CIFAR-10.

Reads   data/ (the 50,000 training images, fetched and verified at the first run; no test image)
Writes  checkpoints/baseline_fp32.pt  results/baseline_fp32.json

    python train_baseline.py             # about 7 minutes on two CPU cores
    python train_baseline.py --holdout   # reports on 5,000 held-out training images: for choices
    python train_baseline.py --smoke     # seconds, on a small real sample, no network
"""

import torch

from edgecnn.checkpoint import fp32_tensors, provenance, save_checkpoint, sha256
from edgecnn.cli import Parser, add_run_arguments, add_training_arguments, run_name
from edgecnn.data import load_training
from edgecnn.files import (
    checkpoints_dir,
    results_dir,
    user_errors_exit_2,
    variant_name,
    write_json,
)
from edgecnn.model import EdgeCNN
from edgecnn.train import Recipe, fit, pick_device

# The recipe, chosen with --holdout.
RECIPE = {"epochs": 12, "batch_size": 256, "learning_rate": 0.2}
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
SMOKE_EPOCHS = 2


def parse_arguments():
    parser = Parser(__doc__)
    add_training_arguments(parser, RECIPE)
    add_run_arguments(parser)
    args = parser.parse_args()
    args.epochs = args.epochs or (SMOKE_EPOCHS if args.smoke else RECIPE["epochs"])
    return args


@user_errors_exit_2
def main():
    args = parse_arguments()
    device, run = pick_device(args.device), run_name(args)
    name = variant_name("baseline", "fp32", seed=args.seed)
    checkpoint_path = checkpoints_dir(run) / f"{name}.pt"
    resume_path = checkpoints_dir(run) / f"{name}.resume.pt"
    train, validation = load_training(args.data_dir, args.holdout, args.smoke)

    torch.manual_seed(args.seed)
    model = EdgeCNN()
    recipe = Recipe(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=WEIGHT_DECAY,
        label_smoothing=LABEL_SMOOTHING,
        seed=args.seed,
        start=f"random weights, {len(train[1])} images",
    )
    history = fit(model, train, recipe, device, validation, resume_path, args.resume)

    origin = provenance(
        name, vars(args), method="baseline", criterion=None, seed=args.seed, parent=None
    )
    save_checkpoint(checkpoint_path, "fp32", fp32_tensors(model), origin)
    digest = sha256(checkpoint_path)
    write_json(
        results_dir(run) / f"{name}.json",
        {**origin, "checkpoint_sha256": digest, "device": str(device), "history": history},
    )
    resume_path.unlink()
    print(f"wrote {checkpoint_path} and {results_dir(run) / name}.json")


if __name__ == "__main__":
    main()

"""Several processes train what one does, up to rounding; one that dies costs a line and no epoch."""

import os
import socket
import subprocess
import sys
import time

import torch
from conftest import REPOSITORY, run_main

from edgecnn.checkpoint import load_checkpoint
from edgecnn.distributed import ENDED
from edgecnn.networks import EdgeCNN

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SLOW = ("--learning-rate", "0.01")  # so that training does not blow rounding up


def started(script: str, *arguments) -> list[subprocess.Popen]:
    """The two processes of one run, by rank, started as a scheduler would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, REPOSITORY / script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]


def assert_same_training(start: dict, path, other) -> None:
    """Both networks went the same way from `start`, apart by little of it, and by no zero."""
    a, b = (load_checkpoint(p)["tensors"] for p in (path, other))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        apart, way = (tensor - b[name]).norm(), (b[name] - start[name]).norm()
        assert apart < 0.01 * way, f"{name}: {apart / way:.4f}"
        assert torch.equal(tensor == 0, b[name] == 0)


def test_two_processes_of_torchrun_train_what_one_does(workdir):
    script, path = REPOSITORY / "train_baseline.py", workdir / "checkpoints/smoke/baseline_fp32.pt"
    arguments = ["--smoke", "--batch-size", "128", *SLOW]  # six steps
    said = subprocess.run(
        [*TORCHRUN, script, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert said.count("epoch 2/2") == said.count("wrote ") == 1
    path.rename("two.pt")
    run_main("train_baseline", *arguments, "--force")
    torch.manual_seed(0)
    assert_same_training(EdgeCNN().state_dict(), "two.pt", path)


def test_a_process_that_dies_is_one_line_and_the_same_command_goes_on(copy):
    path, resume = (copy / f"checkpoints/smoke/pruned_80_fp32.{end}" for end in ("pt", "resume.pt"))
    arguments = ["--smoke", "--sparsity", "0.8", "--headline", "--epochs", "3", *SLOW]
    arguments += ["--batch-size", "195"]  # shares of 97 and 98 images
    first, second = started("prune_finetune.py", *arguments)
    while not resume.exists() and first.poll() is None:
        time.sleep(0.01)
    second.kill()
    assert first.communicate(timeout=60)[1] == f"error: {ENDED}\n" and first.returncode == 2
    assert second.communicate() == ("", "") and resume.exists() and not path.exists()
    first, second = started("prune_finetune.py", *arguments)
    said = first.communicate(timeout=60)[0]
    assert said.count("resuming after epoch") == said.count("wrote ") == 1
    assert second.communicate() == ("", "") and first.returncode == second.returncode == 0
    path.rename("two.pt")
    run_main("prune_finetune", *arguments, "--force")
    start = load_checkpoint(copy / "checkpoints/smoke/baseline_fp32.pt")["tensors"]
    assert_same_training(start, "two.pt", path)
    weight = load_checkpoint("two.pt")["tensors"]["fc1.weight"]
    assert (weight == 0).float().mean() > 0.75

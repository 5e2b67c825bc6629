"""Several processes train what one does, up to rounding; one that dies costs a line and no epoch."""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import REPOSITORY
from torch import nn

from edgecnn.data import load_sample
from edgecnn.dataset import CIFAR10
from edgecnn.distributed import ENDED, process_0_leads
from edgecnn.errors import user_errors_exit_2
from edgecnn.pruning import hold_zeros, weight_layers
from edgecnn.train import Recipe, fit, follow

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(8 * 15 * 15, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))


def train(resume_path: Path | None = None) -> nn.Module:
    """Three epochs with half of the weights held at zero, and a teacher."""
    model = network(0)
    masks = {n: p.weight > p.weight.median() for n, p in weight_layers(model).items()}
    hold_zeros(model, masks)
    # 195 images are shares of 97 and 98; a low rate keeps training from blowing rounding up
    recipe = Recipe(3, 195, 0.02, seed=3, start="test", distillation=0.5)
    where = (torch.device("cpu"), None, resume_path)
    held = functools.partial(hold_zeros, model, masks)
    taught = {"after_step": held, "teacher": network(1).eval()}
    fit(model, load_sample()[0], CIFAR10, recipe, *where, **taught)
    return model


@user_errors_exit_2
@process_0_leads(follow)
def main():
    torch.save(train(Path("resume.pt")).state_dict(), "done.pt")


def started() -> list[subprocess.Popen]:
    """The two processes of one run of this file, by rank, started as a scheduler would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["PYTHONPATH"] = str(REPOSITORY)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, __file__], env=os.environ | common | {"RANK": r}, **pipes)
        for r in ("0", "1")
    ]


def test_a_process_that_dies_is_one_line_and_the_same_command_ends_as_one_process_does(workdir):
    first, second = started()
    while not os.path.exists("resume.pt") and first.poll() is None:
        time.sleep(0.001)
    second.kill()
    assert first.communicate(timeout=60)[1] == f"error: {ENDED}\n" and first.returncode == 2
    assert second.communicate() == ("", "") and not os.path.exists("done.pt")
    command, env = [*TORCHRUN, __file__], os.environ | {"PYTHONPATH": str(REPOSITORY)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert said.count("resuming after epoch") == said.count("epoch 3/3") == 1
    two, one, start = torch.load("done.pt"), train().state_dict(), network(0).state_dict()
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        if tensor.is_floating_point():
            apart, way = (two[name] - tensor).norm(), (tensor - start[name]).norm()
            assert apart < 1e-3 * way, f"{name}: {apart / way:.5f}"
        assert torch.equal(two[name] == 0, tensor == 0), name
    assert (two["0.weight"] == 0).float().mean() >= 0.5


if __name__ == "__main__":
    main()

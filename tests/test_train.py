"""Training: closed-form schedule, bit-reproducible, resumable, stopped by a NaN."""

import json
import math

import pytest
import torch
from conftest import run_main, same_bits
from torch import nn

from edgecnn.data import load_sample, normalize
from edgecnn.dataset import CIFAR10
from edgecnn.errors import UserError
from edgecnn.networks import EdgeCNN
from edgecnn.train import TEMPERATURE, Recipe, distillation_loss, fit, one_cycle


def trained(epochs=2, seed=3, distillation=0.0, dropout=0.0, **keywords):
    torch.manual_seed(seed)
    model = EdgeCNN()
    model.relu = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
    recipe = Recipe(epochs, 64, 0.1, seed=seed, start="test", distillation=distillation)
    history = fit(model, load_sample()[0], CIFAR10, recipe, torch.device("cpu"), **keywords)
    return model.state_dict(), history


def test_schedule_closed_form():
    rates = [one_cycle(step, 100, 0.2) for step in range(101)]
    assert rates[0] == pytest.approx(0.02) and rates[25] == 0.2 and rates[100] == 0
    assert max(rates) == 0.2 and rates[50] == pytest.approx(0.2 * 50 / 75)


def test_same_seed_same_bits_other_seed_others():
    first, history = trained()
    second, _ = trained()
    assert same_bits(first, second)
    assert not same_bits(first, trained(seed=4)[0])
    assert [row["epoch"] for row in history] == [1, 2] and history[1]["loss"] < history[0]["loss"]


def a_teacher():
    torch.manual_seed(7)
    return EdgeCNN().eval()


def test_distillation_loss_closed_form():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert distillation_loss(logits, logits + 5).item() == pytest.approx(0, abs=1e-6)
    student, teacher = (torch.tensor([[TEMPERATURE * x, 0.0]]) for x in (1.0, 2.0))
    p, q = (1 / (1 + math.exp(-x)) for x in (2.0, 1.0))  # of the first class
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert distillation_loss(student, teacher).item() == pytest.approx(9 * divergence, rel=1e-5)


def test_a_teacher_alone_draws_the_student_to_itself_and_stays_as_it_was():
    teacher = a_teacher()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    images = normalize(load_sample()[0][0], CIFAR10)

    def distance(**keywords):
        student = EdgeCNN()
        student.load_state_dict(trained(epochs=6, teacher=teacher, **keywords)[0])
        with torch.no_grad():
            return distillation_loss(student.eval()(images), teacher(images)).item()

    assert distance(distillation=1.0) < 0.5 * distance()
    assert same_bits(before, teacher.state_dict())
    assert same_bits(trained(1, teacher=teacher)[0], trained(1)[0])


@pytest.mark.parametrize(("distillation", "dropout"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.3)])
def test_resume_in_process_gives_the_same_bits(tmp_path, distillation, dropout):
    path = tmp_path / "run.resume.pt"
    taught = {"distillation": distillation, "teacher": a_teacher(), "dropout": dropout}
    whole, _ = trained(epochs=3, **taught)

    class Stop(Exception):
        pass

    steps = iter(range(100))

    def interrupt():
        if next(steps) == 8:  # in the second epoch of six steps
            raise Stop

    with pytest.raises(Stop):
        trained(epochs=3, resume_path=path, after_step=interrupt, **taught)
    resumed, history = trained(epochs=3, resume_path=path, **taught)
    assert same_bits(whole, resumed) and len(history) == 3


def test_nan_loss_stops_and_leaves_the_last_good_state(workdir, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main("train_baseline", "--smoke", "--epochs", 3, "--learning-rate", 1e12)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--learning-rate" in error and error.count("\n") == 1
    assert not (workdir / "checkpoints/smoke/baseline_fp32.pt").exists()


def test_divergence_late_in_a_run_keeps_the_last_good_epoch(tmp_path):
    path = tmp_path / "run.resume.pt"
    torch.manual_seed(0)
    model = EdgeCNN()
    steps = iter(range(100))

    def spoil():
        if next(steps) == 11:  # the last step of the second of three epochs
            with torch.no_grad():
                model.fc2.weight[0, 0] = float("nan")

    recipe = Recipe(3, 64, 0.1, seed=0, start="test")
    with pytest.raises(UserError, match="epoch 2"):
        fit(
            model,
            load_sample()[0],
            CIFAR10,
            recipe,
            torch.device("cpu"),
            resume_path=path,
            after_step=spoil,
        )
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) == 1
    assert all(t.isfinite().all() for t in state["model"].values())


def test_history_is_in_the_result(smoke):
    result = json.loads((smoke / "results/smoke/baseline_fp32.json").read_text())
    row = result["history"][-1]
    assert {"epoch", "loss", "train_accuracy_percent", "learning_rate", "seconds"} <= row.keys()

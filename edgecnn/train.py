"""The training loop that train_baseline.py and prune_finetune.py share: resumable, bit-reproducible."""

import ctypes
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from edgecnn.data import augmented_batches, crop_padding, normalize, pad_reflect
from edgecnn.dataset import DataSet
from edgecnn.distributed import PROCESSES, RANK, replicated, send, share_of, total
from edgecnn.errors import UserError
from edgecnn.graph import Graph, batch_size, shapes_of
from edgecnn.split import Split
from edgecnn.torch_files import read_torch, write_torch

MOMENTUM = 0.9  # Nesterov
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1
WARMUP_FRACTION = 0.25  # of all steps, from START_FRACTION of the peak learning rate
START_FRACTION = 0.1
TEMPERATURE = 3.0  # of distillation: what the teacher knows of the wrong classes shows above 1
EVALUATION_BATCH = 1000  # images
# The baseline's recipe, settled with --holdout.
BASELINE_RECIPE = {"epochs": 12, "batch_size": 256, "learning_rate": 0.2}
# What older records, which lack them, were made with. distillation: the teacher's share of the loss.
LATER = {"weight_decay": WEIGHT_DECAY, "label_smoothing": LABEL_SMOOTHING}
LATER |= {"distillation": 0.0, "teacher": None}
BASELINE_RECIPE |= LATER
# The arguments of a training script that decide its weights.
DECISIVE = (*BASELINE_RECIPE, "seed", "holdout", "smoke")


@dataclass(frozen=True)
class Recipe:
    """What a run's result depends on besides its data and starting weights."""

    epochs: int
    batch_size: int
    learning_rate: float  # the one-cycle peak
    seed: int
    start: str  # the weights and images it starts from, so that nothing is mixed up when it goes on
    weight_decay: float = WEIGHT_DECAY
    label_smoothing: float = LABEL_SMOOTHING
    distillation: float = 0.0  # the teacher's share of the loss

    @classmethod
    def from_arguments(cls, args, start: str) -> "Recipe":
        """The recipe that a training script's command line asks for."""
        given = {
            field: getattr(args, field) for field in cls.__dataclass_fields__ if field != "start"
        }
        return cls(**given, start=start)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda`; raises UserError when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return torch.device(name)


def environment(device: torch.device) -> dict:
    """What besides arguments and sources the bits of a run depend on."""
    counts = {"threads": torch.get_num_threads(), "processes": PROCESSES}
    return {"device": str(device), **counts, "torch_version": str(torch.__version__)}


def keep_freed_memory() -> None:
    """Let glibc reuse freed activations: by default blocks over 32 MiB go back to the kernel, and
    zeroing their pages again costs about a fifth of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: linear up over the first quarter, then linear down towards zero."""
    return peak * float(np.interp(step / steps, (0, WARMUP_FRACTION, 1), (START_FRACTION, 1, 0)))


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, dataset: DataSet, device="cpu") -> torch.Tensor:
    """Predicted classes, int64 (N,), of uint8 (N, C, H, W) images, in evaluation mode."""
    keep_freed_memory()
    model.eval()
    batches = images.split(batch_size(model._graph, EVALUATION_BATCH))
    batches = (normalize(batch.to(device), dataset) for batch in batches)
    return torch.cat([model(batch).argmax(1).cpu() for batch in batches])


def accuracy_percent(model: nn.Module, data: Split, dataset: DataSet, device="cpu") -> float:
    """Top-1 accuracy in percent."""
    images, labels = data
    return 100 * (predict(model, images, dataset, device) == labels).double().mean().item()


def diverged(what: str) -> UserError:
    """The error of a run whose numbers left the finite range."""
    return UserError(f"{what}; start again with a lower --learning-rate, and --force")


def distillation_loss(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """How far the student's (N, classes) logits are from the teacher's: KL divergence at TEMPERATURE.

    Times TEMPERATURE^2, so that its gradients keep their size. Source: Hinton et al., "Distilling
    the knowledge in a neural network" (arXiv 1503.02531), section 2.
    """
    student, teacher = (F.log_softmax(values / TEMPERATURE, 1) for values in (logits, taught))
    return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def train_epoch(
    model, optimizer, recipe: Recipe, epoch: int, padded, labels, dataset, after_step, teacher
) -> dict:
    """One epoch; returns its history row. Raises UserError when the loss stops being finite.

    Of several processes each takes its share of every batch; the row is that of all of them.
    """
    model.train()
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    # Dropout's draws: of a resumed run the same, of every process and epoch others.
    torch.manual_seed(generator.initial_seed() * 1_009 + RANK + 1)
    batch_size = min(recipe.batch_size, len(labels))
    steps, share = len(labels) // batch_size, share_of(batch_size)
    start = time.perf_counter()
    # They stay on the device: to read them every step would keep a GPU waiting for the next one.
    loss_sum = torch.zeros((), dtype=torch.float64, device=padded.device)
    correct = torch.zeros((), dtype=torch.int64, device=padded.device)
    bar = tqdm(
        augmented_batches(padded, labels, batch_size, generator, dataset, share),
        desc=f"epoch {epoch + 1}/{recipe.epochs}",
        total=steps,
        disable=RANK > 0 or not sys.stderr.isatty(),
    )
    for step, (images, targets) in enumerate(bar):
        rate = one_cycle(epoch * steps + step, recipe.epochs * steps, recipe.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
        if recipe.distillation:
            with torch.no_grad():
                taught = teacher(images)
            part = recipe.distillation
            loss = (1 - part) * loss + part * distillation_loss(logits, taught)
        weight = len(targets) / batch_size  # of this process's mean in that of the batch
        loss_sum += weight * loss.detach().double()
        correct += (logits.argmax(1) == targets).sum()
        optimizer.zero_grad()
        (PROCESSES * weight * loss).backward()  # DistributedDataParallel takes the mean of them
        optimizer.step()
        if after_step:
            after_step()
        if step % 10 == 9 and not bar.disable:
            bar.set_postfix(loss=f"{loss_sum.item() / (step + 1):.3f}")
    loss, right = total(loss_sum.item(), correct.item())
    if not math.isfinite(loss):
        raise diverged(f"the loss became {loss} in epoch {epoch + 1}")
    return {
        "epoch": epoch + 1,
        "loss": loss / steps,
        "train_accuracy_percent": 100 * right / (steps * batch_size),
        "learning_rate": rate,
        "seconds": time.perf_counter() - start,
    }


def sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """The optimizer of every training."""
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def follow(model, optimizer_state, done, recipe, *parts) -> None:
    """What the other processes of a run do in fit(): its epochs after those `done`."""
    keep_freed_memory()
    optimizer = sgd(model, recipe)
    optimizer.load_state_dict(optimizer_state)
    replica = replicated(model)
    for epoch in range(done, recipe.epochs):
        train_epoch(replica, optimizer, recipe, epoch, *parts)


def normalizes_vectors(graph: Graph) -> bool:
    """Whether a batch norm has one value a channel and image, and so no variance in a batch of one."""
    shapes = shapes_of(graph)
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    return any(math.prod(shapes[node.inputs[0]][1:]) == 1 for node in norms)


def fit(
    model: nn.Module,
    train: Split,
    dataset: DataSet,
    recipe: Recipe,
    device: torch.device,
    validation: Split | None = None,
    resume_path: Path | None = None,
    code: dict[str, str] | None = None,
    after_step=None,
    teacher: nn.Module | None = None,
    epochs_after: int = 0,
) -> list[dict]:
    """Train `model` in place and return its history, a row an epoch.

    The state after every epoch goes to `resume_path`; found there, of the same recipe and `code`
    (a step's), the run continues from it and ends with the same bits as an uninterrupted one.
    `after_step()` follows every optimizer step; of several processes in each of them, so that it has
    to be what pickle takes. `teacher`, in evaluation mode, is what
    recipe.distillation needs; recipe.start tells which. `epochs_after` is how many the step will
    train after this call, for the printed estimate of the time left.
    Raises UserError on a non-finite loss, on batches of one that batch norm cannot take, and on a
    resume file of other arguments or another machine.
    """
    if min(recipe.batch_size, len(train[1])) == 1 and normalizes_vectors(model._graph):
        raise UserError("batch norm needs two images or more in a batch where maps are 1x1 or flat")
    keep_freed_memory()
    model.to(device, memory_format=torch.channels_last)
    if teacher is not None:
        teacher.to(device, memory_format=torch.channels_last)
    optimizer = sgd(model, recipe)
    start = f"{recipe.start}, {dataset.fingerprint} {dataset.augment}, {len(train[1])} images"
    source = {"start": start, "code": code, **environment(device)}
    history = load_resume(resume_path, model, optimizer, recipe, source) if resume_path else []
    padded = pad_reflect(train[0], crop_padding(dataset)).to(device)
    parts = (padded, train[1].to(device), dataset, after_step, teacher)
    send((model, optimizer.state_dict(), len(history), recipe, *parts), device.type)
    replica = replicated(model)
    for epoch in range(len(history), recipe.epochs):
        row = train_epoch(replica, optimizer, recipe, epoch, *parts)
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise diverged(f"a weight stopped being finite in epoch {epoch + 1}")
        if validation is not None:
            row["validation_accuracy_percent"] = accuracy_percent(
                model, validation, dataset, device
            )
        history.append(row)
        if resume_path is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run = {"recipe": asdict(recipe), "source": source, "history": history}
            write_torch(resume_path, {**state, **run})
        left = (recipe.epochs - epoch - 1 + epochs_after) * row["seconds"]
        tqdm.write(
            f"epoch {row['epoch']}/{recipe.epochs}  loss {row['loss']:.4f}  "
            f"train {row['train_accuracy_percent']:.2f} %"
            + (f"  validation {row['validation_accuracy_percent']:.2f} %" if validation else "")
            + f"  {row['seconds']:.1f} s  "
            + (f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left")
        )
        sys.stdout.flush()
    return history


def load_resume(path: Path, model, optimizer, recipe: Recipe, source: dict) -> list[dict]:
    """Restore a run's state and return its history; empty when there is nothing to resume.

    A state of other starting weights or code is worth nothing any more, and is not continued.
    Raises UserError for a damaged file, one of other arguments, and one of other threads, processes,
    device or PyTorch, whose bits could not be continued: its epochs stay for whoever has those.
    """
    if not path.exists():
        return []
    try:
        state = read_torch(path)
        ours = asdict(recipe) | {"start": ""}
        theirs = ours | state["recipe"] | {"start": ""}  # other code may lack a field
        before = dict(state["source"])
        if theirs == ours and before == source:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = list(state["history"])
    except Exception as error:  # a damaged file fails in torch, zip or pickle alike
        raise UserError(
            f"{path} is damaged ({type(error).__name__}); --force starts from the beginning"
        ) from None
    if theirs != ours:
        changed = ", ".join(f"{k} {theirs.get(k)}" for k in ours if theirs.get(k) != ours[k])
        raise UserError(
            f"{path} was written with {changed}; give the same, or --force to start again"
        )
    machine = {key: value for key, value in source.items() if key not in ("start", "code")}
    other = [key for key in machine if key in before and before[key] != machine[key]]
    if all(before.get(key) == source[key] for key in ("start", "code")) and other:
        theirs, ours = (", ".join(f"{k} {d[k]}" for k in other) for d in (before, machine))
        hint = " (OMP_NUM_THREADS)" if "threads" in other else ""
        raise UserError(
            f"{path} was written with {theirs}, and here it is {ours}: the bits would not be those of "
            f"one run; use the same{hint}, or delete that file to start this training again"
        )
    if before != source:
        changed = ", ".join(key for key in source if before.get(key) != source[key])
        print(f"{path} belongs to another {changed}; starting from the beginning")
        return []
    print(f"resuming after epoch {len(history)} of {recipe.epochs}")
    return history

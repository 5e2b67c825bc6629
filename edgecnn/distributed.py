"""Several processes that train one network, as torchrun starts them: torch's DistributedDataParallel.

Process 0 is the run: it reads, decides, prints, evaluates and writes as a single one would. For each
training it sends the others the network and the images; they take the same optimizer steps, each on
its share of every batch, until process 0 ends. One process alone passes through here unchanged.

    torchrun --nproc-per-node 2 -- train_baseline.py    # without the -- torchrun misreads --run
"""

import functools
import io
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from edgecnn.errors import UserError

# Set by torchrun, or by hand together with MASTER_ADDR and MASTER_PORT.
PROCESSES = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
RANK = int(os.environ["RANK"]) if PROCESSES > 1 else 0
ENDED = "a process of this run ended; finished epochs are kept: the same command goes on"
GRACE_S = 5  # torchrun kills after 30


# ---- from start to end -------------------------------------------------------------------------


def process_0_leads(follow):
    """Wrap a script's main(): process 0 runs it, the others run follow(*job) for each sent job.

    Where a process dies, one of those left says so in a line, and all of them end.
    """

    def decorate(main):
        @functools.wraps(main)
        def wrapped():
            if PROCESSES == 1:
                return main()
            store = connect()
            try:
                if RANK == 0:
                    main()
                    send(None)
                else:
                    while (job := receive()) is not None:
                        follow(*job)
                dist.destroy_process_group()
            except BaseException as error:
                first, lost = is_first(store), is_lost_peer(error)
                if lost and not first or RANK and isinstance(error, UserError | KeyboardInterrupt):
                    sys.exit(1)  # another process says why
                if lost:
                    raise UserError(ENDED) from None
                raise

        return wrapped

    return decorate


def connect() -> dist.Store:
    """Meet the other processes; the store that they share. Raises UserError where they are not found."""
    # before any thread starts that could take it instead of end_when_told()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        store, rank, processes = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes of this run did not meet: {error}") from None
    threading.Thread(target=end_when_told, args=(store,), daemon=True).start()
    return store


def end_when_told(store: dist.Store) -> None:
    """On SIGTERM, by which torchrun ends those that a dead process left, even where they wait in C."""
    signal.sigwait({signal.SIGTERM})
    if is_first(store):
        print(f"error: {ENDED}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_S)  # while this process may be saying it itself
    os._exit(1)


def is_first(store: dist.Store) -> bool:
    """Whether no other process has asked this; where none can answer, true of process 1."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:
        return RANK == 1


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is that of a connection to another process. Gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


# ---- what is sent ------------------------------------------------------------------------------


def send(job: tuple | None, kind: str = "cpu") -> None:
    """Give a job to the other processes, who put its tensors on a device of the kind, cpu or cuda.

    Raises UserError where a machine has more processes than GPUs.
    """
    if PROCESSES == 1:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda" and local > torch.cuda.device_count():
        raise UserError(f"{local} processes for {torch.cuda.device_count()} GPUs; start one a GPU")
    buffer = io.BytesIO()
    torch.save(job, buffer)
    dist.broadcast_object_list([kind, buffer.getvalue()])


def receive() -> tuple | None:
    """The next job of process 0. What several of its entries share, they share here too."""
    box = [None, None]
    dist.broadcast_object_list(box)
    # process 0 of the same run wrote it: code is no more foreign than the script itself
    return torch.load(io.BytesIO(box[1]), map_location=box[0], weights_only=False)


# ---- inside a step -----------------------------------------------------------------------------


def share_of(batch_size: int) -> slice:
    """This process's part of each batch; raises UserError where one would have none."""
    if batch_size < PROCESSES:
        raise UserError(f"a batch of {batch_size} images is too small for {PROCESSES} processes")
    low, high = (batch_size * rank // PROCESSES for rank in (RANK, RANK + 1))
    return slice(low, high)


def total(*values: float) -> list[float]:
    """The sums over all processes."""
    if PROCESSES == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def replicated(model: nn.Module) -> nn.Module:
    """The model, its gradients averaged over the processes, its batch statistics of the whole batch.

    It shares the weights of `model`.
    """
    if PROCESSES == 1:
        return model
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place; torch has it for GPUs alone
    else:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.forward = functools.partial(batch_norm, part)
    return DistributedDataParallel(model, forward_sync_buffers=False)


def batch_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A batch norm's forward pass on the CPU; in training, over the batch of all processes."""
    if not norm.training:
        return type(norm).forward(norm, x)
    norm.num_batches_tracked.add_(1)
    mean, variance = torch.batch_norm_update_stats(x.detach(), None, None, 0.0)
    count = x.numel() // x.shape[1]
    moments = torch.stack([torch.ones_like(mean), mean, variance + mean.square()]).double() * count
    dist.all_reduce(moments)
    count, mean = moments[0, 0].item(), (moments[1] / moments[0]).to(x.dtype)
    variance = (moments[2] / moments[0] - (moments[1] / moments[0]).square()).to(x.dtype)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return GlobalBatchNorm.apply(x, norm.weight, norm.bias, mean, variance, count, norm.eps)


class GlobalBatchNorm(torch.autograd.Function):
    """Normalizing by the statistics of all processes, and its gradient.

    Source: Ioffe and Szegedy, arXiv 1502.03167, section 3, with the sums of the backward pass taken
    over all processes too: dx = scale (dy - mean(dy) - xhat mean(dy xhat)), scale = weight / std.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, count, eps):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.count, ctx.eps = count, eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, variance = ctx.saved_tensors
        fixed = (weight, mean, variance, None, None, False, ctx.eps, [True, True, True])
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(dy, x, *fixed)
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums)
        bias, slope = weight * (variance + ctx.eps).rsqrt() * sums / ctx.count
        dx -= F.batch_norm(x, mean, variance, slope, bias, eps=ctx.eps)
        return dx, dweight, dbias, None, None, None, None

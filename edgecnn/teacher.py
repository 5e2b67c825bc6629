"""A trained network that teaches another one by distillation."""

from pathlib import Path

from torch import nn

from edgecnn.checkpoint import dataset_of, graph_of, load_checkpoint, require_unseen_holdout
from edgecnn.dataset import DataSet
from edgecnn.errors import UserError
from edgecnn.module import module_of
from edgecnn.rewrite import deployed

SAME = ("classes", "shape", "mean", "std")  # of teacher's and student's data set


def load_teacher(path: Path, dataset: DataSet, holdout: bool) -> nn.Module:
    """The network of an FP32 checkpoint of any run, BN folded, in evaluation mode.

    It reads the student's normalized (N, C, H, W) batches as they are. Raises UserError where it was
    trained on another kind of input, or with `holdout` on the images that are held out.
    """
    checkpoint = load_checkpoint(path, "fp32")
    require_unseen_holdout(checkpoint, holdout)
    theirs = dataset_of(checkpoint)
    # only the same pictures have the same tenth held out
    keys = (*SAME, "fingerprint") if holdout else SAME
    other = [key for key in keys if getattr(theirs, key) != getattr(dataset, key)]
    if other:
        raise UserError(
            f"{path} cannot teach here: its data set {theirs.name} differs in {', '.join(other)} "
            f"from {dataset.name}; give a teacher that was trained on the same --data"
        )
    return module_of(*deployed(graph_of(checkpoint), checkpoint["tensors"])).eval()

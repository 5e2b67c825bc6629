"""Each C kernel, compiled here, against exact integers over shapes, strides, paddings, zero points."""

import itertools

import numpy as np
import pytest
from deploying import conv, differing_step, ended, random_checkpoint, random_images

from edgecnn.deploy import kernels
from edgecnn.deploy.integer import exact_values
from edgecnn.deploy.plan import planned
from edgecnn.graph import INPUT, Graph, Node

DENSE = ("conv_direct", "conv_winograd")


def pool(source, kernel=(2, 2), stride=(2, 2), padding=(0, 0), name="pool"):
    options = {"kernel": list(kernel), "stride": list(stride), "padding": list(padding)}
    return Node(name, "max_pool", (source,), options)


def check(library, graph, storages, zeros=0.0, clamped=False, seed=0):
    """Every step of every storage gives exact integers; the kernels that ran."""
    checkpoint = random_checkpoint(graph, seed, zeros, clamped)
    image, ran = random_images(graph, 1, seed)[0], set()
    for storage in storages:
        plan = planned(checkpoint, storage)
        ran |= {step.kernel for step in plan.steps}
        assert differing_step(library, plan, checkpoint, image) is None, storage
    return ran


# (C, H, W), outputs, kernel, stride, padding
CONVOLUTIONS = [
    ((1, 9, 7), 1, (3, 3), (1, 1), (1, 1)),
    ((4, 8, 6), 4, (3, 3), (1, 1), (1, 1)),
    ((8, 7, 9), 6, (3, 3), (1, 1), (1, 1)),
    ((12, 5, 5), 2, (3, 3), (1, 1), (0, 0)),
    ((4, 9, 21), 5, (3, 3), (2, 2), (1, 1)),
    ((16, 6, 10), 9, (1, 1), (1, 1), (0, 0)),
    ((6, 9, 9), 3, (1, 1), (2, 2), (0, 0)),
    ((3, 12, 11), 7, (5, 5), (1, 1), (2, 2)),
    ((5, 13, 8), 8, (10, 4), (2, 2), (5, 1)),
    ((2, 8, 8), 3, (2, 3), (1, 2), (0, 2)),
    ((4, 6, 6), 3, (1, 1), (1, 1), (1, 1)),
    ((16, 8, 33), 4, (1, 1), (1, 1), (1, 0)),
    ((8, 4, 4), 8, (3, 3), (3, 3), (1, 1)),
    ((2, 17, 12), 3, (5, 5), (3, 2), (2, 2)),
]


@pytest.mark.parametrize("shape, outputs, kernel, stride, padding", CONVOLUTIONS)
def test_convolutions_equal_exact_integers(library, shape, outputs, kernel, stride, padding):
    """Of the image, of a map whose zero point is not 0 and of one whose is; with all that fuses."""
    window = kernel, stride, padding
    first = conv("first", INPUT, outputs, *window)
    for zeros, activation in itertools.product((0.0, 0.7, 1.0), ("none", "relu")):
        front = conv("front", INPUT, shape[0], (1, 1), activation=activation)
        plain = (front, conv("layer", "front", outputs, *window))
        pooled = (*plain, pool("layer"))
        other = conv("other", "front", outputs, *window, activation=activation)
        added = (
            front,
            other,
            plain[1],
            Node("sum", "add", ("layer", "other"), {"activation": "relu"}),
        )
        for nodes in ((first,), plain, pooled, added):
            graph = ended(shape, *nodes)
            check(library, graph, ("sparse", *DENSE), zeros)


def test_every_kernel_runs_in_these_tests(library):
    graph = ended(
        (4, 8, 8),
        conv("a", INPUT, 8, (3, 3), padding=(1, 1)),
        conv("b", "a", 8, (3, 3), padding=(1, 1)),
        conv("c", "b", 8, (3, 3), padding=(1, 1), groups=8),
    )
    ran = check(library, graph, ("sparse", *DENSE))
    assert ran >= {"conv_direct", "conv_winograd", "conv_sparse", "conv_depthwise", "avg_pool"}


@pytest.mark.parametrize("channels, outputs", [(8, 8), (6, 6), (3, 6), (4, 8)])
@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((3, 3), (2, 1), (0, 2))]
    + [((5, 5), (1, 1), (2, 2)), ((2, 3), (1, 3), (1, 0)), ((3, 3), (3, 3), (1, 1))],
)
def test_depthwise_equals_exact_integers(library, channels, outputs, kernel, stride, padding):
    for activation, size in itertools.product(("none", "relu"), ((7, 10), (6, 5))):
        window = kernel, stride, padding, channels
        front = conv("front", INPUT, channels, (1, 1), activation=activation)
        first = conv("first", INPUT, outputs, *window)
        for nodes in ((first,), (front, conv("layer", "front", outputs, *window))):
            check(library, ended((channels, *size), *nodes), ("dense",))


@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 3), (32, 4), (255, 5), (1030, 9)])
@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.99, 1.0])
def test_linear_layers_equal_exact_integers(library, inputs, outputs, zeros):
    nodes = [Node("flat", "flatten", (INPUT,))]
    nodes.append(Node("a", "linear", ("flat",), {"outputs": outputs, "bias": 1}))
    nodes.append(Node("b", "linear", ("a",), {"outputs": 3, "bias": 1}))
    ran = check(library, Graph((1, 1, inputs), tuple(nodes)), ("dense", "sparse"), zeros)
    assert {"linear_dense", "linear_sparse"} <= ran


@pytest.mark.parametrize("channels", [1, 4, 7])
@pytest.mark.parametrize(
    "kernel, stride, padding", [((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 1))]
)
def test_pools_equal_exact_integers(library, channels, kernel, stride, padding):
    average = Node("avg", "avg_pool", ("pool",), {"kernel": [2, 3], "stride": [1, 2]})
    graph = ended((channels, 9, 11), pool(INPUT, kernel, stride, padding), average)
    assert {"max_pool", "avg_pool", "flip_signs"} <= check(library, graph, ("dense",))


def test_what_cannot_be_fused_is_a_step_of_its_own(library):
    """An addition of the image, one of two pools, a ReLU with two readers, zero points under a ReLU."""
    nodes = [conv("a", INPUT, 3, (3, 3), padding=(1, 1), activation="relu")]
    nodes.append(Node("b", "add", ("a", INPUT), {"activation": "relu6"}))
    nodes += [pool("b", name="c"), pool("b", (3, 3), padding=(1, 1), name="d")]
    nodes.append(Node("e", "add", ("c", "d"), {"activation": "none"}))
    nodes += [Node("f", "relu", ("e",)), Node("g", "add", ("e", "f"), {})]
    nodes.append(conv("h", "g", 4, (3, 3), padding=(1, 1), activation="relu6"))
    nodes.append(pool("h", name="i"))
    for clamped in (False, True):
        ran = check(library, ended((3, 8, 8), *nodes), ("dense", "sparse"), clamped=clamped)
        assert {"add", "clamp", "flip_signs"} <= ran


def test_largest_sums_are_exact(library):
    """All weights and all inputs at their ends, in the widest Winograd layer of the headline network."""
    graph = ended(
        (64, 8, 8),
        *(
            conv("a", INPUT, 64, (1, 1), activation="relu"),
            conv("b", "a", 4, (3, 3), padding=(1, 1)),
        ),
    )
    checkpoint = random_checkpoint(graph)
    checkpoint["tensors"]["a.weight"][:] = 0
    checkpoint["tensors"]["a.bias"][:] = 1e4
    checkpoint["tensors"]["b.weight"][:] = 127
    checkpoint["tensors"]["b.weight"][1] = -127
    for name in ("b", "mean", "logits"):
        checkpoint["quantization"]["activations"][name]["scale"] *= 12
    image = random_images(graph, 1)[0]
    assert (exact_values(checkpoint, image[None])["a"] == 255).all()
    for kernel in (*DENSE, "sparse"):
        assert differing_step(library, planned(checkpoint, kernel), checkpoint, image) is None


def test_gaps_beyond_a_byte_are_bridged():
    rows = np.zeros((2, 2000), np.int8)
    rows[0, [3, 1999]], rows[1, 1000] = (5, -7), 100
    entries, starts = kernels.sparse_entries(rows, np.arange(2000))
    read = []
    for first, last in itertools.pairwise(starts.tolist()):
        pairs = entries[first:last].reshape(-1, 2)
        places = np.cumsum(pairs[:, 0].astype(int))
        values = pairs[:, 1].view(np.int8)
        read.append({int(p): int(v) for p, v in zip(places, values, strict=True) if v})
    assert read == [{3: 5, 1999: -7}, {1000: 100}]
    assert len(entries) == 2 * (2 + 1999 // 255 + 1 + 1000 // 255)


def test_what_a_copy_reads_too_much_of_the_last_channel_is_there():
    """conv_sparse copies COPIED bytes at once, from the first entry of a channel on."""
    g = kernels.Geometry(9, 21, 3, 9, 21, 5, 3, 3, 1, 1, 1, 1, 0)
    weight = np.random.default_rng(0).integers(-9, 10, (5, 3, 3, 3)).astype(np.int8)
    stored = kernels.conv_sparse(g, weight)
    entries, starts = stored.arrays["entries"], stored.arrays["starts"].tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    ends = [
        s + -(-n // kernels.COPIED) * kernels.COPIED for s, n in zip(starts, lengths, strict=False)
    ]
    assert len(entries) >= max(ends)
    band = kernels.conv_sparse(g, 0 * weight).scratch_bytes  # no entries, no copy
    assert stored.scratch_bytes - band == -(-max(lengths) // kernels.COPIED) * kernels.COPIED
    # each of five bands reads the weights once from flash, not at each of its 2 rows x 3 groups
    assert stored.weight_bytes_read == 5 * sum(
        -(-n // kernels.COPIED) * kernels.COPIED for n in lengths
    )

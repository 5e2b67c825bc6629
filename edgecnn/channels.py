"""Whole channels: which go together, and the smaller dense network without the least important ones.

A group is a set of values whose channels can only go together, each with all that makes or reads it.
It follows from the graph, by one rule an operation:

  operation           channels of its output
  conv, linear        new ones
  depthwise conv      its input's; each stands there `outputs / groups` times
  flatten             its input's; each stands there H * W times
  add                 those of both inputs, which become one group
  all others          its input's

The image's channels and the classes never go. A removed channel is zero wherever it goes, so the
smaller network computes what the whole one does with those weights, biases and batch norms at zero.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from edgecnn.energy import weight_prices_pj
from edgecnn.errors import UserError
from edgecnn.graph import (
    INPUT,
    WEIGHTED,
    Graph,
    Node,
    from_plain,
    macs_of,
    shapes_of,
    tensor_shapes,
    weights_of,
)
from edgecnn.rewrite import Tensors, deployed_graph, folded_tensors

# Our kernels and CMSIS-NN take four channels at a time, an Ethos-U keeps maps in bricks of sixteen.
MULTIPLE = 8
TINY = 1e-12  # instead of dividing by nothing
# The sources of the price in instructions. Imported by that price alone, so that what other criteria
# made stands when a kernel changes.
KERNEL_COSTS = ("edgecnn/deploy/plan.py", "edgecnn/deploy/kernel_costs.json")
Cost = Callable[[Graph], float]
Kept = dict[str, torch.Tensor]  # {group: bool (its channels,)}, True where one stays


# ---- groups --------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the channels of a value belong: its channel i is channel i // span of `group`."""

    group: str
    span: int


def is_depthwise(node: Node) -> bool:
    """Whether each output channel of a conv reads one input channel alone."""
    return node.options.get("groups", 1) > 1  # the graph knows no groups between 1 and depthwise


def places_of(graph: Graph) -> dict[str, Place]:
    """{value: its Place}, `input` included. What has to stay whole is in the group `input`."""
    shapes, places = shapes_of(graph), {INPUT: Place(INPUT, 1)}
    joined: dict[str, str] = {}  # group -> the one that it became part of

    def root(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    def join(a: str, b: str) -> None:
        a, b = root(a), root(b)
        if a != b:
            joined.update({a: b} if b == INPUT else {b: a})

    for node in graph.nodes:
        group, span = places[node.inputs[0]]
        if node.op in WEIGHTED and not is_depthwise(node):
            group, span = node.name, 1
        else:
            span *= shapes[node.name][0] // shapes[node.inputs[0]][0]
        for name in node.inputs[1:]:
            join(group, places[name].group)
            if places[name].span != span:  # flat maps of other shapes: no channel meets one other
                join(group, INPUT)
        places[node.name] = Place(group, span)
    join(places[graph.output].group, INPUT)
    return {name: Place(root(group), span) for name, (group, span) in places.items()}


def widths_of(graph: Graph, places: dict[str, Place]) -> dict[str, int]:
    """{group that may shrink: how many channels it has}, in running order."""
    shapes = shapes_of(graph)
    groups = {place.group: shapes[name][0] // place.span for name, place in places.items()}
    return {group: width for group, width in groups.items() if group != INPUT}


# ---- the smaller network -------------------------------------------------------------------------


def resized(graph: Graph, places: dict[str, Place], widths: dict[str, int]) -> Graph:
    """The same nodes, with so many channels in the groups that `widths` names."""

    def resized_node(node: Node) -> Node:
        out, source = places[node.name], places[node.inputs[0]]
        options = dict(node.options)
        if node.op in WEIGHTED and out.group in widths:
            options["outputs"] = widths[out.group] * out.span
        if is_depthwise(node) and source.group in widths:
            options["groups"] = widths[source.group] * source.span
        return replace(node, options=options)

    return replace(graph, nodes=tuple(map(resized_node, graph.nodes)))


def without_channels(graph: Graph, tensors: Tensors, kept: Kept) -> tuple[Graph, Tensors]:
    """The network with the channels of `kept` alone; groups that it does not name stay whole."""
    places, found = places_of(graph), {}

    def chosen(value: str):
        """What indexes the channels of a value that stay."""
        group, span = places[value]
        return kept[group].repeat_interleave(span) if group in kept else slice(None)

    for name in tensor_shapes(graph):
        node = graph[name.rpartition(".")[0]]
        tensor = tensors[name][chosen(node.name)]
        if tensor.ndim > 1 and not is_depthwise(node):
            tensor = tensor[:, chosen(node.inputs[0])]
        found[name] = tensor
    widths = {group: int(mask.sum()) for group, mask in kept.items()}
    return resized(graph, places, widths), found


# ---- which channels go ---------------------------------------------------------------------------


def norm_shares(graph: Graph, tensors: Tensors) -> dict[str, torch.Tensor]:
    """{group: each channel's share of its squared norm}, float64 (C,), of sum 1.

    The mean, over the layers that make or read the group, of the channel's share of the layer's
    squared weights, batch norm folded. Of coupled layers together, as Fang et al., "DepGraph"
    (CVPR 2023), section 3.3; of the layer's own norm, so that no layer outweighs another.
    """
    places, folded = places_of(graph), folded_tensors(graph, tensors)
    found = {group: [] for group in widths_of(graph, places)}
    for node in graph.nodes:
        if node.op not in WEIGHTED:
            continue
        squares = folded[f"{node.name}.weight"].double().square()
        squares = squares.reshape(*squares.shape[:2], -1).sum(2)  # (O, I / groups)
        sides = [(node.name, squares.sum(1))]
        if not is_depthwise(node):
            sides.append((node.inputs[0], squares.sum(0)))
        for value, norms in sides:
            group, span = places[value]
            if group in found:
                norms = norms.view(-1, span).sum(1)
                found[group].append(norms / norms.sum().clamp_min(TINY))
    return {group: torch.stack(shares).mean(0) for group, shares in found.items()}


def macs(graph: Graph) -> int:
    """MACs of one inference, zeros included."""
    return sum(macs_of(graph).values())


def weight_bytes(graph: Graph) -> int:
    """INT8 bytes of all weights; biases and scales, a few an output channel, left out."""
    return sum(weights_of(graph).values())


def energy_pj(graph: Graph) -> float:
    """Picojoules of all weights, in INT8 and in SRAM."""
    prices = weight_prices_pj(graph)
    return sum(n * prices[name] for name, n in weights_of(graph).items())


def instructions(graph: Graph) -> float:
    """Estimated Cortex-M4 instructions of the layers with weights, by our dense kernels."""
    plan = importlib.import_module("edgecnn.deploy.plan")
    return plan.dense_instructions(deployed_graph(graph))


# Criterion -> the network's cost: a channel's share of the norm is divided by how much of it goes along.
CHANNEL_CRITERIA: dict[str, Cost] = {
    "lamp": lambda graph: 0,  # nothing is saved, the share alone decides
    "energy": energy_pj,
    "macs": macs,
    "bytes": weight_bytes,
    "instructions": instructions,
}


def next_width(width: int, multiple: int) -> int:
    """The next smaller multiple; 0 where none is left."""
    return (width - 1) // multiple * multiple


def kept_channels(
    graph: Graph, tensors: Tensors, most_macs: float, multiple: int, cost: Cost
) -> Kept:
    """Which channels stay so that at most `most_macs` are left.

    Of each group the least important channels are the next to go, as many as make its width the next
    smaller multiple; the last multiple stays. In each round that group gives way whose next channels
    have the least share of its remaining norm (LAMP's score, see pruning.lamp_scores) per `cost` saved.
    Once the MACs are few enough, what need not have gone comes back, the last to go first.
    Raises UserError as require_reachable.
    """
    require_reachable(graph, most_macs, multiple)
    places, shares = places_of(graph), norm_shares(graph, tensors)
    ranked = {group: values.sort(stable=True) for group, values in shares.items()}
    whole = widths_of(graph, places)
    widths, left, gone = dict(whole), graph, []

    def loss(group: str, before: float) -> float:
        """Share of the group's remaining norm, per cost saved, of its next channels."""
        smaller = widths | {group: next_width(widths[group], multiple)}
        remaining = ranked[group].values[whole[group] - widths[group] :]
        share = remaining[: widths[group] - smaller[group]].sum() / remaining.sum().clamp_min(TINY)
        saved = before - cost(resized(graph, places, smaller))
        return float(share) / max(saved, TINY)  # what saves nothing comes last

    while macs(left) > most_macs:
        open_groups = [group for group, width in widths.items() if next_width(width, multiple)]
        group = min(open_groups, key=functools.partial(loss, before=cost(left)))
        widths[group] = next_width(widths[group], multiple)
        left = resized(graph, places, widths)
        gone.append(group)
    for group in reversed(gone):
        width = min(whole[group], (widths[group] // multiple + 1) * multiple)
        if macs(resized(graph, places, widths | {group: width})) <= most_macs:
            widths[group] = width
    kept = {group: torch.ones(width, dtype=torch.bool) for group, width in whole.items()}
    for group, mask in kept.items():
        mask[ranked[group].indices[: whole[group] - widths[group]]] = False
    return kept


def require_reachable(graph: Graph, most_macs: float, multiple: int) -> None:
    """Raise UserError, with what to do, where more MACs are left with `multiple` channels a group."""
    places = places_of(graph)
    least = {group: min(width, multiple) for group, width in widths_of(graph, places).items()}
    left = resized(graph, places, least)
    if macs(left) <= most_macs:
        return
    if left == graph:
        finer = ", or a smaller --multiple" if multiple > 1 else ""
        raise UserError(
            f"no channel can go: every group has at most {multiple} channels, or holds the image's "
            f"or the classes; take --structure weights{finer}"
        )
    raise UserError(
        f"with {multiple} channels left in every group {macs(left):,} of {macs(graph):,} MACs remain, "
        "no fewer; give a lower --sparsity or a smaller --multiple"
    )


def prune_channels(
    checkpoint: dict, most_macs: float, criterion: str, multiple: int
) -> tuple[Graph, Tensors]:
    """The network of a loaded FP32 checkpoint with at most `most_macs`, as `kept_channels` chooses.

    Says what is left. Raises UserError where its weights were pruned before, whose zeros would come
    back in training, and where its MACs are so few already, or cannot be.
    """
    graph, tensors = from_plain(checkpoint["graph"]), checkpoint["tensors"]
    name, before = checkpoint["provenance"].get("variant", "the checkpoint"), macs(graph)
    if "pruned" in checkpoint["provenance"]["method"]:
        raise UserError(f"{name} has lost weights; take channels first, then weights")
    if before <= most_macs:
        raise UserError(f"{name} has {before:,} MACs already; give a higher --sparsity")
    kept = kept_channels(graph, tensors, most_macs, multiple, CHANNEL_CRITERIA[criterion])
    counts = ", ".join(f"{group} {int(m.sum())} of {len(m)}" for group, m in kept.items())
    smaller, tensors = without_channels(graph, tensors, kept)
    print(f"{macs(smaller):,} of {before:,} MACs are left; channels: {counts}")
    return smaller, tensors

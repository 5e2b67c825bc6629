"""The network as data: shapes by arithmetic, files checked value by value, exact rewrites, its text."""

import re

import pytest
import torch
from foreign_networks import FOREIGN, SHAPES, captured

from edgecnn.describe import describe
from edgecnn.graph import (
    MAX_NODES,
    Graph,
    GraphError,
    Node,
    from_plain,
    macs_of,
    shapes_of,
    tensor_shapes,
    to_plain,
)
from edgecnn.module import module_of
from edgecnn.rewrite import deployed, deployed_graph, folded_tensors, pool_before_relu

CONV = {"outputs": 4, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1], "groups": 1, "bias": 0}


def node(name, op, *inputs, **options):
    return {"name": name, "op": op, "inputs": list(inputs), "options": options}


def plain(*nodes, shape=(3, 9, 10)):
    return {"input_shape": list(shape), "nodes": list(nodes)}


def small():
    """conv -> batch norm -> relu -> pool -> flatten -> linear, as a file holds it."""
    return plain(
        node("a", "conv", "input", **CONV),
        node("n", "batch_norm", "a", eps=1e-5, momentum=0.1),
        node("r", "relu", "n"),
        node("p", "max_pool", "r", kernel=[2, 2], stride=[2, 2], padding=[0, 0]),
        node("f", "flatten", "p"),
        node("out", "linear", "f", outputs=5, bias=1),
    )


# ---- shapes and tensors ----------------------------------------------------------------------------


def test_shapes_tensors_and_macs_by_arithmetic():
    graph = from_plain(small())
    assert shapes_of(graph) == {
        "input": (3, 9, 10),
        "a": (4, 9, 10),
        "n": (4, 9, 10),
        "r": (4, 9, 10),
        "p": (4, 4, 5),
        "f": (80,),
        "out": (5,),
    }
    norms = {f"n.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
    linear = {"out.weight": (5, 80), "out.bias": (5,)}
    assert tensor_shapes(graph) == {"a.weight": (4, 3, 3, 3)} | norms | linear
    assert macs_of(graph) == {"a": 4 * 27 * 90, "out": 400}
    assert (
        graph.output == "out" and graph["p"].op == "max_pool" and graph.users("n") == [graph["r"]]
    )
    with pytest.raises(KeyError):
        graph["input"]


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_windows_are_those_of_torch(kernel, stride, padding):
    options = {"kernel": (kernel, 2), "stride": (stride, 1), "padding": (padding, 1)}
    nodes = [Node("a", "conv", ("input",), {"outputs": 6, "groups": 3, "bias": 1} | options)]
    if 2 * padding <= kernel and padding < kernel:
        nodes.append(Node("p", "max_pool", ("input",), options))
    for one in nodes:
        graph = Graph((3, 11, 8), (one,))
        expected = module_of(graph)(torch.zeros(1, 3, 11, 8)).shape[1:]
        assert shapes_of(graph)[one.name] == tuple(expected)


@pytest.mark.parametrize("name", SHAPES)
def test_plain_values_are_the_graph(name):
    graph = captured(name)[0]
    assert from_plain(to_plain(graph)) == graph
    assert from_plain(to_plain(deployed_graph(graph))) == deployed_graph(graph)
    assert deployed_graph(deployed_graph(graph)) == deployed_graph(graph)


# ---- files that are no network ---------------------------------------------------------------------


def edited(path, value):
    """`small()` with one value replaced, or dropped where the value is None."""
    tree = part = small()
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return tree


A, NORM = ("nodes", 0), ("nodes", 1)
WRONG = [
    (["input_shape"], None, "no graph"),
    (["extra"], 1, "no graph"),
    (["input_shape"], [3, 9], r"not \[C, H, W\]"),
    (["input_shape"], [3, 9, 10.0], r"not \[C, H, W\]"),
    (["input_shape"], [True, 9, 10], r"not \[C, H, W\]"),
    (["input_shape"], [3, 0, 10], r"not \[C, H, W\]"),
    (["input_shape"], [3, 60_000, 60_000], "image is too large"),
    (["input_shape"], [1, 4000, 4000], r"a \(conv\): its output is too large"),
    (["input_shape"], [3, 2000, 2000], "too many weights"),
    (["input_shape"], [3, 1, 1], "p .*too small"),
    (["nodes"], [], "no list"),
    (["nodes"], [small()["nodes"][0]] * (MAX_NODES + 1), "no list"),
    (A, "conv", "no node"),
    ([*A, "name"], None, "no node"),
    ([*A, "code"], "1", "no node"),
    ([*A, "name"], "input", "stands twice"),
    ([*A, "name"], "out", "inputs"),
    ([*A, "name"], "a; rm -rf", "proper name"),
    ([*A, "name"], "a..b", "proper name"),
    ([*A, "name"], "a\n", "proper name"),
    ([*A, "name"], "a" * 300, "proper name"),
    ([*A, "name"], 3, "proper name"),
    ([*A, "op"], "eval", "unknown operation"),
    ([*A, "op"], ["conv"], "unknown operation"),
    ([*A, "inputs"], [], "1 earlier"),
    ([*A, "inputs"], ["n"], "1 earlier"),
    ([*A, "inputs"], ["input", "input"], "1 earlier"),
    ([*A, "inputs"], [["input"]], "1 earlier"),
    ([*A, "options"], [], "options are not"),
    ([*A, "options", "stride"], None, "options are not"),
    ([*A, "options", "dilation"], [1, 1], "options are not"),
    ([*A, "options", 7], 1, "options are not"),
    ([*A, "options", "outputs"], 0, "not a whole number from 1"),
    ([*A, "options", "outputs"], 10**9, "not a whole number from 1"),
    ([*A, "options", "kernel"], [3], "not two whole numbers from 1"),
    ([*A, "options", "kernel"], [3, -1], "not two whole numbers from 1"),
    ([*A, "options", "kernel"], [99, 3], "too small"),
    ([*A, "options", "stride"], [1, True], "not two whole numbers from 1"),
    ([*A, "options", "padding"], "same", "'same', not two whole numbers from 0"),
    ([*A, "options", "groups"], 2, "groups 2"),
    ([*A, "options", "bias"], 2, "bias is 2, not 0 or 1"),
    ([*A, "options", "activation"], "silu", "activation"),
    ([*A, "options", "activation"], ["relu"], "activation"),
    ([*NORM, "options", "eps"], float("nan"), "eps is nan, not a float above 0 and below 1"),
    ([*NORM, "options", "momentum"], 1, "momentum is 1, not a float above 0"),
    ([*NORM, "inputs"], ["input"], "a"),
    (["nodes", 2, "inputs"], ["a"], "nothing reads n|follow"),
    (["nodes", 2, "options", "activation"], "relu", "options are not none"),
    (["nodes", 3, "options", "padding"], [2, 2], "pads too much"),
    (["nodes", 3, "inputs"], ["a"], "nothing reads r|follow"),
    (["nodes", 4, "op"], "relu", "flatten the map"),
]


@pytest.mark.parametrize("path, value, message", WRONG)
def test_a_wrong_value_is_refused(path, value, message):
    with pytest.raises(GraphError, match=message) as error:
        from_plain(edited(path, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 3, [], "graph", {}])
def test_what_is_no_graph_is_refused(value):
    with pytest.raises(GraphError):
        from_plain(value)


def test_a_map_at_the_end_and_unequal_sums_are_refused():
    conv = node("a", "conv", "input", **CONV)
    with pytest.raises(GraphError, match="not one number a class"):
        from_plain(plain(conv))
    with pytest.raises(GraphError, match=r"s \(add\): adds \(4, 9, 10\) and \(3, 9, 10\)"):
        from_plain(plain(conv, node("s", "add", "a", "input"), node("f", "flatten", "s")))


def test_names_that_torch_has_a_use_for_are_refused_when_rebuilt():
    for name in ("half", "training", "_modules", "_graph", "out.weight", "__class__"):
        tree = small()
        tree["nodes"][4]["name"] = name
        tree["nodes"][5]["inputs"] = [name]
        if name == "out.weight":  # below a layer, where its tensor stands
            tree["nodes"][4:] = [
                node("out", "conv", "p", **CONV),
                node(name, "flatten", "out"),
                node("end", "linear", name, outputs=5, bias=1),
            ]
        with pytest.raises(GraphError, match="use for the name"):
            module_of(from_plain(tree))


# ---- rewrites --------------------------------------------------------------------------------------


def test_pool_before_relu_keeps_values_and_gradients_to_the_bit():
    pool = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1]}
    for relu in ("relu", "relu6"):
        tree = plain(
            node("a", "conv", "input", **CONV),
            node("r", relu, "a"),
            node("p", "max_pool", "r", **pool),
            node("q", "max_pool", "p", **pool),
            node("f", "flatten", "q"),
        )
        before = from_plain(tree)
        after = from_plain(to_plain(pool_before_relu(before)))
        assert [n.name for n in after.nodes] == ["a", "p", "q", "r", "f"]
        network = module_of(before)
        with torch.no_grad():
            network.a.weight.mul_(20)  # so that ReLU6 has something to cut
        other = module_of(after, dict(network.state_dict()))
        x = torch.randn(4, 3, 9, 10)
        x[0] = 0  # ties
        y, z = network(x), other(x)
        factor = torch.randn_like(y)
        (y * factor).sum().backward()
        (z * factor).sum().backward()
        assert torch.equal(y, z) and (relu == "relu" or (y == 6).any())
        assert torch.equal(network.a.weight.grad, other.a.weight.grad)


def test_a_relu_whose_input_has_other_readers_stays_where_it_is():
    tree = plain(
        node("a", "conv", "input", **CONV),
        node("r", "relu", "a"),
        node("s", "add", "a", "r"),
        node("t", "relu6", "s"),
        node("u", "relu", "t"),
        node("p", "max_pool", "u", kernel=[2, 2], stride=[2, 2], padding=[0, 0]),
        node("f", "flatten", "p"),
        node("v", "relu", "f"),
    )
    graph = from_plain(tree)
    small = deployed_graph(graph)
    found = [(n.name, n.options.get("activation")) for n in small.nodes]
    assert found == [("a", "none"), ("r", None), ("s", "relu6"), ("p", None), ("f", None)]
    network = module_of(graph).eval()
    x = 5 * torch.randn(2, 3, 9, 10)
    twin = module_of(small, folded_tensors(graph, dict(network.state_dict()))).eval()
    assert torch.equal(network(x), twin(x))
    assert " ".join(n.name for n in pool_before_relu(graph).nodes) == "a r s p t u f v"


@pytest.mark.parametrize("name", SHAPES)
def test_deployed_graphs_hold_what_devices_know(name):
    graph, tensors = captured(name)
    small, folded = deployed(graph, tensors)
    allowed = "conv linear add relu relu6 max_pool avg_pool global_avg_pool flatten".split()
    assert all(n.op in allowed for n in small.nodes)
    assert not any(n.op in ("relu", "relu6") for n in small.nodes)
    assert {n: tuple(t.shape) for n, t in folded.items()} == tensor_shapes(small)
    assert all(f"{n}.bias" in folded for n in macs_of(small))
    assert macs_of(small) == macs_of(graph)


def test_folding_keeps_zero_weights():
    graph, tensors = captured("odd_resnet")
    tensors = dict(tensors)
    tensors["layer1.conv1.weight"] = tensors["layer1.conv1.weight"].clone()
    tensors["layer1.conv1.weight"][2] = 0
    folded = folded_tensors(graph, tensors)
    assert (folded["layer1.conv1.weight"][2] == 0).all()


# ---- its text --------------------------------------------------------------------------------------


def test_description_adds_up():
    for name in ("resnet8", *FOREIGN):
        graph, tensors = captured(name)
        text = describe(graph, tensors)
        macs = [
            int(n.replace(",", ""))
            for n in re.findall(r"(\d[\d,]*)  +[\d,]+  +\d+\.\d$", text, re.M)
        ]
        assert macs[-1] == sum(macs[:-1]) == sum(macs_of(graph).values())
        assert all(name in text for name in macs_of(graph))
    text = describe(*captured("resnet8"))
    assert re.search(
        r"^stack2.shortcut +conv 1x1 stride 2x2 +32x16x16 +131,072 +544 +0\.0$", text, re.M
    )
    assert re.search(r"^stack1.add +add, relu +16x32x32$", text, re.M)
    assert "at most 49,152 (48.0 KiB in INT8)" in text  # 3 maps of 16 x 32 x 32 at the first add
    assert "zeros" not in describe(captured("resnet8")[0])


def test_description_counts_zeros():
    graph, tensors = captured("linear_only")
    tensors = tensors | {"middle.weight": torch.zeros(16, 24)}
    lines = {line.split()[0]: line.split()[-1] for line in describe(graph, tensors).splitlines()}
    assert lines["middle"] == "100.0" and lines["hidden"] == "0.0"
    assert lines["total"] == f"{100 * 384 / (64 * 24 + 384 + 64):.1f}"

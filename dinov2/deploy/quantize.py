"""INT8: ranges of activations from real images, and quantisation of the backbone's linear layers in an ONNX graph.

Symmetric, one scale per output channel of a weight and one per activation, written as QuantizeLinear and
DequantizeLinear around the matrix products of linear layers in blocks: what ONNX Runtime, OpenVINO and TensorRT all
take. The patch embedding, the products of attention, norms and heads keep their precision.

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(2018); Migacz, "8-bit Inference with TensorRT" (2017), on ranges by entropy; Xiao et al., "SmoothQuant" (2023).
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinov2.deploy.graph import module_of, with_outputs
from dinov2.deploy.runtimes import Arrays, Session

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

RANGES = ("minmax", "percentile", "entropy")
PERCENTILE = 99.99
ENOUGH_IMAGES = 500
LEVELS = 127
SMOOTHNESS = 0.5  # how much of the difficulty goes from activations into weights
_BINS = 2048
_IN_BLOCK = re.compile(r"(^|\.)blocks\.\d+\.")


@dataclass(frozen=True)
class LinearProduct:
    """The matrix product of a linear layer.

    Attributes:
        layer: name of the module.
        place: of the node in the graph.
        activation: name of the tensor ``[..., K]`` that comes in.
        weight: name of the initializer ``[K, N]``.
    """

    layer: str
    place: int
    activation: str
    weight: str


def linear_products(graph: "onnx.ModelProto", keep: Sequence[str] = ()) -> list[LinearProduct]:
    """Those that are quantised.

    Args:
        graph: of `write_graph`.
        keep: layers that are not, by the beginning of their names, such as ``backbone.blocks.11``.

    Raises:
        ValueError: nothing in the graph begins like an entry of ``keep``, or nothing is left to quantise.
    """
    weights = {tensor.name: len(tensor.dims) for tensor in graph.graph.initializer}
    products = [
        LinearProduct(module_of(node.name), place, node.input[0], node.input[1])
        for place, node in enumerate(graph.graph.node)
        if node.op_type == "MatMul" and weights.get(node.input[1]) == 2 and _IN_BLOCK.search(module_of(node.name))
    ]
    for start in keep:
        if not any(_begins(product.layer, start) for product in products):
            shown = ", ".join(product.layer for product in products[:4])
            raise ValueError(f"keep={start}: no quantised layer is called so; they are {shown}, …")
    left = [product for product in products if not any(_begins(product.layer, start) for start in keep)]
    if products and not left:
        raise ValueError(f"keep={','.join(keep)} leaves no linear layer to be int8: keep fewer, or export as fp32")
    if not left:
        raise ValueError("the graph has no linear layer in a block of a backbone that could be int8: export it as fp32")
    return left


def _begins(layer: str, start: str) -> bool:
    return f"{layer}.".startswith(start.rstrip(".") + ".")


def calibrate(
    graph: "onnx.ModelProto",
    open_session: Callable[[bytes], Session],
    batches: Sequence[Arrays],
    ranges: str = "percentile",
) -> dict[str, float]:
    """Largest magnitude that the activation before each linear layer keeps, by name of the layer.

    Args:
        graph: in float32.
        open_session: loads a graph.
        batches: of real images, as the graph takes them; they are gone through twice.
        ranges: ``minmax`` for the largest of all images; ``percentile`` for what all but 0.01 % are below;
            ``entropy`` for the least loss of information about how values are spread.

    Raises:
        ValueError: for other ranges.
    """
    if ranges not in RANGES:
        raise ValueError(f"ranges={ranges!r} is unknown; allowed: {', '.join(RANGES)}")
    layers = {product.layer: product.activation for product in linear_products(graph)}
    names = sorted(set(layers.values()))
    session = open_session(with_outputs(graph, names).SerializeToString())
    largest = dict.fromkeys(names, 0.0)
    for batch in batches:
        found = session.run(batch)
        largest = {name: max(value, float(np.abs(found[name]).max())) for name, value in largest.items()}
    if ranges == "minmax":
        return {layer: largest[name] for layer, name in layers.items()}
    histograms = {name: np.zeros(_BINS, dtype=np.int64) for name in names}
    for batch in batches:
        found = session.run(batch)
        for name, histogram in histograms.items():
            histogram += np.histogram(np.abs(found[name]), bins=_BINS, range=(0, max(largest[name], 1e-12)))[0]
    choose = _percentile_bin if ranges == "percentile" else _entropy_bin
    return {layer: largest[name] * choose(histograms[name]) / _BINS for layer, name in layers.items()}


def _percentile_bin(histogram: NDArray[np.int64]) -> int:
    shares = np.cumsum(histogram) / histogram.sum()
    return int(np.searchsorted(shares, PERCENTILE / 100)) + 1


def _entropy_bin(histogram: NDArray[np.int64]) -> int:
    """Number of bins whose 128 levels tell most of how values are spread (the least Kullback-Leibler divergence)."""
    counts = histogram.astype(np.float64)
    best, least = _BINS, np.inf
    for end in range(LEVELS + 1, _BINS + 1, 16):
        clipped = counts[:end].copy()
        kept = clipped > 0
        level = np.arange(end) * (LEVELS + 1) // end
        sums = np.bincount(level, weights=counts[:end], minlength=LEVELS + 1)
        filled = np.bincount(level, weights=kept, minlength=LEVELS + 1)
        spread = np.where(kept, (sums / np.maximum(filled, 1))[level], 0)
        clipped[-1] += counts[end:].sum()
        first, second = clipped / clipped.sum(), spread / max(spread.sum(), 1e-12)
        both = (first > 0) & (second > 0)
        lost = first[(first > 0) & (second == 0)].sum()  # what no level stands for
        divergence = float((first[both] * np.log(first[both] / second[both])).sum() + 10 * lost)
        if divergence < least:
            best, least = end, divergence
    return best


def smoothing_factors(
    graph: "onnx.ModelProto", open_session: Callable[[bytes], Session], batches: Sequence[Arrays]
) -> dict[str, NDArray[np.float32]]:
    """What each channel of an activation is divided by, ``[K]`` by layer: large channels lose, small ones gain.

    Only activations that come out of a LayerNorm, which scales them anyway, can be.

    Args:
        graph: in float32.
        open_session: loads a graph.
        batches: of real images, as the graph takes them.
    """
    import onnx

    products = _behind_norms(graph)
    session = open_session(with_outputs(graph, [product.activation for product in products]).SerializeToString())
    largest: dict[str, NDArray[np.float32]] = {}
    for batch in batches:
        found = session.run(batch)
        for product in products:
            value = np.abs(found[product.activation]).reshape(-1, found[product.activation].shape[-1]).max(axis=0)
            largest[product.layer] = np.maximum(largest.get(product.layer, value), value)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    factors = {}
    for product in products:
        rows = np.abs(onnx.numpy_helper.to_array(stored[product.weight])).max(axis=1)
        factor = np.maximum(largest[product.layer], 1e-6) ** SMOOTHNESS / np.maximum(rows, 1e-6) ** (1 - SMOOTHNESS)
        factors[product.layer] = (factor / np.exp(np.log(factor).mean())).astype(np.float32)
    return factors


def smooth(graph: "onnx.ModelProto", factors: Mapping[str, NDArray[np.float32]]) -> "onnx.ModelProto":
    """The same function with smoother activations: norms are divided, and the weights behind them multiplied."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(graph)
    norms = {node.output[0]: node for node in result.graph.node if node.op_type == "LayerNormalization"}
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    for product in _behind_norms(graph):
        factor = factors[product.layer].astype(stored[product.weight].dtype)
        norm, node = norms[product.activation], result.graph.node[product.place]
        changed = {f"{product.layer}/smooth": stored[product.weight] * factor[:, None]}
        node.input[1] = f"{product.layer}/smooth"
        for place, name in enumerate(norm.input[1:], start=1):  # norms share what is equal: new ones for each
            changed[f"{product.layer}/norm_{place}"] = stored[name] / factor
            norm.input[place] = f"{product.layer}/norm_{place}"
        result.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in changed.items())
    _drop_unused(result)
    return result


def _behind_norms(graph: "onnx.ModelProto") -> list[LinearProduct]:
    norms = {node.output[0] for node in graph.graph.node if node.op_type == "LayerNormalization"}
    readers = Counter(name for node in graph.graph.node for name in node.input)
    return [
        product
        for product in linear_products(graph)
        if product.activation in norms and readers[product.activation] == 1
    ]


def _drop_unused(graph: "onnx.ModelProto") -> None:
    used = {name for node in graph.graph.node for name in node.input}
    tensors = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(tensors)


def quantize(graph: "onnx.ModelProto", largest: Mapping[str, float], keep: Sequence[str] = ()) -> "onnx.ModelProto":
    """The graph with quantised linear layers; its other operations, inputs and outputs keep their types.

    Args:
        graph: in float32 or half precision.
        largest: of `calibrate`, of the same network in float32.
        keep: see `linear_products`.
    """
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(graph)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    added: list[onnx.TensorProto] = []
    before: dict[int, list[onnx.NodeProto]] = {}
    done: dict[str, str] = {}

    def add(name: str, values: NDArray[Any]) -> str:
        added.append(onnx.numpy_helper.from_array(values, name))
        return name

    for product in linear_products(graph, keep):
        nodes = before.setdefault(product.place, [])
        tensor = stored[product.weight]
        weight = onnx.numpy_helper.to_array(tensor)
        kind = weight.dtype
        node = result.graph.node[product.place]
        if product.activation not in done:
            name = f"{product.activation}/int8"
            step = np.array(max(largest[product.layer], 1e-12) / LEVELS, dtype=kind)
            scale, zero = add(f"{name}/scale", step), add(f"{name}/zero", np.array(0, np.int8))
            for operation, source, target in (
                ("QuantizeLinear", product.activation, name),
                ("DequantizeLinear", name, f"{name}/back"),
            ):
                nodes.append(
                    onnx.helper.make_node(
                        operation, [source, scale, zero], [target], name=f"{product.layer}/{operation}_{product.place}"
                    )
                )
            done[product.activation] = f"{name}/back"
        name = f"{product.weight}/int8"
        if name not in done:
            steps = np.maximum(np.abs(weight.astype(np.float32)).max(axis=0), 1e-12) / LEVELS  # [N]
            steps = np.maximum(steps, np.finfo(kind).tiny).astype(kind)
            values = np.clip(np.rint(weight.astype(np.float32) / steps.astype(np.float32)), -LEVELS, LEVELS)
            inputs = [
                add(name, values.astype(np.int8)),
                add(f"{name}/scale", steps),
                add(f"{name}/zero", np.zeros(len(steps), np.int8)),
            ]
            nodes.append(
                onnx.helper.make_node(
                    "DequantizeLinear", inputs, [f"{name}/back"], axis=1, name=f"{product.layer}/Weight_{product.place}"
                )
            )
            done[name] = f"{name}/back"
        node.input[0], node.input[1] = done[product.activation], done[name]
    nodes_in_order = [entry for place, node in enumerate(result.graph.node) for entry in (*before.get(place, ()), node)]
    del result.graph.node[:]
    result.graph.node.extend(nodes_in_order)
    result.graph.initializer.extend(added)
    _drop_unused(result)
    onnx.checker.check_model(result, full_check=True)
    return result


def sensitivity(
    graph: "onnx.ModelProto",
    largest: Mapping[str, float],
    open_session: Callable[[bytes], Session],
    batch: Arrays,
) -> list[tuple[str, float]]:
    """How far outputs move when a single layer is quantised, the most sensitive first.

    Args:
        graph: in float32.
        largest: of `calibrate`.
        open_session: loads a graph.
        batch: of real images.

    Returns:
        Layers with the root of the mean square of what outputs move by, in standard deviations of each.
    """
    layers = [product.layer for product in linear_products(graph)]
    reference = open_session(graph.SerializeToString()).run(batch)
    found = []
    for layer in layers:
        others = [other for other in layers if other != layer]
        outputs = open_session(quantize(graph, largest, others).SerializeToString()).run(batch)
        moved = [
            float(np.sqrt(((outputs[name] - value) ** 2).mean())) / max(float(value.std()), 1e-12)
            for name, value in reference.items()
        ]
        found.append((layer, max(moved)))
    return sorted(found, key=lambda entry: -entry[1])

"""The file that closed compilers of accelerators take: one input, one output, static shapes, half-precision weights.

Their converters want old operators and no metadata, and are configured by a YAML file beside the model. It has been
checked in ONNX Runtime; it is untried on such hardware.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.deploy.artefact import Artefact
from dinov2.utils.files import write_atomically, write_text_atomically

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

OLDEST_OPSET = 17  # the first with LayerNormalization
TRACED_OPSET = 18  # the oldest that torch writes
INPUT, OUTPUT = "input", "output"
_NEWER_IN_RESIZE = {"keep_aspect_ratio_policy": b"stretch", "antialias": 0}


def make_static(graph: "onnx.ModelProto", artefact: Artefact) -> "onnx.ModelProto":
    """The same graph with the plain names, in the oldest opset that has its operators.

    Args:
        graph: in half precision, traced in `TRACED_OPSET`, with a batch of one.
        artefact: its description.

    Raises:
        ValueError: it has several inputs, several outputs beside a class token, or any batch size.
    """
    import onnx

    if len(artefact.inputs) != 1 or artefact.batch != 1:
        raise ValueError("a static file has one input of one image: export with --batch-size 1, without a reference")
    first, *others = artefact.outputs
    if others and first != "cls":
        raise ValueError(
            f"a static file has one output, and this model has {', '.join(artefact.outputs)}: export its backbone or a "
            "head with one output"
        )
    result = onnx.ModelProto()
    result.CopyFrom(graph)
    del result.graph.output[1:]
    _drop_unreachable(result)
    names = {next(iter(artefact.inputs)): INPUT, first: OUTPUT}
    for node in result.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*result.graph.input, *result.graph.output):
        value.name = names.get(value.name, value.name)
    del result.metadata_props[:], result.graph.value_info[:]
    # Operators that have the same inputs and attributes in both mean the same; the checker finds the others.
    older = onnx.ModelProto()
    older.CopyFrom(result)
    older.opset_import[0].version = OLDEST_OPSET
    for node in older.graph.node:
        if node.op_type == "Resize":  # what is newer in it, where that says nothing
            told = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            idle = [name for name, value in _NEWER_IN_RESIZE.items() if told.get(name) == value]
            kept = [attribute for attribute in node.attribute if attribute.name not in idle]
            del node.attribute[:]
            node.attribute.extend(kept)
    try:
        onnx.checker.check_model(older, full_check=True)
    except Exception as error:  # of a C++ library
        logger.warning(
            "opset %d has no form of an operator (%s): the file has opset %d",
            OLDEST_OPSET, str(error).splitlines()[0][:200], TRACED_OPSET,
        )  # fmt: skip
        return result
    return older


def write_static(graph: "onnx.ModelProto", path: Path) -> None:
    """Writes it, and a YAML file of the same name."""
    shape = [axis.dim_value for axis in graph.graph.input[0].type.tensor_type.shape.dim]
    data = graph.SerializeToString()
    write_text_atomically(
        path.with_suffix(".yaml"),
        f"model: {path.name}\ninputs:\n  {INPUT}: {shape}\nbackend:\n  type: tvm_vacc\n  dtype: fp16\n",
    )
    write_atomically(path, lambda file: file.write(data))


def _drop_unreachable(model: "onnx.ModelProto") -> None:
    needed = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(tensors)

"""From a network of torch to an ONNX graph: what is settled before it is traced, and how it is written down."""

import ast
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dinov2.data.transforms import channel_statistics
from dinov2.layers.attention import Attention, WrittenOutBackend
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.models.vision_transformer import DinoVisionTransformer

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
MOST_BYTES = 2**31 - 1  # of an ONNX file: protobuf's limit
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22, "int8": 20}  # the least that have the operations, so the most portable
Run = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]


class TypedBackbone(nn.Module):
    """A backbone that computes in another dtype between inputs and outputs of float32.

    Heads stay in float32: their boxes in pixels and sums over bins have no room in half precision.
    """

    def __init__(self, backbone: DinoVisionTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = backbone.to(dtype)
        self.dtype = dtype
        self.patch_size, self.embed_dim, self.n_blocks = backbone.patch_size, backbone.embed_dim, backbone.n_blocks

    def get_intermediate_layers(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As of the backbone."""
        return _floats(self.inner.get_intermediate_layers(x.to(self.dtype), *args, **kwargs))

    def norm(self, x: Tensor) -> Tensor:
        """As of the backbone."""
        return cast(Tensor, self.inner.norm(x.to(self.dtype))).float()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of the backbone."""
        output: Any = self.inner(x.to(self.dtype), *args, **kwargs)
        if isinstance(output, dict):
            return {name: None if value is None else value.float() for name, value in output.items()}
        return output.float()


class WrittenOutGroupNorm(nn.Module):
    """A group norm whose sums run along one axis after the other.

    Runtimes add all values of a group in float32 one by one: of 200,000, as large images have, results were off by 1e-4
    of their standard deviation. The means of rows, of columns of these, and of channels have few values each.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, C, h, w]`` to the same shape."""
        grouped = x.unflatten(1, (self.num_groups, -1))
        centred = grouped - _mean_by_axes(grouped)
        normalized = (centred * (_mean_by_axes(centred.square()) + self.eps).rsqrt()).flatten(1, 2)
        scaled: Tensor = normalized * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return scaled


def _mean_by_axes(x: Tensor) -> Tensor:
    for axis in (4, 3, 2):
        x = x.mean(axis, keepdim=True)
    return x


class ExportNetwork(nn.Module):
    """A network as it is exported: positional images of float32 to a tuple of outputs of float32.

    The original is not changed. Position embeddings are resampled now, for the size of the images: runtimes resample
    them otherwise, silently. Attention is written out as products, which all of them know, and group norms as means
    that lose no digits.

    Args:
        network: in evaluation mode.
        run: calls it with a batch of images by name.
        images: example inputs by name, in the order of the graph's inputs: normalised ``[B, C, H, W]``.
        outputs: names of the outputs, in order.
        precision: one of `PRECISIONS`; that of int8 is calibrated in float32.
        pixels: whether inputs are values in 0..255, and normalising is a part of the graph.

    Raises:
        ValueError: the images do not divide into patches, or the network lacks an output.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Run,
        images: Mapping[str, Tensor],
        outputs: Sequence[str],
        *,
        precision: str = "fp32",
        pixels: bool = False,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
        self.run = run
        self.inputs, self.outputs = tuple(images), tuple(outputs)
        self.pixels = pixels
        mean, std = channel_statistics(next(iter(images.values())).shape[1])
        self.register_buffer("scale", torch.tensor([255 * value for value in std]).view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor([255 * value for value in mean]).view(-1, 1, 1))
        self._settle(images)
        self.network = _typed(self.network, DTYPES[precision])

    def forward(self, *images: Tensor) -> tuple[Tensor, ...]:
        """Outputs in the order of their names."""
        if self.pixels:
            images = tuple((image - self.get_buffer("shift")) / self.get_buffer("scale") for image in images)
        found = self.run(self.network, dict(zip(self.inputs, images, strict=True)))
        if missing := [name for name in self.outputs if name not in found]:
            raise ValueError(f"the network gives {', '.join(found)}, and no {', '.join(missing)}")
        return tuple(found[name].float() for name in self.outputs)

    @torch.no_grad()
    def _settle(self, images: Mapping[str, Tensor]) -> None:
        grids: dict[nn.Module, set[tuple[int, int]]] = {}

        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, PatchEmbed)
            height, width = inputs[0].shape[-2:]
            grids.setdefault(layer, set()).add(layer.grid_size(height, width))

        modules = list(self.network.modules())
        handles = [layer.register_forward_pre_hook(note) for layer in modules if isinstance(layer, PatchEmbed)]
        self.run(self.network, {name: image[:1] for name, image in images.items()})
        for handle in handles:
            handle.remove()
        for module in modules:
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, WrittenOutGroupNorm(child))
            if isinstance(module, Attention):
                module.backend = WrittenOutBackend()
            if not isinstance(module, DinoVisionTransformer):
                continue
            (grid,) = grids[module.patch_embed]
            module.pos_embed = nn.Parameter(module.interpolate_pos_encoding(grid).clone(), requires_grad=False)
            module.grid_size = grid


def write_graph(
    network: ExportNetwork, images: Mapping[str, Tensor], *, opset: int = 20, dynamic_batch: bool = False
) -> "onnx.ModelProto":
    """Traces a network into an ONNX model, which `onnx.checker` has found good.

    Nodes are named after the modules that they come from, and nothing else of this machine is in the file.

    Args:
        network: what is traced.
        images: example inputs by name ``[B, C, H, W]``; height and width are fixed by them.
        opset: of its operators, see `OPSETS`.
        dynamic_batch: whether the batch may have any size; else it has that of the images.

    Raises:
        ValueError: its weights do not fit into an ONNX file.
        RuntimeError: the network has something that has no form in ONNX.
    """
    import onnx

    size = sum(weight.nbytes for weight in network.state_dict().values())
    if size > MOST_BYTES:
        raise ValueError(
            f"the weights have {size / 2**30:.1f} GiB, and an ONNX file at most {MOST_BYTES / 2**30:.1f}: export in "
            "half precision (fp16, bf16), or a smaller backbone"
        )

    example = tuple(image.float() for image in images.values())
    if dynamic_batch:  # a batch of one would be taken for one for ever
        example = tuple(torch.cat([image, image])[:2] for image in example)
    shapes = ({0: torch.export.Dim("batch")},) * len(example) if dynamic_batch else None
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad(), _quiet("onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            example,
            input_names=list(network.inputs),
            output_names=list(network.outputs),
            opset_version=opset,
            # The arguments of forward are one tuple.
            dynamic_shapes=(shapes,) if shapes is not None else None,
            dynamo=True,
            optimize=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    if dynamic_batch and any(value.type.tensor_type.shape.dim[0].dim_value for value in model.graph.input):
        raise RuntimeError("the network's code fixes the size of the batch (such as len(x) of a tensor does)")
    _name_by_module(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def module_of(node_name: str) -> str:
    """The module that a node of a written graph comes from."""
    return node_name.partition("/")[0]


def with_outputs(graph: "onnx.ModelProto", names: Iterable[str]) -> "onnx.ModelProto":
    """The graph with further tensors among its outputs."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(graph)
    there = {output.name for output in result.graph.output}
    for name in names:
        if name not in there:
            result.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return result


def _name_by_module(model: "onnx.ModelProto") -> None:
    for number, node in enumerate(model.graph.node):
        told = {entry.key: entry.value for entry in node.metadata_props}
        scopes = ast.literal_eval(told.get("pkg.torch.onnx.name_scopes", "['', '']"))
        # The last is the operation's own; the wrapper's names are nobody's business.
        module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
        module = module.removeprefix("network").removeprefix(".").replace("backbone.inner", "backbone")
        node.name = f"{module}/{node.op_type}_{number}"
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    model.graph.doc_string = model.doc_string = ""


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Lets a library say errors only."""
    library = logging.getLogger(name)
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)


def _typed(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    if dtype == torch.float32:
        return network
    if isinstance(network, DinoVisionTransformer):
        return TypedBackbone(network, dtype)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DinoVisionTransformer):
                setattr(module, name, TypedBackbone(child, dtype))
    return network


def _floats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_floats(value) if isinstance(value, tuple) else value.float() for value in values)

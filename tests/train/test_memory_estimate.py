"""The memory that a dry run tells, against what autograd keeps."""

import pytest
import torch
from torch import Tensor
from train_stand_ins import OPTIONS

from dinov2.config import Config, load_config
from dinov2.data.pretraining import CropSample
from dinov2.train.data import build_collate
from dinov2.train.dry_run import MemoryEstimate, estimate_memory
from dinov2.train.ssl_meta_arch import SSLMetaArch

CPU = torch.device("cpu")
LARGER = (
    *OPTIONS,
    "crops.global_crops_size=64",
    "crops.local_crops_size=32",
    "student.drop_path_rate=0",
)


def estimate(config: Config, processes: int = 1) -> MemoryEstimate:
    with torch.device("meta"):
        return estimate_memory(config, SSLMetaArch(config), CPU, processes)


def bytes_kept_for_backward(config: Config) -> int:
    """Storage that the student's forward pass and the losses keep, parameters left out."""
    model = SSLMetaArch(config).train()
    size, local = config.crops.global_crops_size, config.crops.local_crops_size
    assert isinstance(size, int)
    assert isinstance(local, int)
    batch = build_collate(config)(
        [
            CropSample(
                global_crops=tuple(torch.randn(2, 3, size, size)),
                local_crops=tuple(torch.randn(config.crops.local_crops_number, 3, local, local)),
                name="a",
                position=number,
                unreadable=(),
            )
            for number in range(config.train.batch_size_per_gpu)
        ]
    )
    targets = model.teacher_targets(batch, 0.05)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(batch, targets, model.student_predictions(batch))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


@pytest.mark.parametrize(
    "pairs",
    [
        (),
        ("student.drop_path_rate=0.4", "train.batch_size_per_gpu=8"),
        ("student.drop_path_rate=0.8", "student.drop_path_uniform=false", "train.batch_size_per_gpu=8"),
        ("student.ffn_layer=swiglufused",),
        ("student.layerscale=0",),
        ("crops.local_crops_number=0",),
        ("dino.head_hidden_dim=1024", "ibot.separate_head=true", "ibot.head_n_prototypes=128"),
    ],
)
def test_activations_are_those_that_autograd_keeps(pairs: tuple[str, ...]) -> None:
    config = load_config(None, [*LARGER, *pairs])
    assert estimate(config).activations == pytest.approx(bytes_kept_for_backward(config), rel=0.12)


def test_states_are_weights_gradients_and_moments() -> None:
    config = load_config(None, OPTIONS)
    model = SSLMetaArch(config)
    student = sum(parameter.numel() for parameter in model.student.parameters())
    states = estimate(config).states
    assert states == 4 * 5 * student, "student and teacher are equally large"
    assert estimate(config, processes=2).states == states // 2
    pairs = [f"compute_precision.{name}.backbone.sharding_strategy=NO_SHARD" for name in ("student", "teacher")]
    backbone = sum(parameter.numel() for parameter in model.student["backbone"].parameters())
    replicated = estimate(load_config(None, [*OPTIONS, *pairs]), processes=2).states
    assert replicated == 4 * 5 * (backbone + (student - backbone) // 2), "the head is still sharded"


def test_recomputation_and_shorter_numbers_need_less() -> None:
    plain = estimate(load_config(None, LARGER)).activations
    half = ["compute_precision.student.backbone.mixed_precision.param_dtype=bf16"]
    assert 0.5 * plain < estimate(load_config(None, [*LARGER, *half])).activations < 0.6 * plain
    assert estimate(load_config(None, [*LARGER, "train.activation_checkpointing=true"])).activations < 0.4 * plain
    assert estimate(load_config(None, [*LARGER, "train.batch_size_per_gpu=8"])).activations > 1.9 * plain

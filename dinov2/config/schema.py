"""Every option of a pretraining run, typed, with its default and meaning.

Names and meanings of the published YAML files are kept, so those files load unchanged. The objects are frozen: derived
values (the scaled learning rate, the number of iterations) are computed by pure functions where they are needed.
``configs/ssl_default_config.yaml`` shows the same options as text.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Literal


class ConfigError(ValueError):
    """A user's options are wrong: the message names the file or the pair, what was found, and what is allowed."""


class RunOptions:
    """Options of one kind of run.

    Attributes:
        overview: file that shows them all.
    """

    overview: ClassVar[str]

    def check(self) -> None:
        """Checks options that must agree with one another.

        Raises:
            ConfigError: naming the options involved and their values.
        """

    def idle(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
        """Options that have no effect beside the others: the reason, such as ``while x is 0``, and their names.

        Args:
            values: all options by dotted name; looking at them here does not count as using them.
        """
        del values
        yield from ()


def leaf(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declares an option.

    Args:
        default: value when neither the file nor the command line gives one.
        help: one line; it is the comment in ``configs/ssl_default_config.yaml``.
        minimum: smallest allowed number, for each entry of a list.
        maximum: largest allowed number, for each entry of a list.
        above: the number, or each entry, must be greater than this.
        choices: the words allowed.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata=metadata)


def section(kind: type, help: str, default: Any = MISSING) -> Any:
    """Declares a group of options; ``default`` replaces the group's own defaults."""
    metadata = {"help": help}
    if default is MISSING:
        return field(default_factory=kind, metadata=metadata)
    return field(default_factory=lambda: default, metadata=metadata)


Size = int | tuple[int, int]  # one number for a square, or height and width
Steps = tuple[Mapping[str, Any], ...]  # of preprocessing, each {name: parameters}; see docs/preprocessing.md
Auto = Literal["auto"]  # a number that follows from the run's length, see `dinov2.train.recipe`

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
STRATEGIES = ("SHARD_GRAD_OP", "FULL_SHARD", "NO_SHARD")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    WEIGHTS: str = leaf("", "Rank files to resume from, such as OUT/model_0011249.rank_{rank}.pth; empty: own folder.")


@dataclass(frozen=True, kw_only=True)
class MixedPrecisionOptions:
    param_dtype: str = leaf(
        "auto",
        "Parameters and activations; auto: bf16 on a GPU or processor that multiplies it, else fp32.",
        choices=PRECISIONS,
    )
    reduce_dtype: str = leaf("auto", "Gradients while summed over processes; auto: fp32.", choices=PRECISIONS)
    buffer_dtype: str = leaf("fp32", "Buffers such as batch-norm statistics.", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class ModulePrecisionOptions:
    sharding_strategy: str = leaf(
        "SHARD_GRAD_OP",
        "SHARD_GRAD_OP keeps parameters gathered after forward, FULL_SHARD frees them, NO_SHARD replicates.",
        choices=STRATEGIES,
    )
    mixed_precision: MixedPrecisionOptions = section(MixedPrecisionOptions, "Number formats.")


@dataclass(frozen=True, kw_only=True)
class NetworkPrecisionOptions:
    backbone: ModulePrecisionOptions = section(ModulePrecisionOptions, "Vision transformer.")
    dino_head: ModulePrecisionOptions = section(ModulePrecisionOptions, "Head of the class token.")
    ibot_head: ModulePrecisionOptions = section(ModulePrecisionOptions, "Head of the patches, when separate.")


@dataclass(frozen=True, kw_only=True)
class ComputePrecisionOptions:
    grad_scaler: bool = leaf(True, "Scale the loss where fp16 is used; a step whose gradients overflow is skipped.")
    teacher: NetworkPrecisionOptions = section(NetworkPrecisionOptions, "The averaged network that gives targets.")
    student: NetworkPrecisionOptions = section(NetworkPrecisionOptions, "The network that is trained.")


@dataclass(frozen=True, kw_only=True)
class DinoOptions:
    loss_weight: float = leaf(1.0, "Weight of the class-token loss; 0 turns it off.", minimum=0)
    head_n_prototypes: int = leaf(65536, "Outputs of the head.", minimum=2)
    head_bottleneck_dim: int = leaf(256, "Width before the last layer.", minimum=1)
    head_nlayers: int = leaf(3, "Layers of the head's MLP.", minimum=1)
    head_hidden_dim: int = leaf(2048, "Width inside the head's MLP.", minimum=1)
    koleo_loss_weight: float = leaf(0.1, "Weight of the KoLeo regulariser; 0 turns it off.", minimum=0)
    koleo_half_precision: bool = leaf(False, "Compute KoLeo in the features' precision as upstream did.")
    koleo_all_ranks: bool = leaf(False, "Search KoLeo's neighbours among the images of all processes, not of one.")


@dataclass(frozen=True, kw_only=True)
class IbotOptions:
    loss_weight: float = leaf(1.0, "Weight of the masked-patch loss; 0 turns it off.", minimum=0)
    mask_sample_probability: float = leaf(0.5, "Fraction of global crops that get a mask.", minimum=0, maximum=1)
    mask_ratio_min_max: tuple[float, float] = leaf((0.1, 0.5), "Least and most masked part.", minimum=0, maximum=1)
    exact_mask_counts: bool = leaf(False, "Top masks up to the requested count; published masks may fall short.")
    separate_head: bool = leaf(False, "Give patches a head of their own, with the sizes below.")
    head_n_prototypes: int = leaf(65536, "Outputs of the separate head.", minimum=2)
    head_bottleneck_dim: int = leaf(256, "Width before its last layer.", minimum=1)
    head_nlayers: int = leaf(3, "Layers of its MLP.", minimum=1)
    head_hidden_dim: int = leaf(2048, "Width inside its MLP.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    batch_size_per_gpu: int = leaf(64, "Images per process and iteration.", minimum=1)
    dataset_path: str = leaf("ImageNet:split=TRAIN", "Training set, such as GroupedJSON:split=TRAIN:root=/data/parts.")
    output_dir: str = leaf(".", "Folder of the run.")
    saveckp_freq: int = leaf(3, "Official epochs between checkpoints.", minimum=1)
    max_save_failures: int = leaf(
        10, "Checkpoints in a row that may fail to be written (full disk) before the run stops.", minimum=1
    )
    keep_last: int = leaf(3, "Checkpoints kept; 0 keeps all.", minimum=0)
    seed: int = leaf(0, "Fixes weights, data order, augmentation, masks and stochastic depth.", minimum=0)
    num_workers: int = leaf(
        10, "Data-loading processes per training process; 0 loads in the training process.", minimum=0
    )
    OFFICIAL_EPOCH_LENGTH: int = leaf(1250, "Iterations per official epoch, whatever the set's size.", minimum=1)
    cache_dataset: bool = leaf(True, "Keep image files in memory, within data.cache_gib.")
    centering: str = leaf("centering", "How teacher targets are spread.", choices=("centering", "sinkhorn_knopp"))
    sampler_type: str = leaf(
        "SHARDED_INFINITE",
        "Order of the samples; the NEW one is faster on millions of images.",
        choices=("SHARDED_INFINITE", "SHARDED_INFINITE_NEW", "INFINITE"),
    )
    device: str = leaf("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    resume: bool = leaf(False, "Demand that there is a checkpoint to resume from; otherwise resuming is automatic.")
    resume_path: str = leaf("", "Checkpoint to resume from, with {rank} for the process; empty: own folder.")
    max_bad_steps: int = leaf(
        5,
        "Batches in a row that are skipped for a loss or gradient that is not finite; one more ends the run.",
        minimum=0,
    )
    process_group_timeout_minutes: float = leaf(
        10.0, "How long a process waits for the others before the run ends and says which one is missing.", above=0
    )
    log_period: int = leaf(10, "Iterations between progress lines.", minimum=1)
    compile: bool = leaf(False, "Compile each block with torch.compile.")
    activation_checkpointing: bool = leaf(False, "Recompute blocks in backward: less memory, more time.")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    max_bad_fraction: float = leaf(
        0.01, "Fraction of unreadable images past which the run fails.", minimum=0, maximum=1
    )
    read_timeout_seconds: float = leaf(
        60.0, "An image that takes longer to read counts as unreadable; 0: no limit.", minimum=0
    )
    cache_gib: float = leaf(2.0, "Memory for cached image files, over all data-loading processes of a rank.", minimum=0)
    part_positives: float = leaf(
        0.0, "Chance that an image's crops come from two images of its part (group_id).", minimum=0, maximum=1
    )
    preprocessing: Steps = leaf(
        (), "Steps that each image goes through before augmentation, such as [{clahe: {clip_limit: 2.0}}]."
    )


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    arch: str = leaf(
        "vit_large", "Backbone.", choices=("vit_mini", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2")
    )
    depth: int = leaf(0, "Blocks; 0: those of arch.", minimum=0)
    num_heads: int = leaf(
        0, "Attention heads of each block, each as wide as those of arch; 0: those of arch.", minimum=0
    )
    ffn_hidden_dim: int = leaf(
        0, "Hidden width of the feed-forward layer (of swiglu: two thirds of it); 0: that of arch.", minimum=0
    )
    patch_size: Size = leaf(16, "Patch in pixels.", minimum=1)
    in_channels: int = leaf(3, "Of images; other than 3 are made by data.preprocessing.", minimum=1, maximum=4)
    drop_path_rate: float = leaf(0.3, "Stochastic depth.", minimum=0, maximum=0.99)
    layerscale: float = leaf(1e-5, "Start of LayerScale; 0 leaves it out.", minimum=0)
    drop_path_uniform: bool = leaf(True, "The same rate in all blocks, instead of rising from 0.")
    pretrained_weights: str = leaf("", "Backbone: file, https:// address or released name (dinov2_vits14_reg).")
    pretrained_heads: bool = leaf(False, "Take the heads from that file too: a teacher_checkpoint.pth whose heads fit.")
    ffn_layer: str = leaf("mlp", "Feed-forward layer.", choices=("mlp", "swiglu", "swiglufused"))
    block_chunks: int = leaf(0, "Groups of blocks that are gathered together when sharded; 0: each alone.", minimum=0)
    qkv_bias: bool = leaf(True, "Bias in the query, key and value projection.")
    proj_bias: bool = leaf(True, "Bias in the attention's output projection.")
    ffn_bias: bool = leaf(True, "Bias in the feed-forward layer.")
    num_register_tokens: int = leaf(0, "Register tokens.", minimum=0)
    interpolate_antialias: bool = leaf(False, "Antialias when position embeddings are resized.")
    interpolate_offset: float = leaf(
        0.1, "Added to the patch grid when position embeddings are resized; 0: by size.", minimum=0, maximum=0.99
    )
    attention_backend: str = leaf("sdpa", "Attention kernel; xformers needs the extra.", choices=("sdpa", "xformers"))


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    momentum_teacher: float | Auto = leaf(0.992, "EMA momentum at the start, or auto.", minimum=0, maximum=1)
    final_momentum_teacher: float | Auto = leaf(1.0, "EMA momentum at the end (cosine), or auto.", minimum=0, maximum=1)
    warmup_teacher_temp: float = leaf(0.04, "Teacher temperature at the start.", above=0)
    teacher_temp: float | Auto = leaf(0.07, "Teacher temperature after its warm-up, or auto.", above=0)
    warmup_teacher_temp_epochs: int | float | Auto = leaf(
        30, "Official epochs of that warm-up (linear), or auto.", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    teacher_weights: str = leaf("", "teacher_checkpoint.pth of a frozen network that gives all targets; empty: none.")
    teacher_config: str = leaf("", "config.yaml of its run; empty: as its file says.")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    epochs: int = leaf(100, "Length of the run in official epochs.", minimum=1)
    weight_decay: float = leaf(0.04, "Weight decay at the start.", minimum=0)
    weight_decay_end: float = leaf(0.4, "Weight decay at the end (cosine).", minimum=0)
    base_lr: float | Auto = leaf(0.004, "Learning rate before the scaling rule, or auto.", minimum=0)
    lr: float = leaf(0.0, "Learning rate as it is, whatever the batch; 0: from base_lr and the rule.", minimum=0)
    warmup_epochs: int | float | Auto = leaf(10, "Official epochs of linear warm-up from 0, or auto.", minimum=0)
    min_lr: float = leaf(1e-6, "Learning rate at the end (cosine).", minimum=0)
    clip_grad: float = leaf(3.0, "Largest gradient norm of each sub-network; 0 does not clip.", minimum=0)
    freeze_last_layer_epochs: int | float | Auto = leaf(
        1, "Official epochs with the heads' last layer frozen, or auto.", minimum=0
    )
    scaling_rule: str = leaf(
        "sqrt_wrt_1024",
        "Scaling of base_lr with the global batch.",
        choices=("sqrt_wrt_1024", "linear_wrt_256", "none"),
    )
    patch_embed_lr_mult: float = leaf(0.2, "Factor on the patch embedding's learning rate.", minimum=0)
    layerwise_decay: float = leaf(0.9, "Factor on the learning rate per block, from the top down.", above=0, maximum=1)
    adamw_beta1: float = leaf(0.9, "First beta of AdamW.", minimum=0, maximum=0.9999)
    adamw_beta2: float = leaf(0.999, "Second beta of AdamW.", minimum=0, maximum=0.99999)


@dataclass(frozen=True, kw_only=True)
class CropsOptions:
    global_crops_scale: tuple[float, float] = leaf((0.32, 1.0), "Area of the two global crops.", above=0, maximum=1)
    local_crops_number: int = leaf(8, "Local crops per image.", minimum=0)
    local_crops_scale: tuple[float, float] = leaf((0.05, 0.32), "Area of local crops.", above=0, maximum=1)
    # The blur's kernel has 9 pixels.
    global_crops_size: Size = leaf(224, "Global crops in pixels: one number, or height and width.", minimum=9)
    local_crops_size: Size = leaf(96, "Local crops in pixels.", minimum=9)
    blur_probabilities: tuple[float, float, float] = leaf(
        (1.0, 0.1, 0.5),
        "Blur of global crop 1, global crop 2, local crops; the released weights saw [0.0, 0.9, 0.5].",
        minimum=0,
        maximum=1,
    )
    horizontal_flip_probability: float = leaf(0.5, "Left-right flip.", minimum=0, maximum=1)
    vertical_flip_probability: float = leaf(
        0.0, "Top-bottom flip; for parts that may lie either way.", minimum=0, maximum=1
    )
    transpose_probability: float = leaf(
        0.0, "Exchange of rows and columns; with both flips, all turns by 90 degrees.", minimum=0, maximum=1
    )
    max_tilt: float = leaf(
        0.0, "Turns of crops by up to so many degrees either way; for parts that lie askew.", minimum=0, maximum=180
    )
    color_jitter_probability: float = leaf(0.8, "Colour jitter.", minimum=0, maximum=1)
    color_jitter: tuple[float, float, float, float] = leaf(
        (0.4, 0.4, 0.2, 0.1), "Strength for brightness, contrast, saturation, hue.", minimum=0
    )
    grayscale_probability: float = leaf(0.2, "Conversion to grey.", minimum=0, maximum=1)
    solarize_probability: float = leaf(0.2, "Solarisation of the second global crop.", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    eval_period_iterations: int = leaf(
        12500, "Iterations between teacher checkpoints and k-NN; 0: at the end only.", minimum=0
    )
    train_dataset_path: str = leaf("", "Labelled bank for k-NN during training; empty: no k-NN.")
    val_dataset_path: str = leaf("", "Labelled images to classify.")
    nb_knn: tuple[int, ...] = leaf((10, 20, 100, 200), "Numbers of neighbours, clipped to the bank.", minimum=1)
    temperature: float = leaf(0.07, "Temperature of the neighbours' votes.", above=0)
    features: str = leaf(
        "cls",
        "What describes an image: class token, mean of the patches, both, or these and the deviation over the patches.",
        choices=("cls", "patch_mean", "cls_patch_mean", "cls_patch_statistics"),
    )
    image_size: int = leaf(0, "Square image in pixels; 0: the global crops' size.", minimum=0)
    whole_image: bool = leaf(False, "Squeeze the whole image into the square instead of cropping its centre.")
    batch_size: int = leaf(64, "Images per forward pass.", minimum=1)
    probe_dataset_path: str = leaf(
        "", "Images, labelled or not, on which features are watched; empty: val_dataset_path, else the training set."
    )
    probe_images: int = leaf(
        256, "How many of them, evenly spread over the set; 0: features are not watched.", minimum=0
    )
    best_metric: str = leaf(
        "",
        "k-NN metric of the best teacher, such as part_auroc_k10, or part_auroc for the mean over nb_knn; "
        "empty: part_auroc for two classes, else part_balanced_accuracy.",
    )


_HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")
_DINO_HEAD, _IBOT_HEAD = (tuple(f"{section}.{name}" for name in _HEAD) for section in ("dino", "ibot"))
_MASKS = ("ibot.mask_ratio_min_max", "ibot.exact_mask_counts")
# While the first option is 0, false or empty, the others do nothing.
_RGB = 3
_IDLE_WITHOUT = (
    ("distillation.teacher_weights", ("distillation.teacher_config",)),
    ("student.pretrained_weights", ("student.pretrained_heads",)),
    ("dino.koleo_loss_weight", ("dino.koleo_half_precision", "dino.koleo_all_ranks")),
    ("ibot.loss_weight", ("ibot.mask_sample_probability", *_MASKS, "ibot.separate_head", *_IBOT_HEAD)),
    ("ibot.separate_head", _IBOT_HEAD),
    ("ibot.mask_sample_probability", _MASKS),
    ("train.cache_dataset", ("data.cache_gib",)),
    ("crops.local_crops_number", ("crops.local_crops_size", "crops.local_crops_scale")),
    ("crops.color_jitter_probability", ("crops.color_jitter",)),
    (
        "evaluation.train_dataset_path",
        ("evaluation.nb_knn", "evaluation.temperature", "evaluation.features", "evaluation.best_metric"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """All options of a run, in the sections of the published files."""

    overview: ClassVar[str] = "configs/ssl_default_config.yaml"

    MODEL: ModelOptions = section(ModelOptions, "Which checkpoint to resume.")
    compute_precision: ComputePrecisionOptions = section(ComputePrecisionOptions, "Number formats and sharding.")
    dino: DinoOptions = section(DinoOptions, "Class-token loss, its head, and KoLeo.")
    ibot: IbotOptions = section(IbotOptions, "Masked-patch loss and its head.")
    train: TrainOptions = section(TrainOptions, "The run.")
    data: DataOptions = section(DataOptions, "Reading images.")
    student: StudentOptions = section(StudentOptions, "Backbone.")
    teacher: TeacherOptions = section(TeacherOptions, "Averaged network.")
    distillation: DistillationOptions = section(DistillationOptions, "Targets of a larger network.")
    optim: OptimOptions = section(OptimOptions, "Optimiser and schedules.")
    crops: CropsOptions = section(CropsOptions, "Multi-crop augmentation.")
    evaluation: EvaluationOptions = section(EvaluationOptions, "Evaluation of the teacher during training.")

    def check(self) -> None:
        """Checks options that must agree with one another.

        Raises:
            ConfigError: naming the options involved and their values.
        """
        crops, evaluation, patch = self.crops, self.evaluation, as_pair(self.student.patch_size)
        for name in ("global_crops_size", "local_crops_size"):
            if name == "local_crops_size" and crops.local_crops_number == 0:
                continue
            size = as_pair(getattr(crops, name))
            if size[0] % patch[0] or size[1] % patch[1]:
                below, above = (
                    _size((max(how(size[0] / patch[0]), 1) * patch[0], max(how(size[1] / patch[1]), 1) * patch[1]))
                    for how in (math.floor, math.ceil)
                )
                raise ConfigError(
                    f"crops.{name}={_size(size)} is not divisible by student.patch_size={_size(patch)}; "
                    f"the nearest sizes are {below} and {above}"
                )
        if evaluation.image_size % patch[0] or evaluation.image_size % patch[1]:
            raise ConfigError(
                f"evaluation.image_size={evaluation.image_size} is not divisible by student.patch_size={_size(patch)}"
            )
        for part in ("backbone", "dino_head", "ibot_head"):
            student = getattr(self.compute_precision.student, part).sharding_strategy
            teacher = getattr(self.compute_precision.teacher, part).sharding_strategy
            if (student == "NO_SHARD") != (teacher == "NO_SHARD"):
                raise ConfigError(
                    f"compute_precision.student.{part}.sharding_strategy={student} and compute_precision.teacher."
                    f"{part}.sharding_strategy={teacher}: each process moves the teacher's rows by the student's, so "
                    f"both must be sharded, or both replicated"
                )
        for name, (low, high) in {
            "crops.global_crops_scale": crops.global_crops_scale,
            "crops.local_crops_scale": crops.local_crops_scale,
            "ibot.mask_ratio_min_max": self.ibot.mask_ratio_min_max,
        }.items():
            if low > high:
                raise ConfigError(f"{name}=[{low}, {high}]: the first number must not exceed the second")
        if crops.color_jitter[3] > 0.5:
            raise ConfigError(
                f"crops.color_jitter={list(crops.color_jitter)}: hue, the last, must be at most 0.5 turns"
            )
        if self.optim.base_lr == "auto" and self.optim.scaling_rule != "sqrt_wrt_1024":
            raise ConfigError(
                f"optim.base_lr=auto is meant for optim.scaling_rule=sqrt_wrt_1024, not {self.optim.scaling_rule}; "
                "give a number"
            )
        if self.optim.warmup_epochs != "auto" and self.optim.warmup_epochs > self.optim.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.optim.warmup_epochs} exceeds optim.epochs={self.optim.epochs}"
            )
        if self.dino.loss_weight == 0 and self.ibot.loss_weight == 0:
            raise ConfigError("dino.loss_weight and ibot.loss_weight are both 0: nothing is left to learn from")
        if bool(evaluation.train_dataset_path) != bool(evaluation.val_dataset_path):
            raise ConfigError("evaluation.train_dataset_path and evaluation.val_dataset_path must be given together")

    def idle(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
        for name, names in _IDLE_WITHOUT:
            if not values[name]:
                yield f"while {name} is {'empty' if values[name] == '' else str(values[name]).lower()}", names
        if values["optim.lr"] > 0:
            yield f"while optim.lr is {values['optim.lr']:g} and not scaled", ("optim.base_lr", "optim.scaling_rule")
        if not values["dino.loss_weight"] and values["ibot.separate_head"]:
            yield "while dino.loss_weight is 0.0 and patches have a head of their own", _DINO_HEAD
        if values["student.in_channels"] != _RGB:
            yield f"while student.in_channels is {values['student.in_channels']}", ("crops.grayscale_probability",)


def as_pair(size: Size) -> tuple[int, int]:
    """Height and width of a size option."""
    return (size, size) if isinstance(size, int) else size


def as_number(value: float | Auto) -> float:
    """The value of an option that may be ``auto``, in options for which that is settled.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, str):
        raise ConfigError("an option is still auto: dinov2.train.setup.settle gives options without")
    return value


def _size(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"

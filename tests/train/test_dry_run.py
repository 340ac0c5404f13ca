"""``--dry-run`` says what a run would do, in true numbers, and leaves no trace."""

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from train_stand_ins import AUTO, NETWORKS, OPTIONS, Train, evaluation_pairs, make_small

from dinov2.config import Config, load_config
from dinov2.data.pretraining import CropSample
from dinov2.train import dry_run, recipe
from dinov2.train.command import main
from dinov2.train.data import build_collate
from dinov2.train.dry_run import Machine, MemoryEstimate, estimate_memory, measure_machine
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils import processor

CPU = torch.device("cpu")
NAMES = ("student", "teacher")


Describe = Callable[..., dict[str, str]]


@pytest.fixture
def describe(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Describe:
    """Gives what is printed, by the name in front: ``describe(*pairs)``, of a run that would go to ``run``."""

    def described(*pairs: str, output: str = "run") -> dict[str, str]:
        assert train(tmp_path / output, "--dry-run", *pairs) == 0
        title, *lines = capsys.readouterr().out.splitlines()
        assert "nothing is trained" in title
        return {line[2:20].strip(): line[20:] for line in lines}

    return described


def test_the_schedule_is_told_in_images_and_passes(describe: Describe, tmp_path: Path) -> None:
    lines = describe("optim.epochs=5", "train.OFFICIAL_EPOCH_LENGTH=7")
    assert "14 images, one batch of 4 read" in lines["data"]
    assert "5 epochs x 7 iterations = 35 iterations = 140 images = 10.0 passes" in lines["schedule"]
    assert "2 x 32x32 (4x4 patches), 2 x 16x16" in lines["crops"]
    assert "every 7 iterations, 3 kept" in lines["checkpoints"]
    assert "no k-NN" in lines["evaluation"]
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_it_says_how_often_no_box_fits(describe: Describe, tmp_path: Path) -> None:
    assert "crop boxes" not in describe(), "of square images"
    for number in range(8):
        (tmp_path / "scans").mkdir(exist_ok=True)
        Image.new("L", (800, 40) if number % 2 else (100, 50)).save(tmp_path / "scans" / f"{number}.png")
    line = describe(f"train.dataset_path=ImageFolder:root={tmp_path / 'scans'}:labels=none")["crop boxes"]
    found = re.match(r"(\d+)% of global and (\d+)% of local crops are squeezed along their image", line)
    assert found
    assert 45 <= int(found[1]) <= 60
    assert "50% of the images are so long that a sample's crops come from one piece" in line


def test_parameters_and_learning_rate_are_those_of_the_run(describe: Describe) -> None:
    lines = describe("ibot.separate_head=true", "optim.lr=0.5", "optim.min_lr=0.25")
    model = SSLMetaArch(load_config(None, [*OPTIONS, "ibot.separate_head=true"]))
    for name, part in model.student.items():
        count = sum(parameter.numel() for parameter in part.parameters())
        assert lines[f"student {name}"] == f"{count:,} parameters"
    assert lines["learning rate"] == "0.5 -> 0.25"
    assert describe("optim.lr=0.5", "optim.warmup_epochs=1")["learning rate"] == "0 -> 0.5 in 3 iterations -> 1e-06"
    ends_with_the_warm_up = describe("optim.lr=0.5", "optim.warmup_epochs=2")
    assert ends_with_the_warm_up["learning rate"] == "0 -> 0.5 in 6 iterations"


def test_the_probe_set_is_read(describe: Describe, tmp_path: Path, parts: Path) -> None:
    assert describe()["probe set"] == f"14 images of GroupedJSON:split=TRAIN:root={parts}, all of them read"
    sets = evaluation_pairs(parts)
    lines = describe(*sets)
    assert re.fullmatch(r"\d+ images of GroupedJSON:split=VAL:root=.*, all of them read", lines["probe set"])
    assert str(parts) in lines["evaluation"]

    shutil.copytree(parts, tmp_path / "parts")
    images = sorted((tmp_path / "parts" / "val").rglob("*.jpeg"))
    images[0].write_bytes(b"")
    images[1].unlink()
    os.mkfifo(images[1])  # which nobody writes to
    own = f"evaluation.probe_dataset_path=GroupedJSON:split=VAL:root={tmp_path / 'parts'}"
    line = describe(*sets, own, "evaluation.probe_images=4", "data.read_timeout_seconds=0.5")["probe set"]
    assert line.startswith(f"4 images of {own.partition('=')[2]}, ")
    assert re.search(r", [12] of them unreadable: cannot read image .*(the file is empty|given up after 0\.5 s)", line)
    assert describe("evaluation.probe_images=0")["probe set"] == "features are not watched"
    assert not (tmp_path / "run").exists()


def test_the_start_is_told(train: Train, describe: Describe, half: Path, whole: Path, tmp_path: Path) -> None:
    def start(*pairs: str, output: str = half.name) -> str:
        return describe(*pairs, output=output)["start"]

    assert start("train.seed=7", output="run") == "random weights (train.seed=7)"
    assert start() == f"{half} holds model_0000002: the run goes on from there"
    assert start("optim.epochs=1") == f"{half} holds model_0000002: the run is complete"
    assert start("--no-resume") == "random weights (train.seed=0)"
    pattern = f"{half}/model_0000002.rank_{{rank}}.pth"
    assert start(f"MODEL.WEIGHTS={pattern}", output="run") == f"goes on from {pattern}"
    teacher = f"student.pretrained_weights={whole}/eval/training_5/teacher_checkpoint.pth"
    assert start(teacher, output="run").endswith("checkpoint.pth, random heads")
    with pytest.raises(FileNotFoundError, match=r"resume from: .*/model_0000009\.rank_0\.pth does not exist"):
        train(half, "--dry-run", f"train.resume_path={tmp_path}/model_0000009.rank_{{rank}}.pth")


def test_precision_is_told_and_auto_is_bf16_where_the_processor_multiplies_it(
    describe: Describe, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = [f"{network}.mixed_precision.param_dtype=auto" for network in NETWORKS]
    backbones = [f"compute_precision.{name}.backbone.mixed_precision.param_dtype=bf16" for name in NAMES]
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(recipe, "multiplies_bf16", lambda has=has: has)
        assert describe(*auto)["precision"] == expected
        assert describe()["precision"] == "fp32", "an explicit choice stays"
        assert describe(*backbones)["precision"] == "backbone bf16, dino_head fp32"
    assert describe(backbones[0])["precision"] == "backbone bf16, dino_head fp32; teacher: fp32"


def test_what_auto_becomes_is_told(describe: Describe) -> None:
    lines = describe(*AUTO, "optim.epochs=12", "train.OFFICIAL_EPOCH_LENGTH=50", "train.batch_size_per_gpu=4")
    assert "auto" not in describe()
    assert lines["auto"] == (
        "teacher.momentum_teacher=0.9 teacher.final_momentum_teacher=0.995 teacher.teacher_temp=0.04 "
        "teacher.warmup_teacher_temp_epochs=3.6 optim.base_lr=0.002 optim.warmup_epochs=1 "
        "optim.freeze_last_layer_epochs=0"
    )
    assert lines["learning rate"] == "0 -> 0.000125 in 50 iterations -> 1e-06"


def test_options_without_effect_and_missing_images_are_warned_of(
    describe: Describe, tmp_path: Path, parts: Path
) -> None:
    no_effect = "optim.base_lr has no effect while optim.lr is 1 and not scaled"
    assert describe("optim.lr=1", "optim.base_lr=3")["warning"] == no_effect
    shutil.copytree(parts, tmp_path / "parts")
    sorted((tmp_path / "parts" / "train").rglob("*.jpeg"))[0].unlink()
    lines = describe(f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}", "ibot.separate_head=true")
    assert re.match(r"1 of a sample of the images do not exist, such as .*jpeg", lines["warning"])


def warnings_of(train: Train, output: Path, capsys: pytest.CaptureFixture[str], *pairs: str) -> list[str]:
    assert train(output, "--dry-run", *pairs) == 0
    return [
        line[20:]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  warning ") and "no effect" not in line
    ]


def test_a_length_that_does_not_suit_the_set_is_warned_of(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings(*pairs: str) -> list[str]:
        return warnings_of(train, tmp_path / "run", capsys, *pairs)

    assert not warnings()
    assert not warnings("optim.epochs=1000")
    (text,) = warnings("optim.epochs=9000")
    assert text.startswith("7,714 passes over 14 images are far more than such a set carries")
    advised = re.findall(r"train\.\S+ optim\.epochs=200", text)
    assert not warnings(*advised[0].split())
    (text,) = warnings("train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=2")
    assert text.startswith("the run ends before it has seen 43% of the images: train.OFFICIAL_EPOCH_LENGTH=4 makes 2 ")
    assert train(tmp_path / "run", "train.OFFICIAL_EPOCH_LENGTH=1", "optim.epochs=2") == 0
    assert text in (tmp_path / "run" / "log" / "log.txt").read_text(), "and so in the report"


def test_a_need_of_more_memory_or_disk_than_there_is_is_warned_of(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warnings(**machine: float) -> list[str]:
        sizes = {"device": 0.0, "memory": 64.0, "free": 64.0, "disk": 100.0} | machine
        found = Machine(processes=1, **{name: int(size * dry_run.GIB) for name, size in sizes.items()})
        monkeypatch.setattr(dry_run, "measure_machine", lambda device, output_dir: found)
        return warnings_of(train, tmp_path / "run", capsys)

    assert not warnings()
    (text,) = warnings(memory=0.4, free=0.4)
    assert re.match(r"the run needs about \d\.\d GiB of memory on a machine that has 0\.4, and may be killed", text)
    (text,) = warnings(free=0.4)
    assert "on a machine that has 0.4 free, and may be killed" in text
    (text,) = warnings(device=1e-6)
    assert re.match(
        r"the run needs about \d\.\d GiB on a GPU that has 0\.0: train\.activation_checkpointing=true", text
    )
    (text,) = warnings(disk=1e-6)
    assert re.match(r"the checkpoints kept take about \d\.\d GiB on a disk that has 0\.0 free", text)


def test_what_a_machine_has_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = measure_machine(CPU, tmp_path / "not" / "there")
    assert machine.device == 0
    assert 0 < machine.free <= machine.memory
    assert machine.disk > 0
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(processor, "_MEMORY_LIMITS", (tmp_path / "limit", tmp_path / "none", tmp_path / "absent"))
    assert measure_machine(CPU, tmp_path).memory == 1000000


def test_loading_processes_and_cached_files_take_memory() -> None:
    def loading(*pairs: str, set_bytes: float = math.inf) -> int:
        config = load_config(None, [*OPTIONS, *pairs])
        with torch.device("meta"):
            return estimate_memory(config, SSLMetaArch(config), CPU, 1, set_bytes=set_bytes).loading

    plain = loading("train.cache_dataset=false")
    assert loading("data.cache_gib=3") - plain == 3 * 2**30
    assert loading("data.cache_gib=3", set_bytes=1000) - plain == 1000, "no more than there is"
    assert loading("train.cache_dataset=false", "train.num_workers=4") > plain


def test_a_folder_of_images_is_all_that_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file with options, no evaluation set; a path in place of a dataset string is told what to write."""
    make_small(monkeypatch)
    for number in range(4):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    small = [pair for pair in OPTIONS if not pair.startswith("train.OFFICIAL")]
    pairs = ["--dry-run", f"train.output_dir={tmp_path / 'run'}", *small]
    with pytest.raises(
        ValueError, match=r"is a path and names no dataset: write ImageFolder:root=\S+:labels=none"
    ) as error:
        main([*pairs, f"train.dataset_path={tmp_path}"])
    (advised,) = re.findall(r"ImageFolder\S+", str(error.value))
    assert main([*pairs, f"train.dataset_path={advised}"]) == 0
    assert "4 images, one batch of 4 read" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"lacks the images' folder: train\.dataset_path=ImageFolder:root=/my/images"):
        main(pairs)


LARGER = (*OPTIONS, "crops.global_crops_size=64", "crops.local_crops_size=32", "student.drop_path_rate=0")


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
    pairs = [f"compute_precision.{name}.backbone.sharding_strategy=NO_SHARD" for name in NAMES]
    backbone = sum(parameter.numel() for parameter in model.student["backbone"].parameters())
    replicated = estimate(load_config(None, [*OPTIONS, *pairs]), processes=2).states
    assert replicated == 4 * 5 * (backbone + (student - backbone) // 2), "the head is still sharded"


def test_recomputation_and_shorter_numbers_need_less() -> None:
    plain = estimate(load_config(None, LARGER)).activations
    half = ["compute_precision.student.backbone.mixed_precision.param_dtype=bf16"]
    assert 0.5 * plain < estimate(load_config(None, [*LARGER, *half])).activations < 0.6 * plain
    assert estimate(load_config(None, [*LARGER, "train.activation_checkpointing=true"])).activations < 0.4 * plain
    assert estimate(load_config(None, [*LARGER, "train.batch_size_per_gpu=8"])).activations > 1.9 * plain

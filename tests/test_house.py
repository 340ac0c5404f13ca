"""The order of the house: floors, one parser, and names that users know."""

import ast
import functools
import graphlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    1: ("config", "distributed", "utils", "layers"),
    2: ("logging", "models", "loss", "data", "checkpoint"),
    3: ("fsdp", "eval", "loop"),
    4: ("tasks",),
    5: ("predict", "train", "hub", "run"),
    6: ("deploy",),
}
FLOOR_OF = {package: floor for floor, packages in FLOORS.items() for package in packages}

PUBLIC_NAMES = {
    "dinov2": "pretrain finetune load __version__",
    "dinov2.data.loaders": "make_dataset make_data_loader SamplerType",
    "dinov2.data.augmentations": "DataAugmentationDINO",
    "dinov2.data.datasets": "GroupedJSON ImageFolder ImageNet ImageNet22k ELPV "
    "CIFAR10 ImageMaskFolder KITTIDepth NYUDepthV2 VOCSegmentation",
    "dinov2.data.datasets.image_net": "ImageNet ImageNet22k",
    "dinov2.models.detector": "DINOv2ObjectDetector",
    "dinov2.models.vision_transformer": "DinoVisionTransformer vit_tiny vit_small vit_base vit_large vit_giant2",
    "dinov2.layers.dino_head": "DINOHead",
    "dinov2.loss.dino_clstoken_loss": "DINOLoss",
    "dinov2.loss.ibot_patch_loss": "iBOTPatchLoss",
    "dinov2.loss.koleo_loss": "KoLeoLoss",
    "dinov2.train.ssl_meta_arch": "SSLMetaArch",
    "dinov2.train.train": "do_train do_test",
    "dinov2.fsdp": "FSDPCheckpointer PeriodicCheckpointer",
    "dinov2.hub.backbones": " ".join(f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")),
    "dinov2.hub.classifiers": " ".join(
        f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("_lc", "_reg_lc")
    ),
    "dinov2.hub.depthers": " ".join(f"dinov2_vit{size}14_{head}" for size in "sblg" for head in ("ld", "dd")),
    "dinov2.hub.segmentors": " ".join(f"dinov2_vit{size}14_{head}" for size in "sblg" for head in ("ls", "ms")),
    "dinov2.hub.decode_heads": "BNHead DPTHead",
    "dinov2.eval.utils": "MetricLogger MetricCollection ModelWithNormalize",
    "dinov2.eval.knn": "eval_knn",
    "dinov2.eval.linear": "eval_linear",
    "dinov2.eval.log_regression": "eval_log_regression",
    "dinov2.eval.retrieval": "eval_retrieval",
    "dinov2.eval.anomaly": "eval_anomaly",
}


def library_files(repository: Path) -> list[Path]:
    return sorted((repository / "dinov2").rglob("*.py"))


@functools.cache
def imported_names(path: Path, *, at_run_time: bool = False) -> tuple[str, ...]:
    """Dotted names that a file imports; ``at_run_time`` leaves out those for the type checker."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            for child in ast.iter_child_nodes(node):
                yield from walk(child)

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8"))))


def test_every_module_imports_only_from_floors_below_its_own(repository: Path) -> None:
    wrong = []
    for path in library_files(repository):
        own = path.relative_to(repository / "dinov2").parts[0]
        if own.endswith(".py"):
            continue
        for module in imported_names(path):
            parts = module.split(".")
            if parts[0] != "dinov2" or len(parts) < 2 or parts[1] == own or parts[1] == "__version__":
                continue
            if FLOOR_OF[parts[1]] >= FLOOR_OF[own]:
                wrong.append(f"{path.relative_to(repository)} (floor {FLOOR_OF[own]}) imports {module}")
    assert not wrong, "\n".join(wrong)


def test_files_do_not_import_each_other_in_a_circle(repository: Path) -> None:
    files = {
        ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__"): path
        for path in library_files(repository)
    }
    imports = {
        name: {
            found if found in files else found.rpartition(".")[0] for found in imported_names(path, at_run_time=True)
        }
        for name, path in files.items()
    }
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_every_package_has_a_floor(repository: Path) -> None:
    packages = {path.parent.name for path in (repository / "dinov2").glob("*/__init__.py")}
    assert packages <= FLOOR_OF.keys()


def test_models_layers_and_losses_use_distributed_for_reductions_only(repository: Path) -> None:
    allowed = ("reduce", "all_", "get_world_size", "get_rank")
    for package in ("models", "layers", "loss"):
        for path in (repository / "dinov2" / package).rglob("*.py"):
            for module in imported_names(path):
                if module.startswith("dinov2.distributed."):
                    assert module.split(".")[2].startswith(allowed), f"{path} imports {module}"


def test_argparse_lives_in_one_place(repository: Path) -> None:
    users = [
        path.relative_to(repository).as_posix()
        for folder in ("dinov2", "run", "eval", "tools")
        for path in (repository / folder).rglob("*.py")
        if any(name.partition(".")[0] == "argparse" for name in imported_names(path))
    ]
    assert users == ["dinov2/config/command_line.py"]


def test_nothing_private_of_torch_is_used(repository: Path) -> None:
    for path in library_files(repository):
        for module in imported_names(path):
            parts = module.split(".")
            private = parts[0] in ("torch", "torchvision") and any(part.startswith("_") for part in parts)
            assert not private, f"{path.relative_to(repository)} imports {module}"


def test_no_switch_is_read_from_the_environment(repository: Path) -> None:
    """What a launcher tells about processes is the only thing taken from there."""
    users = [
        path.relative_to(repository).as_posix()
        for path in library_files(repository)
        if "os.environ" in path.read_text(encoding="utf-8") or "getenv" in path.read_text(encoding="utf-8")
    ]
    assert users == [f"dinov2/distributed/{name}.py" for name in ("session", "stall")]


def test_what_serves_every_task_knows_none(repository: Path) -> None:
    """No task's name and no word of boxes, but in what is imported."""
    words = re.compile(r"\b(classification|segmentation|detection|detector|depth|anomaly|box(es)?)\b", re.IGNORECASE)
    names = "engine evaluation inference networks training_data dry_run"
    files = [repository / "dinov2" / "tasks" / f"{name}.py" for name in names.split()]
    files += [repository / "dinov2" / "predict" / f"{name}.py" for name in ("predictor", "video", "video_files")]
    files += (repository / "dinov2" / "eval" / "report").glob("*.py")
    found = [
        f"{path.relative_to(repository)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if words.search(line) and not line.lstrip().startswith(("from ", "import "))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_names_that_users_know_are_importable(module: str) -> None:
    found = importlib.import_module(module)
    for name in PUBLIC_NAMES[module].split():
        assert hasattr(found, name), f"{module} lacks {name}"

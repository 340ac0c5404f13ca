"""What the README shows works: Python blocks run, on stand-ins for data and weights; shell lines are understood.

Networks, sets and runs are replaced by small ones. Paths below ``/data`` become a set of drawn parts, files of weights
and images that do not exist become stand-ins of their kind, and released names small networks.
"""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2 import __main__ as program
from dinov2.config import Config, load_config
from dinov2.models import build
from dinov2.models.released import RELEASED_BACKBONES
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks import engine, load_task_config
from dinov2.tasks.options import TaskConfig
from dinov2.train import command

OLD = Path(__file__).parent / "old_files"
TEACHER = "one/eval/training_3/teacher_checkpoint.pth"
STAND_INS = {
    r"best\.pth": "segmentation/best.pth",
    r"[\w.]+\.(?:pth|safetensors)": TEACHER,
    r"config\.yaml": "one/config.yaml",
    r"[\w.]+\.(?:png|jpe?g)": "parts/val/part_0005/part_0005-0.jpeg",
}
HEAD = {"head_n_prototypes": 16, "head_hidden_dim": 16, "head_bottleneck_dim": 8}
SMALL: dict[str, Any] = {
    "dino": HEAD,
    "ibot": HEAD,
    "student": {"arch": "vit_tiny", "patch_size": 4},
    "crops": {"global_crops_size": 16, "local_crops_size": 16, "local_crops_number": 1},
    "train": {"batch_size_per_gpu": 3, "OFFICIAL_EPOCH_LENGTH": 1, "num_workers": 0, "device": "cpu"},
    "optim": {"epochs": 1, "warmup_epochs": 0, "freeze_last_layer_epochs": 0},
    "evaluation": {"image_size": 16},
}
SMALL_TASK: dict[str, Any] = {
    "backbone": {"config_file": str(OLD / "one" / "config.yaml"), "blocks": [-1]},
    "head": {"kind": "auto"},
    "data": {"image_size": 16, "num_workers": 0},
    "train": {"device": "cpu"},
    "optim": {"epochs": 1, "warmup_epochs": 0},
}
UNCHECKED = {"pip", "git", "cd", "source", ".", "export"}  # commands whose words are not ours
COMMANDS = {"python", "torchrun", "bash", "dinov2", *UNCHECKED}


class Parsed(BaseException):
    """A command line was understood; nothing is to be done."""

    def __init__(self, values: argparse.Namespace) -> None:
        self.values = values


def blocks(repository: Path) -> Iterator[tuple[str, str]]:
    """Language and code; without a language, what begins with a command is for the shell, and the rest is a drawing."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S):
        yield language or ("bash" if code.split()[0] in COMMANDS else "text"), code


def tiny_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=8, depth=2, num_heads=2, **options)


def stand_in(text: str) -> str:
    """The text with folders of data that exist; files that it names are made."""
    text = re.sub(r"/data(?:/[\w-]+)?(?=[\s:'\"/]|$)", "parts", text)
    for name in re.findall(r"[\w./-]+\.\w+", text):
        path = Path(name)
        source = next((source for kind, source in STAND_INS.items() if re.fullmatch(kind, path.name)), None)
        if source and not path.exists() and not path.is_absolute() and not Path(path.parts[0]).is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(OLD / source, path)
            if source == TEACHER:  # as it is written today, with the options of its run
                config = (OLD / "one" / "config.yaml").read_text(encoding="utf-8")
                torch.save({**torch.load(OLD / source, weights_only=True), "config": config}, path)
    return text


def with_data(config: Any, sections: dict[str, Any]) -> dict[str, Any]:
    """Options that make a run small; sets that do not exist become the stand-in."""
    small = {section: dict(options) for section, options in sections.items()}
    for section, options in vars(config).items():
        for name, value in vars(options).items() if hasattr(options, "__dict__") else ():
            root = re.search(r"root=([^:]+)", value) if name.endswith("dataset_path") else None
            if value and name.endswith("dataset_path") and not (root and Path(root[1]).exists()):
                split = (re.search(r"split=(\w+)", value) or ["", "TRAIN"])[1]
                small.setdefault(section, {})[name] = f"GroupedJSON:split={split}:root=parts"
    return small


def shorten(config: Config) -> Config:
    return load_config(config, with_data(config, SMALL))


def shorten_task(config: TaskConfig) -> TaskConfig:
    weights = {} if Path(config.backbone.pretrained_weights).is_file() else {"pretrained_weights": ""}
    small = with_data(config, {**SMALL_TASK, "backbone": SMALL_TASK["backbone"] | weights})
    return load_task_config(config, small)


@pytest.fixture(autouse=True)
def _stand_ins(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "run", "eval", "tools"):
        (tmp_path / name).symlink_to(repository / name)
    shutil.copytree(OLD / "parts", tmp_path / "parts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "ARCHITECTURES", dict.fromkeys(build.ARCHITECTURES, tiny_vit))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for released in RELEASED_BACKBONES.values():
        network = tiny_vit(img_size=518, patch_size=14, num_register_tokens=released.num_registers, init_values=1.0)
        torch.save(network.state_dict(), tmp_path / "checkpoints" / released.address().rpartition("/")[2])
    run, run_task = command.pretrain, engine.finetune
    monkeypatch.setattr(command, "pretrain", lambda config, **settings: run(shorten(config), **settings))
    monkeypatch.setattr(engine, "finetune", lambda config, **settings: run_task(shorten_task(config), **settings))


def test_python_blocks_run(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A reader's first run has no other data than the reader's own: sets that a config names are not made up here.
    monkeypatch.setitem(globals(), "with_data", lambda config, sections: sections)
    names: dict[str, Any] = {}
    for number, (language, code) in enumerate(blocks(repository)):
        if language == "python":
            exec(compile(stand_in(code), f"block {number} of the README", "exec"), names)


def commands(repository: Path) -> Iterator[list[str]]:
    for code in (code for language, code in blocks(repository) if language == "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True, timeout=60)
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(stand_in(line), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                yield words


def test_shell_lines_are_understood(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_known_intermixed_args

    def parse_only(parser: argparse.ArgumentParser, words: list[str]) -> Any:
        values, unknown = parse(parser, words)
        assert not unknown, f"unknown words {unknown}"
        raise Parsed(values)

    for words in commands(repository):
        first = Path(words[0]).name
        assert first in COMMANDS, f"unknown command: {shlex.join(words)}"
        if first in UNCHECKED or words[1] == "-m":
            continue
        if first != "dinov2":
            script = next(word for word in words if word.endswith((".py", ".sh")))
            assert (repository / script).is_file(), f"there is no {script}"
            words = words[words.index(script) :]
        if first == "bash":
            continue
        pretrains = words[0] == "run/train/train.py" or words[:2] == ["dinov2", "train"]
        if pretrains and "--slurm" not in words:
            assert command.main([*words[1 + (first == "dinov2") :], "--dry-run"]) == 0
            continue
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.setattr(argparse.ArgumentParser, "parse_known_intermixed_args", parse_only)
            with pytest.raises(Parsed) as parsed:
                program.main() if first == "dinov2" else runpy.run_path(words[0], run_name="__main__")
        values = vars(parsed.value.values)
        load = load_task_config if "finetune" in shlex.join(words[:2]) else load_config
        load(values.get("config_file") or values.get("config"), values.get("overrides", ()))

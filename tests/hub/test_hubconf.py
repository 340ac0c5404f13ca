"""Entry points of torch.hub: complete, and usable through it."""

import importlib.util
from pathlib import Path

import torch

from dinov2.hub import backbones, classifiers, depthers, segmentors
from dinov2.models.task_model import TaskModel


def test_every_constructor_is_an_entry_point(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("hubconf", repository / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    constructors = {
        name: function
        for module in (backbones, classifiers, depthers, segmentors)
        for name, function in vars(module).items()
        if name.startswith("dinov2_")
    }
    assert len(constructors) == 8 + 8 + 8 + 8
    assert set(hubconf.__all__) - {"dependencies"} == set(constructors)
    for name, function in constructors.items():
        assert getattr(hubconf, name) is function
        assert function.__doc__
    for package in hubconf.dependencies:
        assert importlib.util.find_spec(package) is not None


def test_a_model_comes_through_torch_hub(repository: Path) -> None:
    model = torch.hub.load(str(repository), "dinov2_vits14_ld", source="local", layers=1, pretrained=False)
    assert isinstance(model, TaskModel)
    assert model.blocks == (11,)

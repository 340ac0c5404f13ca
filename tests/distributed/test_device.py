"""Which device a process computes on."""

import pytest
import torch

from dinov2.distributed import choose_device


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(2, False, "cuda:1"), (2, True, "cuda:1"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_that_is_there(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str
) -> None:
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert choose_device("auto", 1) == torch.device(expected)


def test_a_named_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=4, mps=True)
    assert choose_device("cpu", 3) == torch.device("cpu")
    assert choose_device("cuda", 3) == torch.device("cuda", 3)
    assert choose_device("mps") == torch.device("mps")


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(ValueError, match="device cuda was asked for, but torch sees no GPU"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="device mps was asked for"):
        choose_device("mps")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine(monkeypatch, gpus=2)
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU: torch sees 2; start fewer processes"):
        choose_device(name, 2)

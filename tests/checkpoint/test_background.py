"""Saving beside training: what is saved is what was there when it was asked for, one write at a time."""

import logging
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import assert_equal, build, names, states

from dinov2.checkpoint import checkpointer as checkpointer_module
from dinov2.checkpoint.checkpointer import BackgroundWrite, FSDPCheckpointer, PeriodicFSDPCheckpointer, to_host
from dinov2.utils.seeds import RandomState


class Gate:
    """Holds back writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.event = threading.Event()
        self.at_work = 0
        self.most = 0
        real = checkpointer_module.write_with_checksum

        def write(*arguments: Any) -> str:
            self.at_work += 1
            self.most = max(self.most, self.at_work)
            assert self.event.wait(20)
            try:
                return real(*arguments)
            finally:
                self.at_work -= 1

        monkeypatch.setattr(checkpointer_module, "write_with_checksum", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def disturb(checkpointer: FSDPCheckpointer) -> None:
    """What training does right after `save` has returned."""
    with torch.no_grad():
        for tensor in [*checkpointer.model.parameters(), *checkpointer.model.buffers()]:
            tensor.copy_(torch.full_like(tensor, 77))
        for state in checkpointer.optimizer.state.values():
            for tensor in state.values():
                tensor.fill_(77)
    torch.rand(1000)


def test_files_are_those_of_a_save_that_is_waited_for(tmp_path: Path, gate: Gate) -> None:
    contents = []
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        folder.mkdir()
        history = {"list": [1, 2], "tensor": torch.zeros(3)}
        checkpointer = build(folder, asynchronous=asynchronous, random=RandomState())
        if not asynchronous:
            gate.event.set()
        checkpointer.save("model_0000004", iteration=4, history=history)
        if asynchronous:
            disturb(checkpointer)
            history["list"].append(3)
            history["tensor"].fill_(9)
            assert names(folder) == [], "the write has not even begun"
            gate.event.set()
        assert checkpointer.wait()
        contents.append((folder / "model_0000004.rank_0.pth").read_bytes())
    assert contents[0] == contents[1]


def test_training_goes_on_and_the_step_counts_when_it_is_polled(tmp_path: Path, gate: Gate) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.poll()
    assert checkpointer.get_checkpoint_file() == ""
    gate.event.set()
    while checkpointer.pending is not None:
        checkpointer.poll()
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000004.rank_0.pth"]


def test_a_second_save_waits_for_the_first_and_says_so(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=2)
    periodic.step(0)
    expected = states(checkpointer)
    threading.Timer(0.3, gate.event.set).start()
    periodic.step(1)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"training waits: {tmp_path / 'model_0000000.rank_0.pth'} is still being written, and the next save is due"
    ]
    assert checkpointer.steps("model")[0] == 0
    periodic.step(2)
    assert checkpointer.wait()
    assert gate.most == 1, "one write at a time"
    assert checkpointer.steps("model") == [1, 2]
    other = build(tmp_path, seed=3)
    other.resume_or_load("")
    assert_equal(states(other), expected)


def test_old_steps_stay_until_the_new_one_counts(tmp_path: Path, gate: Gate) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=1)
    gate.event.set()
    periodic.save_step(0)
    gate.event.clear()
    periodic.step(1)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000000.rank_0.pth"]
    gate.event.set()
    assert checkpointer.wait()
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth"]


def test_the_last_iteration_is_waited_for(tmp_path: Path) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    PeriodicFSDPCheckpointer(checkpointer, period=100, max_iter=6, keep_last=1).step(5)
    assert checkpointer.get_checkpoint_file().endswith("model_0000005.rank_{rank}.pth")


def test_loading_waits_for_the_write(tmp_path: Path) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    checkpointer.save("model_0000004", iteration=4)
    assert checkpointer.newest()["iteration"] == 4
    checkpointer.save("model_0000005", iteration=5)
    assert checkpointer.resume_or_load("")["iteration"] == 5


def test_closing_finishes_the_file_without_naming_it(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    checkpointer.save("model_0000004", iteration=4)
    threading.Timer(0.1, gate.event.set).start()
    checkpointer.close()
    checkpointer.close()
    assert names(tmp_path) == ["model_0000004.rank_0.pth"]
    # It was the first and is whole: better than beginning anew.
    assert build(tmp_path).resume_or_load("")["iteration"] == 4
    assert "no last_checkpoint file: going on from model_0000004, which is complete and undamaged" in caplog.text


def test_a_defect_surfaces_in_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    checkpointer = build(tmp_path, asynchronous=True)
    monkeypatch.setattr(checkpointer_module, "write_with_checksum", fail)
    checkpointer.save("model_0000004", iteration=4)
    with pytest.raises(ZeroDivisionError):
        checkpointer.wait()
    assert names(tmp_path) == []


def test_waiting_long_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(checkpointer_module, "PATIENCE_SECONDS", 0.05)
    event = threading.Event()
    write = BackgroundWrite(lambda: event.wait(20), Path("model_0000004.rank_0.pth"), 4)
    threading.Timer(0.3, event.set).start()
    write.join()
    assert write.done
    assert "still waiting for model_0000004.rank_0.pth to be written: the disk is slow, or gone" in caplog.text


def test_copies_share_nothing() -> None:
    base = torch.arange(6.0)
    value = {"view": base[2:4], "deep": [(base, {"n": 1})], "ordered": OrderedDict(a=base), "name": "x"}
    copied = to_host(value)
    base.fill_(0)
    assert copied["view"].tolist() == [2, 3]
    assert copied["view"].untyped_storage().nbytes() == 8, "of a view, only what it shows"
    assert copied["deep"][0][0].tolist() == copied["ordered"]["a"].tolist() == list(range(6))
    assert copied["deep"][0][1] is not value["deep"][0][1]
    assert not to_host(torch.nn.Parameter(torch.zeros(2))).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_from_a_gpu_are_finished_on_return() -> None:
    tensors = {str(size): torch.randn(size, 1000, device="cuda", dtype=torch.bfloat16) for size in (1, 7, 3000)}
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    copied = to_host(tensors)
    for tensor in tensors.values():
        tensor.fill_(0)
    for name, tensor in copied.items():
        assert tensor.is_pinned()
        assert torch.equal(tensor, expected[name])

from pathlib import Path

import pytest

from dinov2.logging import TensorBoardWriter
from dinov2.logging import run_log as tensorboard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_numbers_are_written_flat_and_the_rest_is_left_out(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    for iteration in range(2):
        writer.add_scalars(
            {"iteration": iteration, "lr": 0.5, "timing": {"seconds": iteration}, "name": "run", "flag": True},
            iteration,
        )
    writer.close()
    assert scalars(tmp_path / "tensorboard") == {"lr": [(0, 0.5), (1, 0.5)], "timing/seconds": [(0, 0.0), (1, 1.0)]}


def test_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    first = TensorBoardWriter(tmp_path)
    for iteration in range(5):
        first.add_scalars({"loss": 1.0}, iteration)
    first.close()
    second = TensorBoardWriter(tmp_path, purge_step=3)
    second.add_scalars({"loss": 2.0}, 3)
    second.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_disk_that_takes_nothing_costs_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer, real = TensorBoardWriter(tmp_path, purge_step=0), SummaryWriter.add_scalar

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for iteration in range(4):
        monkeypatch.setattr(SummaryWriter, "add_scalar", refuse if iteration == 1 else real)
        writer.add_scalars({"loss": 1.0}, iteration)
    writer.close()
    assert scalars(tmp_path / "tensorboard")["loss"] == [(0, 1.0), (2, 1.0), (3, 1.0)]
    (message,) = caplog.messages
    assert message.endswith(
        "tensorboard cannot be written, its curves will have a gap: [Errno 28] No space left on device"
    )


def test_nothing_is_written_before_the_first_value_or_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorBoardWriter(tmp_path).close()
    monkeypatch.setattr(tensorboard, "is_main_process", lambda: False)
    writer = TensorBoardWriter(tmp_path)
    writer.add_scalars({"loss": 1.0}, 0)
    writer.close()
    assert list(tmp_path.iterdir()) == []

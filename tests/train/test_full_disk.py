"""A disk that takes nothing any more ends the run at a line of its records; with room again, nothing was lost."""

from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import Train, assert_same_run, iterations

from dinov2.logging.metrics_file import MetricsFile


@pytest.mark.parametrize("at", [1, 4])
def test_the_same_command_goes_on_when_there_is_room_again(train: Train, tmp_path: Path, at: int) -> None:
    """Half a line is on the disk, as a full one leaves it."""
    real, calls = MetricsFile.append, iter(range(99))

    def append(self: MetricsFile, record: Any) -> None:
        if next(calls) == at + 1:  # after the first look at the features
            with self.path.open("ab") as file:
                file.write(b'{"iteration": ')
            raise OSError(28, "No space left on device")
        real(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "append", append)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path / "run")
    assert iterations_before_the_torn_line(tmp_path / "run") == list(range(at))
    assert train(tmp_path / "run") == 0
    assert train(tmp_path / "whole") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def iterations_before_the_torn_line(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b'{"iteration": '))
    found = iterations(folder)
    with path.open("ab") as file:
        file.write(b'{"iteration": ')
    return found

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.logging import close_logging, logging_to, setup_logging

logger = logging.getLogger("dinov2")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_logging()


def test_a_message_reaches_terminal_and_file_once_however_often_logging_is_set_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        setup_logging(tmp_path)
    logger.info("loss fell")
    logger.warning("loss rose")
    logger.debug("unheard")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" ", 1)[1] for line in captured.err.splitlines()] == ["loss fell", "WARNING: loss rose"]
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [line.rsplit(" ", 2)[1:] for line in lines] == [["loss", "fell"], ["loss", "rose"]]
    assert "INFO" in lines[0]
    assert "test_setup_logging.py" in lines[0]


def test_other_ranks_write_their_own_file_and_stay_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(tmp_path, 3)
    logger.error("from rank 3")
    assert capsys.readouterr().err == ""
    assert "from rank 3" in (tmp_path / "log" / "log.rank_3.txt").read_text()
    assert not (tmp_path / "log" / "log.txt").exists()


def test_warnings_of_a_rank_without_a_file_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(None, 2)
    logger.info("chatter")
    logger.warning("trouble")
    assert capsys.readouterr().err.strip().endswith("[rank 2] WARNING: trouble")


def test_a_resumed_run_appends_to_its_log(tmp_path: Path) -> None:
    for message in ("first", "second"):
        with logging_to(tmp_path):
            logger.info(message)
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_level_is_obeyed(tmp_path: Path) -> None:
    with logging_to(tmp_path, level=logging.DEBUG):
        logger.debug("detail")
    assert "detail" in (tmp_path / "log" / "log.txt").read_text()


def test_the_root_logger_and_handlers_of_others_are_left_alone(tmp_path: Path) -> None:
    root, foreign = list(logging.getLogger().handlers), logging.NullHandler()
    logger.addHandler(foreign)
    try:
        with logging_to(tmp_path):
            assert logging.getLogger().handlers == root
            assert not logger.propagate
        assert logger.handlers == [foreign]
        assert logger.propagate
        assert logger.level == logging.NOTSET
    finally:
        logger.removeHandler(foreign)

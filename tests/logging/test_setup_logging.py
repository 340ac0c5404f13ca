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


def test_a_resumed_run_appends_to_its_log_and_the_level_is_obeyed(tmp_path: Path) -> None:
    for message, level in (("first", logging.INFO), ("second", logging.DEBUG)):
        with logging_to(tmp_path, level=level):
            logger.debug(message)
            logger.info(message)
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second", "second"]


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


def test_a_full_disk_costs_one_line_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.txt").symlink_to("/dev/full")
    with logging_to(tmp_path):
        for number in range(200):
            logger.info("message %d of many", number)
    told = capsys.readouterr().err.splitlines()
    (complaint,) = [line for line in told if "cannot be written" in line]
    assert complaint.endswith("log/log.txt cannot be written: [Errno 28] No space left on device")
    assert len(told) == 201


def test_messages_go_on_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    (handler,) = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    real = handler.flush
    for number in range(6):
        if number in (1, 2, 4):
            monkeypatch.setattr(handler, "flush", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        else:
            monkeypatch.setattr(handler, "flush", real)
        logger.info("message %d", number)
    monkeypatch.setattr(handler, "flush", real)
    close_logging()
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == list("012345")
    assert capsys.readouterr().err.count("cannot be written: [Errno 5]") == 2, "once each time"


def test_no_name_in_a_message_steers_the_terminal_or_looks_like_another_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(tmp_path)
    logger.warning("%s is unreadable", "a\x1b[2Jb\n12:00:00 ERROR: forged\n2026-11-20 12:00:00,000 ERROR forged.png")
    logger.info("a table\n12  34\nwith lines")
    for text in (capsys.readouterr().err, (tmp_path / "log" / "log.txt").read_text()):
        assert "a\\x1b[2Jb\n  12:00:00 ERROR: forged\n  2026-11-20 12:00:00,000 ERROR forged.png is unreadable" in text
        assert "a table\n12  34\nwith lines\n" in text

"""Files that are dropped into a folder: each is handled once, whatever happens to the process."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dinov2.data.preprocessing import Chain
from dinov2.deploy import watch
from dinov2.deploy.delivery import FolderTarget, MqttTarget, RefusedError, Target, WebTarget, open_target
from dinov2.deploy.watch import Watcher
from dinov2.predict.predictor import Predictor
from dinov2.tasks.predictions import ClassPrediction
from dinov2.utils.errors import RunError
from tests.deploy.service_stand_ins import png
from tests.tasks.predictor_stand_ins import BLUE, RED, ColourModel, make_package, write_package

NUMBERS = tuple(map(str, range(256)))
IDENTITY = {"version": "1", "fingerprint": "f"}


class LightPredictor:
    """Needs no torch, whose threads a forked process has none of. Says the number that the image's colour is."""

    batch_size = 3
    preprocessing = SimpleNamespace(value_range=None, chain=Chain())

    def prepare(self, image: Any, *, reference: Any = None) -> Any:
        return np.asarray(image)[0, 0]

    def predict_prepared(self, images: Any) -> list[ClassPrediction]:
        return [ClassPrediction(np.eye(256, dtype=np.float32)[pixel[0]], classes=NUMBERS) for pixel in images]


def drop(folder: Path, name: str, data: bytes) -> None:
    (folder / f"{name}.part").write_bytes(data)
    (folder / f"{name}.part").rename(folder / name)


def run_all(folder: Path, target: Target, predictor: Any = None, **options: Any) -> int:
    """Handles everything there is; returns how many files that were."""
    watcher = Watcher(folder, predictor or LightPredictor(), target, IDENTITY, settle_s=0, **options)
    total = 0
    with watcher.alone():
        while True:
            handled, waiting = watcher.step()
            total += handled
            if not waiting and not handled:
                return total


def names(folder: Path) -> list[str]:
    return sorted(watch._name_in(path.name) for path in folder.iterdir())


def test_results_drawings_and_masks_lie_in_a_folder(tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    (inbox / "inner").mkdir(parents=True)
    for name, data in {"a.png": png(RED), "b.png": png(BLUE), "c.jpg": b"no image", "d.png": b""}.items():
        drop(inbox, name, data)
    for left in ("notes.txt", ".hidden.png", "inner/e.png"):
        (inbox / left).write_bytes(png(RED))
    predictor = Predictor.of(make_package(ColourModel()), batch_size=2)
    assert run_all(inbox, open_target(str(tmp_path / "out")), predictor) == 4
    drop(inbox, "a.png", png(BLUE))  # cameras use names again
    assert run_all(inbox, open_target(str(tmp_path / "out"), overlay=False), predictor) == 1
    said = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert sorted(line["image"] for line in said) == ["a.png", "a.png", "b.png", "c.jpg", "d.png"]
    for line in said:
        assert (tmp_path / "out" / f"{line['id']}.json").is_file()
        assert line["model"] == IDENTITY
        assert ("error" in line) == (line["image"][0] in "cd")
        assert all((tmp_path / "out" / path).is_file() for path in line["files"].values())
    colours = {(line["image"], *line["prediction"]["pixels"]) for line in said if "prediction" in line}
    assert colours == {("a.png", "red"), ("a.png", "blue"), ("b.png", "blue")}
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 2
    assert names(inbox / "done") == ["a.png", "a.png", "b.png"]
    assert names(inbox / "failed") == ["c.jpg", "d.png"]
    assert {path.name for path in inbox.iterdir()} == {
        "notes.txt", ".hidden.png", "inner", "done", "failed", watch.WORK,
    }  # fmt: skip


class NarrowPredictor(LightPredictor):
    """Cannot say a number of 200 or more."""

    def predict_prepared(self, images: Any) -> list[ClassPrediction]:
        if any(pixel[0] >= 200 for pixel in images):
            raise RunError("the model's logits is NaN")
        return super().predict_prepared(images)


def test_an_image_on_which_the_model_fails_stops_no_other(tmp_path: Path) -> None:
    for number in (1, 250, 3, 4):
        drop(tmp_path, f"{number}.png", png((number, 0, 0)))
    assert run_all(tmp_path, FolderTarget(tmp_path / "out"), NarrowPredictor()) == 4
    assert (names(tmp_path / "done"), names(tmp_path / "failed")) == (["1.png", "3.png", "4.png"], ["250.png"])
    said = {line["image"]: line for line in map(json.loads, (p.read_text() for p in (tmp_path / "out").glob("*.json")))}
    assert said["250.png"]["error"] == "the model's logits is NaN"
    assert said["3.png"]["prediction"]["label"] == "3"


def test_a_model_that_fails_on_everything_moves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RunError("the model's logits is NaN")

    write_package(tmp_path / "best.pth", "classification")
    drop(tmp_path, "a.png", png(RED))
    monkeypatch.setattr(Predictor, "predict_prepared", failing)
    with pytest.raises(RunError, match="logits is NaN"):
        watch.main([str(tmp_path), "--weights", str(tmp_path / "best.pth"), "--to", str(tmp_path / "out"), "--once"])
    assert (tmp_path / "a.png").is_file()


def test_long_names_in_any_letters_are_taken(tmp_path: Path) -> None:
    name = "部" * 83 + ".png"
    (tmp_path / name).write_bytes(png(RED))
    assert run_all(tmp_path, FolderTarget(tmp_path / "out")) == 1
    (taken,) = names(tmp_path / "done")
    assert name.endswith(taken)


def test_what_had_arrived_before_a_kill_is_not_predicted_again(tmp_path: Path) -> None:
    target = FolderTarget(tmp_path / "out")
    (tmp_path / watch.WORK).mkdir()
    for name, said in {"a.png": {"prediction": {}}, "b.png": {"error": "no image"}}.items():
        (tmp_path / watch.WORK / f"1-2-3-{name}").write_bytes(png(RED))
        target.deliver(f"1-2-3-{name}", said, None)
    assert run_all(tmp_path, target) == 2
    assert (names(tmp_path / "done"), names(tmp_path / "failed")) == (["a.png"], ["b.png"])
    assert json.loads((tmp_path / "out" / "1-2-3-a.png.json").read_text())["prediction"] == {}


def test_an_answer_that_is_no_http_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            line, _ = listener.accept()
            with line:
                line.recv(65536)
                line.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="answers what is no HTTP"):
            WebTarget(f"http://127.0.0.1:{listener.getsockname()[1]}/x").deliver("key", {}, None)
        thread.join()


def test_a_file_that_still_grows_waits(tmp_path: Path) -> None:
    data = png(RED)
    (tmp_path / "a.png").write_bytes(data[:20])
    target = FolderTarget(tmp_path / "out", overlay=False)
    watcher = Watcher(tmp_path, LightPredictor(), target, IDENTITY, settle_s=0.2)
    with watcher.alone():
        assert watcher.step() == (0, 1)
        time.sleep(0.25)
        (tmp_path / "a.png").write_bytes(data)
        assert watcher.step() == (0, 1), "it has changed"
        time.sleep(0.25)
        assert watcher.step() == (1, 0)
    assert names(tmp_path / "done") == ["a.png"]


def test_one_process_watches_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    context = multiprocessing.get_context("fork")
    holding, release = context.Event(), context.Event()

    def hold() -> None:
        with Watcher(tmp_path / "in", None, None, {}).alone():
            holding.set()
            release.wait(30)

    process = context.Process(target=hold)
    process.start()
    try:
        assert holding.wait(30)
        with pytest.raises(RunError, match="another process watches"):
            run_all(tmp_path / "in", FolderTarget(tmp_path / "out"))
    finally:
        release.set()
        process.join()


def kill_at_random_instants(inbox: Path, make_target: Any, kills: int, seed: int = 0) -> int:
    """Drops files while watchers are started and killed; returns the number of files."""
    context = multiprocessing.get_context("fork")
    generator = np.random.default_rng(seed)
    inbox.mkdir()
    count = 0

    def work() -> None:
        run_all(inbox, make_target())
        time.sleep(60)

    for _ in range(kills):
        for _ in range(4):
            name = f"part {count % 5}.png"  # cameras use names again, but not while the file is there
            drop(inbox, f"{count}.png" if (inbox / name).exists() else name, png((count % 256, 0, 0), (2, 2)))
            count += 1
        process = context.Process(target=work)
        process.start()
        time.sleep(float(generator.uniform(0, 0.08)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    run_all(inbox, make_target())
    return count


KILLS = [pytest.param(12, id="12"), pytest.param(50, id="50", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_instants_each_file_has_one_result(tmp_path: Path, kills: int) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    count = kill_at_random_instants(inbox, lambda: FolderTarget(out, overlay=False), kills)
    said = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert not [line for line in said if "error" in line]
    labels = Counter(int(line["prediction"]["label"]) for line in said)
    assert labels == Counter(number % 256 for number in range(count))
    assert len(list((inbox / "done").iterdir())) == count
    assert {path.name for path in (inbox / "done").iterdir()} == {line["id"] for line in said}
    assert [path.name for path in (inbox / watch.WORK).iterdir()] == ["lock"]
    assert not list(inbox.glob("*.png"))


@contextmanager
def web_server(answers: Any = lambda number: 200) -> Iterator[tuple[str, list[tuple[dict[str, str], Any]]]]:
    got: list[tuple[dict[str, str], Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((dict(self.headers), body))
            self.send_response(answers(len(got)))
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/results", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_killed_at_random_instants_each_result_is_posted_with_its_key(tmp_path: Path) -> None:
    with web_server() as (url, got):
        count = kill_at_random_instants(tmp_path / "in", lambda: WebTarget(url, "s3cret"), 6)
    keys = {headers["Idempotency-Key"]: body for headers, body in got}
    assert len(keys) == count <= len(got)
    assert all(headers["Authorization"] == "Bearer s3cret" for headers, _ in got)
    assert all(key == body["id"] for key, body in keys.items())
    assert sorted(int(body["prediction"]["label"]) for body in keys.values()) == list(range(count))


def test_an_address_that_fails_is_tried_again_and_one_that_refuses_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_FIRST_WAIT_S", 0.01)
    drop(tmp_path, "a.png", png(RED))
    with web_server(lambda number: 503 if number < 3 else 201) as (url, got):
        assert run_all(tmp_path, open_target(url)) == 1
    assert len(got) == 3
    assert len({headers["Idempotency-Key"] for headers, _ in got}) == 1
    drop(tmp_path, "b.png", png(RED))
    with web_server(lambda number: 302) as (url, got):
        assert run_all(tmp_path, open_target(url)) == 1
        with pytest.raises(RefusedError, match="answers 302"):
            open_target(url).deliver("key", {}, None)
    assert (names(tmp_path / "done"), names(tmp_path / "failed")) == (["a.png"], ["b.png"])
    drop(tmp_path, "c.png", png(RED))
    began = time.monotonic()  # nobody listens any more
    watcher = Watcher(tmp_path, LightPredictor(), open_target(url), IDENTITY, settle_s=0,
                      stopped=lambda: time.monotonic() > began + 0.1)  # fmt: skip
    with watcher.alone():
        assert watcher.step() == (0, 1)
    with web_server() as (url, got):
        assert run_all(tmp_path, open_target(url)) == 1, "after a restart"


class Broker(threading.Thread):
    """As much of MQTT 3.1.1 as publishing with QoS 1 takes; cuts the connection off instead of its first answers."""

    def __init__(self, cuts: int) -> None:
        super().__init__()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.05)
        self.cuts = cuts
        self.got: list[tuple[str, Any]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                line, _ = self.listener.accept()
            except TimeoutError:
                continue
            with line, line.makefile("rb") as stream:
                self.serve(line, stream)

    def serve(self, line: socket.socket, stream: Any) -> None:
        while head := stream.read(1):
            length = shift = 0
            while True:
                byte = stream.read(1)[0]
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            body = stream.read(length)
            if head[0] >> 4 == 1:
                line.sendall(b"\x20\x02\0\0")  # accepted
            elif head[0] >> 4 == 3:
                end = 2 + int.from_bytes(body[:2], "big")
                self.got.append((body[2:end].decode(), json.loads(body[end + 2 :])))
                if self.cuts:
                    self.cuts -= 1
                    return
                line.sendall(b"\x40\x02" + body[end : end + 2])  # it has it


def test_a_broker_has_every_message_at_least_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paho.mqtt.client", reason="the package paho-mqtt is not installed")
    monkeypatch.setattr(watch, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("dinov2.deploy.delivery._WAIT_S", 2.0)
    broker = Broker(cuts=1)
    broker.start()
    target = open_target(f"mqtt://127.0.0.1:{broker.listener.getsockname()[1]}/line%203/results")
    try:
        for number in range(4):
            drop(tmp_path, f"{number}.png", png((number, 0, 0)))
        assert run_all(tmp_path, target) == 4
    finally:
        target.close()
        with warnings.catch_warnings():  # paho-mqtt leaves closing its sockets to the collector
            warnings.simplefilter("ignore", ResourceWarning)
            del target
            gc.collect()
        broker.ended.set()
        broker.join()
        broker.listener.close()
    assert {topic for topic, _ in broker.got} == {"line 3/results"}
    keys = {said["id"]: int(said["prediction"]["label"]) for _, said in broker.got}
    assert sorted(keys.values()) == [0, 1, 2, 3]
    assert len(broker.got) > 4, "the one that was cut off came again, with its key"


def test_wrong_places_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="results go to a folder"):
        open_target("ftp://host/x")
    with pytest.raises(ValueError, match="an address of MQTT is"):
        MqttTarget("mqtt://host")
    with pytest.raises(ValueError, match="an address on the web is"):
        WebTarget("https:///x")
    open_target(str(tmp_path / "out"), secret="s3cret")
    assert "--secret-file has no effect" in caplog.text
    WebTarget("http://host.example/x")
    assert "host.example without encryption" in caplog.text
    with pytest.raises(FileNotFoundError, match="no folder"):
        watch.main([str(tmp_path / "none"), "--weights", "x", "--to", "y"])


def test_the_command_handles_what_is_there(tmp_path: Path) -> None:
    write_package(tmp_path / "best.pth", "classification")
    (tmp_path / "in").mkdir()
    drop(tmp_path / "in", "a.png", png(RED))
    words = [str(tmp_path / "in"), "--weights", str(tmp_path / "best.pth"), "--to", str(tmp_path / "out")]
    assert watch.main([*words, "--once", "--settle", "0", "--device", "cpu"]) == 0
    (said,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert said["image"] == "a.png"
    assert len(said["model"]["fingerprint"]) == 64

"""The service: what it answers, what it refuses, and how it ends."""

import base64
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from dinov2.deploy import serve
from dinov2.deploy.monitoring import LeastSure
from dinov2.deploy.service import Answering, Limits, make_app
from dinov2.predict.predictor import Predictor
from dinov2.tasks.joint import JointTask
from dinov2.tasks.package import load_task_package
from tests.deploy.service_stand_ins import (
    FINGERPRINT,
    Served,
    form,
    patient_predictor,
    png,
    served,
    stand_in_model,
)
from tests.tasks.predictor_stand_ins import BLUE, GREEN, GREY, RED, ColourModel, make_package, write_package

LIMITS = Limits(max_bytes=20_000, max_pixels=10_000)
IDENTITY = {"version": "7", "fingerprint": FINGERPRINT}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(stand_in_model(), Answering(version="7", limits=LIMITS)) as running:
        yield running


def test_raw_bytes_and_forms_get_the_predictors_answer(service: Served) -> None:
    expected = Predictor.of(make_package(ColourModel(dense=False), "classification"))
    for colour, name in ((RED, "red"), (GREEN, "green"), (GREY, "grey")):
        data = png(colour)
        raw = service.predict(data)
        body, kind = form(("part 7.png", data), fields=(("note", "x"),))
        posted = service.predict(body, kind)
        assert raw.status == posted.status == 200
        (prediction,) = expected.predict([np.asarray(Image.open(BytesIO(data)))])
        assert raw.json["prediction"] == posted.json["prediction"] == prediction.to_dict()
        assert raw.json["prediction"]["label"] == name
        assert raw.json["certainty"] == prediction.certainty()
        assert posted.json["image"] == {"name": "part 7.png", "height": 24, "width": 30}
    for reply in (raw, service.ask("/health"), service.predict(b""), service.ask("/nothing")):
        assert reply.headers["x-model-version"] == "7"
        assert reply.headers["x-model-fingerprint"] == FINGERPRINT
    assert raw.json["model"] == service.ask("/health").json["model"] == service.predict(b"").json["model"] == IDENTITY


def test_heads_are_named_and_maps_come_as_files() -> None:
    parts = {"classes": ColourModel(dense=False), "masks": ColourModel()}
    packages = {
        name: make_package(model, "segmentation" if model.dense else "classification") for name, model in parts.items()
    }

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{name}/logits": model(images)["logits"] for name, model in parts.items()}

    task = JointTask({name: package.task for name, package in packages.items()})
    model = stand_in_model(Predictor(run, task, packages["masks"].preprocessing))
    with served(model, Answering(limits=LIMITS)) as service:
        said = service.predict(png(BLUE), query="?files=true&overlay=true").json
        metrics = service.ask("/metrics").body.decode()
    assert said["prediction"]["classes"]["label"] == "blue"
    assert said["prediction"]["masks"]["pixels"] == {"blue": 24 * 30}
    assert said["model"]["version"] == FINGERPRINT[:12]
    mask = Image.open(BytesIO(base64.b64decode(said["files"]["masks mask"])))
    assert np.asarray(mask).tolist() == [[3] * 30] * 24
    assert Image.open(BytesIO(base64.b64decode(said["overlay"]))).width > 600, "two drawings side by side"
    assert 'dinov2_score_count{head="masks"} 1.0' in metrics


def test_an_anomaly_model_answers_with_its_threshold(tmp_path: Path) -> None:
    thresholds = {"image": 0.5, "image.false_alarm_rate": 0.01, "pixel": 0.4}
    predictor = Predictor.of(load_task_package(write_package(tmp_path / "best.pth", "anomaly", thresholds)))
    data = png(RED)
    with served(stand_in_model(predictor), Answering(limits=LIMITS)) as service:
        said = service.predict(data, query="?overlay=true").json
    (expected,) = predictor.predict([np.asarray(Image.open(BytesIO(data)))])
    assert said["prediction"] == expected.to_dict()
    assert said["prediction"]["threshold"] == 0.5
    assert said["prediction"]["label"] in ("good", "anomalous")
    assert Image.open(BytesIO(base64.b64decode(said["overlay"]))).height >= 24


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces more than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + exif + chunk(b"IDAT", zlib.compress(b"\0" * 5000)) + chunk(b"IEND", b"")


BIG_NOISE = np.random.default_rng(0).bytes(30_000)
NO_FILE, FORM = form(fields=(("a", "b"),))


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"this is no image", "image/png", 422, "known format"),
        (b"%PDF-1.4", "application/octet-stream", 422, "known format"),
        (png(RED)[:60], "image/png", 422, "not an image that can be read"),
        (b"\xff\xd8\xff" + b"\0" * 100, "image/jpeg", 422, "not an image that can be read"),
        (b"\0" * 128 + b"DICM\2\0\x10\0UI\x16\x001.2.840.10008.1.2.1.99", "image/dicom", 422, ""),
        (b"", "image/png", 400, "empty"),
        (bomb(60_000, 60_000), "image/png", 413, "3600000000 pixels"),
        (png(RED, (200, 200)), "image/png", 413, "40000 pixels; at most 10000"),
        (png(RED, (1, 5000)), "image/png", 200, ""),
        (BIG_NOISE, "image/png", 413, "30000 bytes; at most 20000"),
        (iter([BIG_NOISE[:15_000], BIG_NOISE[15_000:]]), "image/png", 413, "more than 20000"),
        (b"{}", "application/json", 415, "application/json"),
        (b"hello", "text/plain", 415, "text/plain"),
        (NO_FILE, FORM, 400, "no file"),
        (b"--edge\r\nnonsense", FORM, 400, "no file"),
        (b"--edge", "multipart/form-data", 400, "damaged form"),
        (form(("a.png", png(RED)), ("b.png", png(RED)))[0], FORM, 400, "several files"),
        (form(("a.png", b""))[0], FORM, 400, "empty"),
        (form(("a.png", b"no image"))[0], FORM, 422, "known format"),
    ],
)
def test_every_malformed_upload_is_refused(service: Served, body: Any, kind: str, status: int, reason: str) -> None:
    reply = service.predict(body, kind)
    assert reply.status == status, reply.body
    assert reason in reply.json.get("error", "")
    assert service.predict(png(RED)).json["prediction"]["label"] == "red"
    assert service.open_requests == 0


def test_the_name_of_an_upload_is_no_path_here(service: Served, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"\0" * 16)
    (tmp_path / "a.raw.json").write_text('{"width": 4, "height": 4, "dtype": "uint8"}')
    reply = service.predict(*form((str(tmp_path / "a.raw"), b"\0" * 16)))
    assert reply.status == 422


def test_a_gigabyte_that_is_announced_is_refused_before_it_comes(service: Served) -> None:
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as line:
        line.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1073741824\r\n\r\n"
        )
        answer = b""
        while piece := line.recv(4096):  # until the service closes the connection
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"1073741824 bytes" in answer


def test_an_upload_that_is_cut_off_or_slow_takes_no_place() -> None:
    limits = Limits(max_requests=1, timeout_s=0.3)
    start = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 100\r\n\r\nabc"
    with served(stand_in_model(), Answering(limits=limits)) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as line:
            line.sendall(start)
            service.wait_for(1)
        service.wait_for(0)
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as line:
            line.sendall(start)
            assert line.recv(4096).startswith(b"HTTP/1.1 408")
        service.wait_for(0)


def test_what_is_too_much_gets_429_and_what_was_accepted_is_answered() -> None:
    predictor = patient_predictor(batch_size=2)
    colours = (RED, GREEN, BLUE, GREY, RED)
    with (
        served(stand_in_model(predictor), Answering(limits=Limits(max_requests=5))) as service,
        ThreadPoolExecutor(5) as clients,
    ):
        predictor.released.clear()
        replies = [clients.submit(service.predict, png(colour)) for colour in colours]
        service.wait_for(5)
        refused = service.predict(png(RED))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        predictor.released.set()
        labels = [reply.result().json["prediction"]["label"] for reply in replies]
        metrics = service.ask("/metrics").body.decode()
    assert labels == ["red", "green", "blue", "grey", "red"]
    assert max(predictor.batches) == 2
    assert sum(predictor.batches) == 5 + 1, "all images, and that of warming up"
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert values["dinov2_requests_total", "200"] == 5
    assert values["dinov2_requests_total", "429"] == 1
    assert values["dinov2_dropped_requests_total",] == values["dinov2_requests_in_flight",] == 0
    assert values["dinov2_score_count", ""] == 5


def test_a_prediction_that_takes_too_long_or_fails_is_said() -> None:
    predictor = patient_predictor()
    limits = Limits(timeout_s=0.5)
    with served(stand_in_model(predictor), Answering(limits=limits)) as service:
        predictor.released.clear()
        late = service.predict(png(RED))
        predictor.released.set()
        assert late.status == 504
        predictor.model.gain.fill_(float("nan"))
        failed = service.predict(png(RED))
        assert failed.status == 500
        assert failed.json["model"]["fingerprint"] == FINGERPRINT
        predictor.model.gain.fill_(20)
        assert service.predict(png(RED)).status == 200


def test_a_token_is_asked_for_and_other_sites_are_kept_out() -> None:
    with served(stand_in_model(), Answering(token="s3cret")) as service:
        bearer = {"Authorization": "Bearer s3cret"}
        assert service.predict(png(RED), **bearer).status == 200
        assert service.predict(png(RED), **bearer, Origin=service.url).status == 200
        assert service.predict(png(RED), **bearer, Origin="http://evil.example").status == 403
        assert service.predict(png(RED), **bearer, Origin="http://[").status == 403
        assert [service.predict(png(RED), **given).status for given in ({}, {"Authorization": "Bearer x"})] == [401] * 2
        assert [service.ask(path).status for path in ("/metrics", "/health", "/")] == [401, 200, 200]
        assert service.ask("/metrics", headers=bearer).status == 200


def test_a_name_that_leads_here_is_no_name_of_this_machine() -> None:
    """A page of a site whose name was made to lead to 127.0.0.1 has that site's name as origin and as host."""
    with served(stand_in_model(), Answering(hosts=("127.0.0.1", "::1", "line7"))) as service:
        for host, status in {
            f"127.0.0.1:{service.port}": 200, "[::1]:80": 200, "Line7": 200, "evil.example:80": 403, "": 403,
        }.items():  # fmt: skip
            assert service.predict(png(RED), Host=host).status == status, host
        rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
        assert service.predict(png(RED), **rebound).status == service.ask("/metrics", headers=rebound).status == 403


@pytest.mark.parametrize(
    ("words", "hosts", "warned"),
    [
        ((), ["127.0.0.1", "localhost", "::1"], False),
        (("--host-name", "Line7"), ["127.0.0.1", "localhost", "::1", "line7"], False),
        (("--host", "0.0.0.0", "--host-name", "line7"), [], True),
        (("--token-file", "token"), [], False),
    ],
)
def test_this_machine_alone_is_served_by_its_names(
    words: tuple[str, ...], hosts: list[str], warned: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("secret")
    found: list[Answering] = []
    monkeypatch.setattr(serve, "open_model", lambda *_, **__: None)
    monkeypatch.setattr("dinov2.deploy.service.make_app", lambda model, answering: found.append(answering))
    monkeypatch.setattr("dinov2.deploy.service.run_app", lambda *_, **__: None)
    assert serve.main(["best.pth", *words]) == 0
    assert list(found[0].hosts) == hosts
    assert ("--host-name has no effect" in capsys.readouterr().err) == warned


def test_the_least_sure_are_kept_as_they_came(tmp_path: Path) -> None:
    faint = tuple(128 + value for value in (2, -1, -1))  # which hardly differs from grey
    with served(stand_in_model(), Answering(version="7", least_sure=LeastSure(tmp_path, 1))) as service:
        certainties = [service.predict(png(colour)).json["certainty"] for colour in (RED, faint, GREEN)]
    image, said = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (image.read_bytes(), image.suffix, said.suffix) == (png(faint), ".png", ".json")
    assert image.name.startswith(f"{min(certainties):.4f}_")
    assert IDENTITY["fingerprint"] in said.read_text()


def test_what_cannot_be_served_is_said() -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        make_app(stand_in_model(), Answering(version="ü"))
    predictor = SimpleNamespace(task=SimpleNamespace(inputs=("image", "reference")))
    with pytest.raises(ValueError, match="compares two images"):
        make_app(stand_in_model(predictor))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-queue", "0"), "--max-queue must be above 0, found 0"),
        (("--port", "70000"), r"--port must be in 0\.\.65535"),
        (("--batch-wait", "-1"), "--batch-wait must be at least 0"),
        (("--token-file", "empty"), "should hold a token of ASCII"),
        (("--validation-scores", "empty"), "holds no line"),
    ],
)
def test_wrong_options_end_with_their_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    with pytest.raises(ValueError, match=message):
        serve.main(["best.pth", *words])


def test_sigterm_answers_what_was_accepted_and_ends_with_code_0(tmp_path: Path) -> None:
    write_package(tmp_path / "best.pth", "classification")
    words = ["serve", str(tmp_path / "best.pth"), "--port", "0", "--device", "cpu", "--batch-wait", "1.5"]
    process = subprocess.Popen([sys.executable, "-m", "dinov2", *words], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        port = next(int(found[1]) for line in process.stderr if (found := re.search(r"http://127.0.0.1:(\d+)", line)))
        service = Served(port, None)
        with ThreadPoolExecutor(3) as clients:
            replies = [clients.submit(service.predict, png(RED)) for _ in range(3)]
            while b"dinov2_requests_in_flight 3.0" not in service.ask("/metrics").body:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert [reply.result().status for reply in replies] == [200] * 3
        rest: list[str] = []
        reader = threading.Thread(target=lambda: rest.extend(process.stderr or ()))
        reader.start()
        assert process.wait(30) == 0
        reader.join()
        assert "every accepted request was answered" in "".join(rest)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()

"""A service of a stand-in model in a thread, and ways to talk to it."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from dinov2.deploy.service import Answering, make_app
from dinov2.predict.predictor import Predictor
from tests.tasks.predictor_stand_ins import ColourModel, make_package

FINGERPRINT = "ab" * 32


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A running service."""

    port: int
    app: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "") -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, names, answer.read())
        finally:
            connection.close()

    def predict(self, data: Any, kind: str = "image/png", query: str = "", **headers: str) -> Reply:
        return self.ask(f"/predict{query}", data, {"Content-Type": kind, **headers})

    @property
    def open_requests(self) -> int:
        return int(self.app.state.service.open_requests)

    def wait_for(self, count: int) -> None:
        """Waits until so many requests are accepted and not answered."""
        end = time.monotonic() + 20
        while self.open_requests != count and time.monotonic() < end:
            time.sleep(0.005)
        assert self.open_requests == count


class PatientPredictor(Predictor):
    """Predicts when `released` is set, and notes the size of every batch."""

    released: threading.Event
    batches: list[int]

    def predict_prepared(self, images: Any) -> list[Any]:
        assert self.released.wait(20)
        self.batches.append(len(images))
        return super().predict_prepared(images)


def patient_predictor(**options: Any) -> PatientPredictor:
    predictor = PatientPredictor.of(make_package(ColourModel(dense=False), "classification"), **options)
    predictor.released, predictor.batches = threading.Event(), []
    predictor.released.set()
    return predictor


def stand_in_model(predictor: Any = None) -> Any:
    package = make_package(ColourModel(dense=False), "classification")
    return SimpleNamespace(predictor=predictor or Predictor.of(package), fingerprint=FINGERPRINT)


@contextmanager
def served(model: Any, answering: Answering | None = None) -> Iterator[Served]:
    app = make_app(model, answering)
    config = uvicorn.Config(app, "127.0.0.1", 0, log_config=None, timeout_graceful_shutdown=20)
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert server.started
        yield Served(listener.getsockname()[1], app)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def png(colour: Any, size: tuple[int, int] = (24, 30)) -> bytes:
    """A file of an image of one colour, height and width given."""
    file = BytesIO()
    Image.fromarray(np.full((*size, 3), colour, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def form(*files: tuple[str, bytes], fields: tuple[tuple[str, str], ...] = ()) -> tuple[bytes, str]:
    """A form with files, and its content type."""
    parts = [
        f'--edge\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    parts += [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields
    ]
    return b"".join([*parts, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"

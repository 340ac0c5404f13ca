"""The service of a model: predictions over HTTP, in batches, within limits, with metrics and a page for people."""

import asyncio
import base64
import hmac
import logging
import math
import re
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dinov2.data.decoding import count_stored_pixels
from dinov2.data.reading import UnreadableImageError
from dinov2.deploy.batching import Batcher
from dinov2.deploy.monitoring import LeastSure, ServiceMetrics
from dinov2.predict.images import open_image
from dinov2.predict.model import Model
from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.tasks.task import PreparedImage

logger = logging.getLogger("dinov2")

_DECODING_THREADS = 2
_RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last: what curl says unasked
_PAGE_POLICY = (
    "default-src 'none'; img-src data: blob:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_UNKNOWN_NAME = "image"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may cost.

    Attributes:
        max_bytes: of an upload.
        max_pixels: that an image announces.
        max_requests: accepted and not yet answered; further ones get 429 at once.
        timeout_s: seconds from acceptance to the answer: an upload that takes longer gets 408, a prediction 504.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_requests: int = 128
    timeout_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How a service answers.

    Attributes:
        version: of the model, in every answer; empty for the first 12 digits of its fingerprint.
        token: that requests must bear; empty for none.
        hosts: names of this machine that requests may have in their header ``Host``, without a port; empty for any.
        batch_wait_s: seconds that a batch waits for further images.
        limits: of requests.
        validation: scores of images of validation, by head, see `dinov2.deploy.monitoring.read_scores`.
        least_sure: keeps images for labelling; None for not keeping any.
    """

    version: str = ""
    token: str = ""
    hosts: Sequence[str] = ()
    batch_wait_s: float = 0.005
    limits: Limits = field(default_factory=Limits)
    validation: Mapping[str, list[float]] = field(default_factory=dict)
    least_sure: LeastSure | None = None


class Refused(Exception):
    """A request that gets no prediction.

    Attributes:
        status: of HTTP.
        reason: for the person who sent it.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class PredictionService:
    """Predicts for uploads; see `make_app`.

    Attributes:
        metrics: of what it does.
        open_requests: that were accepted and not yet answered.
    """

    def __init__(self, model: Model, answering: Answering) -> None:
        self.predictor = model.predictor
        self.answering = answering
        self.limits = answering.limits
        fingerprint = model.fingerprint
        self.identity = {"version": answering.version or fingerprint[:12], "fingerprint": fingerprint}
        self.metrics = ServiceMetrics(answering.validation)
        self.open_requests = 0

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """While entered, it predicts; leaving it finishes what was accepted."""
        batcher: Batcher[PreparedImage, Prediction] = Batcher(
            self.predictor.predict_prepared,
            lambda: self.predictor.batch_size,
            wait_s=self.answering.batch_wait_s,
            observe=self.metrics.batches.observe,
        )
        with ThreadPoolExecutor(_DECODING_THREADS, "images") as self.pool, batcher as self.batcher:
            await asyncio.wrap_future(self.batcher.submit(self.predictor.prepare_blank()))  # warms up
            yield

    async def answer(self, request: Request, *, overlay: bool, files: bool) -> Response:
        """Accepts a request where there is room, and answers it."""
        start = time.perf_counter()
        if self.open_requests >= self.limits.max_requests:
            self.metrics.requests.labels("429").inc()
            reason = f"{self.open_requests} requests are waiting already; try again"
            return JSONResponse({"error": reason, "model": self.identity}, 429, {"Retry-After": "1"})
        self.open_requests += 1
        self.metrics.waiting.set(self.open_requests)
        content: dict[str, Any]
        headers = {}
        try:
            data, name = await self._receive(request)
            status, content = 200, await self._predict(data, name, start, overlay=overlay, files=files)
        except Refused as refused:
            status, content = refused.status, {"error": refused.reason}
            headers = {"Connection": "close"} if status in (408, 413) else {}  # the rest of the upload is not read
        except ClientDisconnect:
            status, content = 400, {"error": "the upload was cut off"}
        except Exception:
            logger.exception("a prediction failed")
            status, content = 500, {"error": "the model failed on this image; the service's log says why"}
        finally:
            self.open_requests -= 1
            self.metrics.waiting.set(self.open_requests)
        self.metrics.requests.labels(str(status)).inc()
        if status >= 500:
            self.metrics.dropped.inc()
        self.metrics.seconds.observe(time.perf_counter() - start)
        return JSONResponse({**content, "model": self.identity}, status, headers)

    async def _receive(self, request: Request) -> tuple[bytes, str]:
        """The bytes of the image, and what it is called."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (*_RAW_TYPES, "multipart/form-data") and not kind.startswith("image/"):
            raise Refused(415, f"content type {kind}: send an image as it is, or as a file of multipart/form-data")
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                body = await self._body(request)
        except TimeoutError:
            raise Refused(408, f"the upload took longer than {self.limits.timeout_s:g} s") from None
        name = _UNKNOWN_NAME
        if kind == "multipart/form-data":
            body, name = await _file_of_form(request, body)
        if not body:
            raise Refused(400, "the upload is empty; send the bytes of an image")
        return body, name

    async def _body(self, request: Request) -> bytes:
        most = self.limits.max_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise Refused(413, f"an upload of {announced} bytes; at most {most} are taken")
        pieces = bytearray()
        async for piece in request.stream():
            pieces += piece
            if len(pieces) > most:
                raise Refused(413, f"an upload of more than {most} bytes")
        return bytes(pieces)

    async def _predict(self, data: bytes, name: str, start: float, *, overlay: bool, files: bool) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limits.timeout_s - (time.perf_counter() - start)):
                image, prepared = await loop.run_in_executor(self.pool, self._prepare, data)
                prediction = await asyncio.wrap_future(self.batcher.submit(prepared))
                said = await loop.run_in_executor(self.pool, self._describe, data, image, prediction, overlay, files)
        except TimeoutError:
            raise Refused(504, f"no prediction within {self.limits.timeout_s:g} s") from None
        return {
            "image": {"name": name, "height": image.height, "width": image.width},
            **said,
            "seconds": round(time.perf_counter() - start, 4),
        }

    def _prepare(self, data: bytes) -> tuple[Image.Image, PreparedImage]:
        name = _UNKNOWN_NAME  # not the client's, which could be the path of a file here
        try:
            pixels = count_stored_pixels(data, name)
            if pixels > self.limits.max_pixels:
                raise Refused(413, f"an image of {pixels} pixels; at most {self.limits.max_pixels} are taken")
            return open_image(self.predictor, data, name)
        except UnreadableImageError as error:
            raise Refused(422, f"not an image that can be read: {error.cause}") from error
        except ValueError as error:
            raise Refused(422, f"the image cannot be prepared: {error}") from error

    def _describe(
        self, data: bytes, image: Image.Image, prediction: Prediction, overlay: bool, files: bool
    ) -> dict[str, Any]:
        """What is said about an image, and everything that is noted of it."""
        certainty = prediction.certainty()
        said: dict[str, Any] = {"prediction": prediction.to_dict(), "certainty": certainty}
        self.metrics.add_scores(prediction)
        if self.answering.least_sure is not None:
            try:
                self.answering.least_sure.add(data, certainty, {**said, "model": self.identity})
            except OSError as error:  # a full disk is no reason not to predict
                logger.warning("an image of which the model was not sure could not be kept: %s", error)
        if files:
            said["files"] = _files_of(prediction)
        if overlay:
            drawn = BytesIO()
            prediction.draw(image).save(drawn, "PNG", compress_level=3)
            said["overlay"] = base64.b64encode(drawn.getvalue()).decode("ascii")
            said["description"] = prediction.describe()
        return said


async def _file_of_form(request: Request, body: bytes) -> tuple[bytes, str]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=16).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, f"a damaged form, or one with several files: {error}") from error
    try:
        uploads = [value for value in form.values() if isinstance(value, UploadFile)]
        if not uploads:
            raise Refused(400, "the form holds no file")
        return await uploads[0].read(), uploads[0].filename or _UNKNOWN_NAME
    finally:
        await form.close()


def _files_of(prediction: Prediction) -> dict[str, Any]:
    """The files that a prediction is kept in, such as masks, by kind; their content in base 64."""
    with TemporaryDirectory() as folder:
        written = prediction.save(Path(folder), "image", SaveOptions(score_maps=True))
        return {
            kind: base64.b64encode((Path(folder) / value).read_bytes()).decode("ascii")
            if isinstance(value, str) and (Path(folder) / value).is_file()
            else value
            for kind, value in written.items()
        }


def _without_port(host: str) -> str:
    """The name in a header ``Host``: an address of IPv6 stands in brackets."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


class _Stamp:
    """Puts headers on every answer, whatever gave it."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str]) -> None:
        self.app = app
        self.headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self.headers]
            await send(message)

        await self.app(scope, receive, stamped)


def make_app(model: Model, answering: Answering | None = None) -> FastAPI:
    """The service of a model as an ASGI application.

    ``POST /predict`` takes the bytes of an image, or a form with one file, and answers in JSON: ``prediction`` (what
    `Prediction.to_dict` says; of several heads by their names), ``certainty``, ``image``, ``seconds`` and ``model``;
    with ``?overlay=true`` a drawing, and with ``?files=true`` masks or depths, both in base 64. Errors are ``error``
    and ``model``: 400 nothing or a damaged form, 401 no token, 403 from the page of another site or to a name that
    is not served, 408 and 413 past the limits, 415 not sent as an image, 422 not an image, 429 too much to do, 500 and
    504 a prediction that failed.
    ``GET /health``, ``/metrics`` and ``/``.

    Args:
        model: what `dinov2.load` gives; it has a head.
        answering: how.

    Raises:
        ValueError: the model is a backbone alone, looks at two images, or the version is not plain text.
    """
    answering = answering or Answering()
    service = PredictionService(model, answering)
    if "reference" in service.predictor.task.inputs:
        raise ValueError("this model compares two images, and a request brings one; it cannot be served")
    if not service.identity["version"].isprintable() or not service.identity["version"].isascii():
        raise ValueError(f"a version is of printable ASCII characters, found {answering.version!r}")
    app = FastAPI(title="dinov2", docs_url=None, redoc_url=None, lifespan=service.running)
    app.state.service = service
    stamp = {"X-Model-Version": service.identity["version"], "X-Model-Fingerprint": service.identity["fingerprint"]}
    app.add_middleware(_Stamp, headers=stamp)

    def refusal(request: Request) -> Response | None:
        """Why a request is not even looked at."""
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if answering.hosts and _without_port(host) not in answering.hosts:  # a name that somebody's DNS leads here
            reason = f"requests to {host!r} are refused; served are {', '.join(answering.hosts)}"
            return JSONResponse({"error": reason, "model": service.identity}, 403)
        if origin is not None and origin.partition("://")[2] != host:  # a page that somebody has open elsewhere
            return JSONResponse({"error": "requests of other sites' pages are refused", "model": service.identity}, 403)
        if answering.token:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("utf-8", "replace")
            if not hmac.compare_digest(given, answering.token.encode()):
                content = {"error": "the header Authorization: Bearer TOKEN is missing, or wrong"}
                headers = {"WWW-Authenticate": "Bearer"}
                return JSONResponse({**content, "model": service.identity}, 401, headers)
        return None

    @app.post("/predict")
    async def predict(request: Request, overlay: bool = False, files: bool = False) -> Response:
        return refusal(request) or await service.answer(request, overlay=overlay, files=files)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.identity}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return refusal(request) or Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    page = resources.files("dinov2.deploy").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


class _Server(uvicorn.Server):
    """Says when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            logger.info("http://%s:%d is served; Ctrl-C ends it", f"[{host}]" if ":" in host else host, port)


def run_app(app: FastAPI, host: str, port: int, *, stop_s: float) -> None:
    """Serves until SIGINT or SIGTERM, and then finishes what was accepted.

    Args:
        app: of `make_app`.
        host: address to listen on.
        port: 0 for one that is free; the log tells it.
        stop_s: seconds that requests may still take when a signal has come.

    Raises:
        SystemExit: nothing can listen there.
    """
    identity = app.state.service.identity
    logger.info("model %s, fingerprint %s", identity["version"], identity["fingerprint"])
    config = uvicorn.Config(
        app, host, port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=math.ceil(stop_s) + 1,
    )  # fmt: skip
    # Uvicorn sends itself the signal again when everything is answered; then it must not end the process any more.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with config.bind_socket() as listener:
            _Server(config).run([listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    logger.info("stopped; every accepted request was answered")

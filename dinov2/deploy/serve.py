"""The command that serves a model over HTTP: ``dinov2 serve MODEL --port N``."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse, run_as
from dinov2.deploy.deployed import open_model
from dinov2.logging import logging_to
from dinov2.predict.images import DEVICES
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MEGA = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the command."""

    models: tuple[str, ...] = option(
        help="what dinov2.load opens; several are heads on the same frozen backbone", positional=True
    )
    port: int = option(8000, help="port to listen on; 0 for one that is free")
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network, which wants a token")
    host_name: tuple[str, ...] = option(
        (), help="further names that requests may have in their header Host, where only this machine is served"
    )
    token_file: Path | None = option(None, help="file with a token that requests must bear (Authorization: Bearer)")
    device: str = option("auto", help="where to compute", choices=DEVICES)
    model_version: str = option("", help="version in every answer (usually the start of the fingerprint)")
    batch_wait: float = option(0.005, help="seconds that a batch waits for further images")
    max_queue: int = option(128, help="requests that are accepted and not answered; further ones get 429")
    max_megabytes: float = option(32.0, help="largest upload, in MB")
    max_megapixels: float = option(50.0, help="largest image, in millions of pixels")
    timeout: float = option(30.0, help="seconds from accepting a request to its answer")
    validation_scores: Path | None = option(
        None, help="predictions.jsonl of dinov2 infer_image over validation: /metrics tells the scores' drift from it"
    )
    keep_least_sure: Path | None = option(None, help="folder that keeps the images the model was least sure of")
    keep_most: int = option(200, help="how many of them")


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes, and finishes what was accepted; returns the exit code."""
    options = parse(
        ServeOptions,
        argv,
        description="Serves a model over HTTP: POST an image to /predict; /health, /metrics, and / for people.",
        example="python tools/serve.py outputs/cracks/best.pth --port 8000",
    )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"serving needs {', '.join(missing)}: pip install 'dinov2[serve]'")
    for name in ("max_queue", "max_megabytes", "max_megapixels", "timeout", "keep_most"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(options, name)}")
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be in 0..65535, found {options.port}")
    if options.batch_wait < 0:
        raise ValueError(f"--batch-wait must be at least 0, found {options.batch_wait}")
    token = options.token_file.read_text(encoding="utf-8").strip() if options.token_file else ""
    if options.token_file and not (token and token.isascii()):
        raise ValueError(f"{options.token_file} should hold a token of ASCII characters")

    from dinov2.deploy.monitoring import LeastSure, read_scores  # only now: they need the extra
    from dinov2.deploy.service import Answering, Limits, make_app, run_app

    with logging_to(None):
        if options.keep_most != ServeOptions.keep_most and options.keep_least_sure is None:
            logger.warning("--keep-most has no effect without --keep-least-sure")
        validation = read_scores(options.validation_scores) if options.validation_scores else {}
        model = open_model(options.models if len(options.models) > 1 else options.models[0], device=options.device)
        keep = options.keep_least_sure
        # What listens to this machine alone can still be reached by pages of sites whose name leads to 127.0.0.1.
        hosts = (*_LOOPBACK, *options.host_name) if options.host in _LOOPBACK and not token else ()
        if options.host_name and not hosts:
            logger.warning("--host-name has no effect with a --token-file, or a --host that others reach")
        answering = Answering(
            version=options.model_version,
            token=token,
            hosts=[name.lower() for name in hosts],
            batch_wait_s=options.batch_wait,
            limits=Limits(
                max_bytes=int(options.max_megabytes * _MEGA),
                max_pixels=int(options.max_megapixels * _MEGA),
                max_requests=options.max_queue,
                timeout_s=options.timeout,
            ),
            validation=validation,
            least_sure=None if keep is None else LeastSure(keep, options.keep_most),
        )
        app = make_app(model, answering)
        if options.host not in _LOOPBACK and not token:
            logger.warning("everybody who reaches %s can use the service: it has no --token-file", options.host)
        run_app(app, options.host, options.port, stop_s=options.timeout)
    return 0


if __name__ == "__main__":
    run_as("serve")

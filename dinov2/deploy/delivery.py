"""Where a watcher's results go: a folder, an MQTT broker, or a web address; nothing counts as delivered too early."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.utils.errors import RunError
from dinov2.utils.files import remove_unfinished, write_text_atomically

logger = logging.getLogger("dinov2")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WAIT_S = 20.0  # for an answer; afterwards it is tried again
_TRY_LATER = (408, 425, 429)  # and everything from 500 on
_MQTT_PORT, _MQTTS_PORT = 1883, 8883


class RefusedError(RuntimeError):
    """A result that the other side does not take, now or later."""


class Target(ABC):
    """Takes results, each under a key that no other result has."""

    def find(self, key: str) -> Mapping[str, Any] | None:
        """What is known to have arrived under a key, as of a process that was killed after it; None for nothing."""
        return None

    @abstractmethod
    def deliver(self, key: str, said: Mapping[str, Any], drawn: tuple[Image.Image, Prediction] | None) -> None:
        """Returns when the result has arrived.

        Args:
            key: of the result; delivered again, it counts as the same.
            said: of JSON's types.
            drawn: image and prediction; None where there is no prediction.

        Raises:
            OSError: it has not, but may another time.
            RefusedError: it never will.
        """

    def close(self) -> None:  # noqa: B027  # most have nothing to close
        """Ends the connection, where there is one."""


class FolderTarget(Target):
    """``KEY.json`` in a folder, written last and at once, with drawings, masks and depths in folders beside it.

    Args:
        folder: made where needed.
        overlay: whether to draw.
    """

    def __init__(self, folder: Path, *, overlay: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        self.folder = folder
        self.overlay = overlay
        self.options = SaveOptions()

    def find(self, key: str) -> Mapping[str, Any] | None:
        path = self.folder / f"{key}.json"
        said: Mapping[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return said

    def deliver(self, key: str, said: Mapping[str, Any], drawn: tuple[Image.Image, Prediction] | None) -> None:
        files: dict[str, Any] = {}
        if drawn is not None:
            image, prediction = drawn
            files = prediction.save(self.folder, key, self.options)
            if self.overlay:
                path = self.folder / "overlays" / f"{key}.png"
                path.parent.mkdir(exist_ok=True)
                prediction.draw(image).save(path, compress_level=3)
                files["overlay"] = f"overlays/{key}.png"
        write_text_atomically(self.folder / f"{key}.json", json.dumps({**said, "files": files}, indent=1) + "\n")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive there as a GET without its content."""

    def redirect_request(self, *_: Any) -> None:
        return None


class WebTarget(Target):
    """Posts JSON to an address, with the key in the header ``Idempotency-Key``; any 2xx is an arrival.

    Args:
        url: ``https://…``, or ``http://…``.
        token: sent as ``Authorization: Bearer``; empty for none.

    Raises:
        ValueError: the address names no host.
    """

    def __init__(self, url: str, token: str = "") -> None:
        host = urllib.parse.urlsplit(url).hostname
        if not host:
            raise ValueError(f"{url}: an address on the web is https://host[:port]/path")
        if url.startswith("http://") and host not in _LOOPBACK:
            logger.warning("results go to %s without encryption", host)
        self.url = url
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self._opener = urllib.request.build_opener(_NoRedirects)

    def deliver(self, key: str, said: Mapping[str, Any], drawn: tuple[Image.Image, Prediction] | None) -> None:
        headers = {**self.headers, "Idempotency-Key": key}
        request = urllib.request.Request(self.url, json.dumps(said).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=_WAIT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code in _TRY_LATER or error.code >= 500:
                    raise OSError(f"{self.url} answers {error.code} {error.reason}") from error
                raise RefusedError(f"{self.url} answers {error.code} {error.reason}") from error
        except http.client.HTTPException as error:
            raise OSError(f"{self.url} answers what is no HTTP, or breaks off: {error!r}") from error


class MqttTarget(Target):
    """Publishes JSON under a topic, with QoS 1: the broker says when it has it. The key is ``id`` in the message.

    Args:
        url: ``mqtt://[user@]host[:port]/topic``, or ``mqtts://…`` with encryption.
        password: of the user; empty for none.

    Raises:
        RunError: the package paho-mqtt is not installed.
        ValueError: the address names no host or topic.
    """

    def __init__(self, url: str, password: str = "") -> None:
        if find_spec("paho") is None:
            raise RunError("results over MQTT need paho-mqtt: pip install 'dinov2[serve]'")
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        parts = urllib.parse.urlsplit(url)
        self.topic = urllib.parse.unquote(parts.path.lstrip("/"))
        if not parts.hostname or not self.topic:
            raise ValueError(f"{url}: an address of MQTT is mqtt://host[:port]/topic")
        self._client = Client(CallbackAPIVersion.VERSION2)
        if parts.username:
            own = urllib.parse.unquote(parts.password or "")
            self._client.username_pw_set(urllib.parse.unquote(parts.username), password or own or None)
        self._started = False
        encrypted = parts.scheme == "mqtts"
        if encrypted:
            self._client.tls_set()
        self._address = parts.hostname, parts.port or (_MQTTS_PORT if encrypted else _MQTT_PORT)

    def deliver(self, key: str, said: Mapping[str, Any], drawn: tuple[Image.Image, Prediction] | None) -> None:
        if not self._started:
            self._client.connect(*self._address)
            self._client.loop_start()  # which also connects again
            self._started = True
        until = time.monotonic() + _WAIT_S
        while not self._client.is_connected():
            if time.monotonic() > until:
                raise OSError(f"the broker {self._address[0]} does not answer, or refuses the user or the password")
            time.sleep(0.01)
        sent = self._client.publish(self.topic, json.dumps(said), qos=1)
        try:
            sent.wait_for_publish(_WAIT_S)
        except (RuntimeError, ValueError) as error:  # not connected any more; too many wait already
            raise OSError(f"the broker {self._address[0]} has not taken it: {error}") from error
        if not sent.is_published():
            raise OSError(f"the broker {self._address[0]} has not confirmed it within {_WAIT_S:g} s")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def open_target(place: str, *, secret: str = "", overlay: bool = True) -> Target:
    """The target that an address names.

    Args:
        place: a folder, ``mqtt://…``, ``mqtts://…``, ``https://…`` or ``http://…``.
        secret: token or password; empty for none.
        overlay: whether a folder gets drawings.

    Raises:
        ValueError: an address of another kind.
        RunError: a package is missing.
        OSError: a folder cannot be made.
    """
    scheme, is_address, _ = place.partition("://")
    if not is_address:
        if secret:
            logger.warning("--secret-file has no effect: %s is a folder", place)
        return FolderTarget(Path(place).expanduser(), overlay=overlay)
    if scheme in ("http", "https"):
        return WebTarget(place, secret)
    if scheme in ("mqtt", "mqtts"):
        return MqttTarget(place, secret)
    raise ValueError(f"--to {place}: results go to a folder, mqtt://…, mqtts://…, https://… or http://…")

"""Weights from a file, an address of a server on this machine, or the name of a released backbone."""

import functools
import hashlib
import http.server
import io
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dinov2.config import load_config
from dinov2.config.schema import StudentOptions
from dinov2.eval.command import weights_fingerprint
from dinov2.models import released
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.released import RELEASED_BACKBONES, fetch_weights, released_backbone, split_prefix
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import file_digest

NAME = "dinov2_vits14_reg"
RELEASED_FILE = "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"


class Server:
    """Gives out the files of a folder and counts the requests."""

    def __init__(self, folder: Path) -> None:
        requests: list[str] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                requests.append(self.path)

        self.folder = folder
        self.requests = requests
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def put(self, path: str, content: bytes = b"weights") -> str:
        """Writes a file and returns its address."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)
        return f"{self.address}/{path}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    monkeypatch.setattr(released, "RELEASED_WEIGHTS", server.address)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.mark.parametrize("name", [None, NAME])
def test_what_an_address_or_a_name_stands_for_is_downloaded_once(server: Server, cache: Path, name: str | None) -> None:
    address = server.put(RELEASED_FILE)
    path = fetch_weights(name or address)
    assert path.read_bytes() == b"weights"
    assert cache in path.parents
    shutil.rmtree(server.folder)
    assert fetch_weights(name or address) == path
    assert server.requests == [f"/{RELEASED_FILE}"]


def test_what_comes_from_an_address_fills_a_backbone_and_is_named_in_results(server: Server) -> None:
    model = DinoVisionTransformer(img_size=14, patch_size=14, embed_dim=4, depth=1, num_heads=1)
    content = io.BytesIO()
    torch.save({"teacher": model.state_dict()}, content)
    address = server.put("run/teacher_checkpoint.pth", content.getvalue())
    assert not load_pretrained_backbone(model, address).missing
    assert weights_fingerprint(address) == {
        "path": address,
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "bytes": len(content.getvalue()),
    }
    assert fetch_weights(f"{address}?signature={'a' * 300}").read_bytes() == content.getvalue()


def test_files_of_two_folders_with_one_name_stay_apart(server: Server) -> None:
    first, second = (fetch_weights(server.put(f"run{i}/teacher_checkpoint.pth", b"%d" % i)) for i in range(2))
    assert (first.read_bytes(), second.read_bytes()) == (b"0", b"1")


def test_a_released_file_that_torch_hub_has_downloaded_is_taken(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / Path(RELEASED_FILE).name).write_bytes(b"kept")
    assert fetch_weights(NAME).read_bytes() == b"kept"
    assert not server.requests


def test_files_come_first_and_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).touch()
    assert fetch_weights(NAME) == Path(NAME)
    assert fetch_weights((tmp_path / NAME).as_uri()) == tmp_path / NAME
    assert fetch_weights("nothing.pth") == Path("nothing.pth")
    assert fetch_weights(tmp_path / "nothing.pth") == tmp_path / "nothing.pth"


def test_without_a_network_address_and_cache_folder_are_named(server: Server, cache: Path) -> None:
    with pytest.raises(ConnectionError, match=rf"{server.address}/nothing\.pth .*{cache}/127\S+ .*404"):
        fetch_weights(f"{server.address}/nothing.pth")
    server.http.server_close()
    with pytest.raises(ConnectionError, match=rf"{server.address}/\S*dinov2_vitb14_pretrain\.pth .*{cache}.*give its"):
        fetch_weights("dinov2_vitb14")
    assert not list(cache.rglob("*.pth*")) or all(path.suffix == ".lock" for path in cache.rglob("*.pth*"))


def test_without_a_network_the_file_to_fetch_and_how_to_pass_it_are_told(server: Server, cache: Path) -> None:
    server.http.server_close()
    with pytest.raises(
        ConnectionError, match=r"fetch the weights dinov2_vits14_reg4_pretrain\.pth .*another machine"
    ) as caught:
        fetch_weights("dinov2_vits14_reg")
    for way in ("student.pretrained_weights=FILE", "--pretrained-weights FILE", "dinov2.load(FILE)", "weights=FILE"):
        assert way in str(caught.value)
    assert f"or put it at {cache / 'dinov2_vits14_reg4_pretrain.pth'}" in str(caught.value)


def test_what_is_no_file_of_weights_is_not_kept(server: Server, cache: Path) -> None:
    address = server.put("weights.pth", b"<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(ValueError, match=rf"{address} gave no weights, but a web page, such as that of a login"):
        fetch_weights(address)
    server.put("weights.pth", b"weights")
    assert fetch_weights(address).read_bytes() == b"weights"
    with pytest.raises(ValueError, match=r"s3://bucket/w\.pth: addresses of weights begin with https://"):
        fetch_weights("s3://bucket/w.pth")


def test_prefixes_and_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").touch()
    assert fetch_weights("~/w.pth:prefix=model.net") == tmp_path / "w.pth"
    assert fetch_weights(Path("~/w.pth")) == tmp_path / "w.pth"
    assert split_prefix("a:b.pth:prefix=model.net") == ("a:b.pth", "model.net")
    assert split_prefix("https://host/a.pth") == ("https://host/a.pth", None)


def test_a_checksum_in_the_address_is_checked(server: Server, cache: Path) -> None:
    address = server.put("vit-20240131.pth")  # a date
    digest = file_digest(fetch_weights(address))
    assert digest[:8] != "20240131"
    assert fetch_weights(server.put(f"vit-{digest[:10]}.pth")).is_file()
    wrong = server.put("vit-0badc0de.pth")
    with pytest.raises(ValueError, match=rf"vit-0badc0de\.pth .*begins with 0badc0de, .* has {digest}.*was deleted"):
        fetch_weights(wrong)
    assert not list(cache.rglob("vit-0badc0de.pth"))


def test_a_checksum_in_the_table_is_checked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put(RELEASED_FILE)
    known = released.ReleasedBackbone("vits14", "vit_small", 384, 12, (2, 5, 8, 11), num_registers=4, sha256="1234")
    monkeypatch.setattr(released, "RELEASED_BACKBONES", {NAME: known})
    with pytest.raises(ValueError, match="begins with 1234"):
        fetch_weights(NAME)


def test_a_truncated_download_leaves_no_file(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = http.server.SimpleHTTPRequestHandler.copyfile
    monkeypatch.setattr(
        http.server.SimpleHTTPRequestHandler, "copyfile", lambda self, source, out: out.write(source.read()[:3])
    )
    address = server.put("vit.pth")
    with pytest.raises(ConnectionError, match="retrieval incomplete"):
        fetch_weights(address)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", send)
    assert fetch_weights(address).read_bytes() == b"weights"


@pytest.mark.parametrize("backbone", RELEASED_BACKBONES.values(), ids=list(RELEASED_BACKBONES))
def test_options_of_released_backbones_are_those_of_their_yaml(
    backbone: released.ReleasedBackbone, repository: Path
) -> None:
    ending = "_reg4" if backbone.num_registers else ""
    config = load_config(repository / "configs" / "eval" / f"{backbone.size}{ending}_pretrain.yaml")
    assert config.student == StudentOptions(**backbone.student)


def test_names_of_released_backbones() -> None:
    assert list(RELEASED_BACKBONES) == [f"dinov2_vit{size}14{end}" for size in "sblg" for end in ("", "_reg")]
    assert released_backbone("dinov2_vitl14_reg").address("linear_head") == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_linear_head.pth"
    )
    with pytest.raises(FileNotFoundError, match=re.escape("dinov2_vits16 is no file and no released backbone; those")):
        fetch_weights("dinov2_vits16")
    with pytest.raises(ValueError, match="unknown backbone 'vits14'; allowed: dinov2_vits14, dinov2_vits14_reg"):
        released_backbone("vits14")

"""Fingerprints of what scores come from."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from eval_stand_ins import MemoryDataset

from dinov2.data.value_range import ValueRange
from dinov2.eval.command import dataset_fingerprint, git_revision, weights_fingerprint


class FileDataset(MemoryDataset):
    """Labels and parts of files in a folder."""

    def __init__(self, root: Path, names: list[str], labels: list[int | None], groups: list[str] | None = None) -> None:
        super().__init__([(0, 0, 0)] * len(names), labels, groups, ("good", "defect"))
        self.root = root
        self.names = names

    def get_image_path(self, index: int) -> Path:
        return self.root / self.names[index]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "first" / "parts"
    (root / "a").mkdir(parents=True)
    (root / "b").mkdir()
    for name, text in (("a/1.png", "one"), ("a/2.png", "two"), ("b/1.png", "three")):
        (root / name).write_text(text)
    return root


NAMES = ["a/1.png", "a/2.png", "b/1.png"]


@pytest.mark.parametrize("groups", [None, ["x", "x", "y"]])
def test_place_and_order_do_not_matter(folder: Path, tmp_path: Path, groups: list[str] | None) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    first = dataset_fingerprint(FileDataset(folder, NAMES, [0, None, 1], groups))
    backwards = None if groups is None else groups[::-1]
    assert dataset_fingerprint(FileDataset(moved, NAMES[::-1], [1, None, 0], backwards)) == first
    assert len(first.pop("sha256")) == 64
    num_parts = 3 if groups is None else 2
    assert first == {"num_images": 3, "num_parts": num_parts, "num_labelled": 2, "classes": ["good", "defect"]}
    dataset = FileDataset(folder, NAMES, [0, None, 1], groups)
    dataset.value_range = ValueRange(0, 4095)
    assert dataset_fingerprint(dataset)["value_range"] == [0.0, 4095.0]


def test_path_label_part_and_size_matter(folder: Path) -> None:
    def digest(names: list[str] = NAMES, labels: tuple = (0, 1, 1), groups: tuple = ("x", "x", "y")) -> str:
        return str(dataset_fingerprint(FileDataset(folder, names, list(labels), list(groups)))["sha256"])

    digests = {digest(), digest(["a/1.png", "a/2.png", "b/2.png"]), digest(labels=(0, 1, None))}
    digests |= {digest(groups=("x", "y", "y")), digest([*NAMES, "a/1.png"], (0, 1, 1, 0), ("x", "x", "y", "x"))}
    (folder / "a" / "1.png").write_text("longer")
    digests.add(digest())
    assert len(digests) == 6


def test_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"numbers")
    assert weights_fingerprint(str(path)) == {
        "path": str(path),
        "sha256": hashlib.sha256(b"numbers").hexdigest(),
        "bytes": 7,
    }
    assert weights_fingerprint("") == {"path": "", "random": True}
    assert weights_fingerprint("a name") == {"path": "a name"}


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "dinov2").mkdir(parents=True)
    assert git_revision(checkout) == ""
    git(checkout, "init", "-q")
    assert git_revision(checkout) == ""  # no commit yet
    (checkout / "dinov2" / "code.py").write_text("1")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_revision(checkout) == commit
    (checkout / "notes.txt").write_text("no code")
    assert git_revision(checkout) == commit
    (checkout / "dinov2" / "more.py").write_text("2")
    assert git_revision(checkout) == f"{commit}+dirty"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_revision(checkout) == f"{commit}+dirty"
    installed = checkout / "venv" / "site-packages"  # a package inside the checkout of something else
    installed.mkdir(parents=True)
    assert git_revision(installed) == ""


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == ""

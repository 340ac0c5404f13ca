"""The documents against the code: files and options that they name, and links between them."""

import re
from pathlib import Path
from typing import Any

import pytest

from dinov2.config import leaf_names
from dinov2.tasks.options import TaskConfig

SECTION_ROW = re.compile(r"^\| `(\w+)` \| (`.+`) \|$", re.MULTILINE)


def documents(repository: Path) -> list[Path]:
    return [repository / "README.md", *sorted((repository / "docs").glob("*.md"))]


def test_files_that_the_documents_name_exist(repository: Path) -> None:
    for path in documents(repository):
        for name in re.findall(r"`((?:dinov2|run|tools|tests|configs|eval)/[\w/]+\.(?:py|sh|yaml))`", path.read_text()):
            assert (repository / name).is_file(), f"{path.name} names {name}"


def test_modules_that_the_architecture_names_exist(repository: Path) -> None:
    text = (repository / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert list(repository.glob(f"**/{name}")), f"architecture.md names {name}"


def test_links_between_documents_lead_somewhere(repository: Path) -> None:
    for path in documents(repository):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text()):
            other = path.parent / target if target else path
            assert other.exists(), f"{path.name} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{path.name} links to {target}#{anchor}"


def test_options_that_the_documents_set_exist(repository: Path) -> None:
    known = set(leaf_names()) | set(leaf_names(TaskConfig))
    sections = {name.partition(".")[0] for name in known}
    for path in documents(repository):
        text = re.sub(r"^error: .*$", "", path.read_text(), flags=re.MULTILINE)  # examples of what is wrong
        for name in re.findall(r"(?<![\w./])((?:\w+\.)+\w+)=", text):
            if name.partition(".")[0] in sections:
                assert name in known, f"{path.name} sets {name}"


def test_the_table_of_our_own_options_is_complete(repository: Path, reference: Any) -> None:
    upstream = set().union(*reference("upstream_options.json").values())
    own = set(leaf_names()) - upstream
    text = (repository / "docs" / "options.md").read_text()
    listed = {
        f"{section}.{name}" for section, names in SECTION_ROW.findall(text) for name in re.findall(r"`(\w+)`", names)
    }
    assert listed == own
    assert f"All {len(upstream)} names of upstream" in text


@pytest.mark.parametrize("name", ["ssl_default_config", "task_default_config"])
def test_the_page_of_options_links_to_the_files_with_all_of_them(repository: Path, name: str) -> None:
    texts = [path.read_text() for path in documents(repository)]
    assert any(f"configs/{name}.yaml" in text for text in texts)

"""The two shell scripts of the README: their help, what they refuse, and which environment they accept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def bash(repository: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", *words],
        cwd=repository,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", ["run/quickstart.sh", "run/tests.sh"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_the_usage_and_does_nothing_else(repository: Path, script: str, flag: str) -> None:
    result = bash(repository, script, flag)
    assert result.returncode == 0
    assert f"bash {script}" in result.stdout
    assert not result.stderr
    assert "==" not in result.stdout, "which begins every step"


@pytest.mark.parametrize(
    ("words", "message"), [(["--steps"], "unknown option --steps"), (["a", "b"], "one folder at most, found 2: a b")]
)
def test_the_quickstart_refuses_what_is_no_folder(repository: Path, words: list[str], message: str) -> None:
    result = bash(repository, "run/quickstart.sh", *words)
    assert result.returncode == 1
    assert not result.stdout
    assert message in result.stderr
    assert "usage: bash run/quickstart.sh [FOLDER]" in result.stderr


def test_an_environment_must_hold_this_checkout_and_every_module(repository: Path, tmp_path: Path) -> None:
    def accepts(path: Path, *modules: str) -> bool:
        script = f". run/environment.sh; can_run {sys.executable} {' '.join(modules)}"
        return bash(repository, "-c", script, PYTHONPATH=str(path)).returncode == 0

    assert accepts(repository, "torch", "yaml")
    assert not accepts(repository, "torch", "no_such_module_anywhere")
    other = tmp_path / "dinov2"
    other.mkdir()
    (other / "__init__.py").touch()
    assert not accepts(tmp_path, "torch"), "another project of the same name"

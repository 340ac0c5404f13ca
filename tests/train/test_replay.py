"""A skipped batch replayed: the run's own numbers where the weights are the same, and the module to blame."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_batches import poison
from torch import Tensor
from train_stand_ins import Train

from dinov2.layers.feed_forward import Mlp
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import sidecar
from tools.replay_batch import find_bad_batch, replay_batch


def test_a_bad_pixel_is_found(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1, 3})
    train(tmp_path)
    found = replay_batch(tmp_path, device="cpu")
    assert found.about["iteration"] == 3
    assert found.weights.startswith(str(tmp_path / "model_0000002.rank_{rank}.pth, 0 iteration(s)"))
    assert found.bad_inputs == ["global_crops"]
    assert found.first_bad_module.startswith("teacher.backbone.patch_embed")
    assert "returned nan values" in found.anomaly
    assert not found.is_finite
    assert str(found).endswith("\n".join(f"  {name}" for name in found.names))
    assert replay_batch(tmp_path, 1, device="cpu").weights.startswith("those that the run starts from")


def test_the_replay_repeats_the_run(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the loss as it was reported was spoilt: with the same weights and random numbers the rest is equal."""
    real = SSLMetaArch.forward_backward
    calls = iter(range(1000))

    def forward_backward(self: SSLMetaArch, *arguments: Any, **keywords: Any) -> dict[str, Tensor]:
        losses = real(self, *arguments, **keywords)
        return losses | {"total_loss": torch.tensor(math.nan)} if next(calls) == 3 else losses

    monkeypatch.setattr(SSLMetaArch, "forward_backward", forward_backward)
    train(tmp_path, "student.drop_path_rate=0.5")
    found = replay_batch(tmp_path, 3, device="cpu")
    assert found.is_finite
    expected = {name: value for name, value in found.about["losses"].items() if name != "total_loss"}
    assert {name: value for name, value in found.losses.items() if name != "total_loss"} == expected
    # clip_grad_norm_ takes its norms in groups, so they need not agree to the last bit
    assert found.grad_norms == pytest.approx(found.about["grad_norms"], rel=1e-5)


def test_a_module_is_named(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {1})
    train(tmp_path, "optim.epochs=1")
    monkeypatch.undo()
    from train_stand_ins import make_small

    make_small(monkeypatch)
    path = tmp_path / "bad_batches" / "iteration_0000001.rank_0.pth"
    content = torch.load(path, weights_only=True)
    content["batch"]["global_crops"].nan_to_num_(0)
    sidecar(path).unlink()
    torch.save(content, path)
    real = Mlp.forward
    monkeypatch.setattr(Mlp, "forward", lambda self, x: real(self, x) / 0)
    found = replay_batch(tmp_path, device="cpu")
    assert found.first_bad_module == "teacher.backbone.blocks.0.mlp"


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "bad_batches").mkdir()
    (tmp_path / "bad_batches" / "iteration_0000004.rank_1.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"there are: iteration_0000004\.rank_1\.pth"):
        find_bad_batch(tmp_path, 5, None)
    assert find_bad_batch(tmp_path, None, None).name == "iteration_0000004.rank_1.pth"

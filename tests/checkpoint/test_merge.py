"""Rank files as one file: the same values, in little memory, readable by everything that reads weights."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_stand_ins import flip, in_processes, run_python
from safetensors import safe_open
from safetensors.torch import load_file as load_safetensors

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.checkpoint.integrity import DamagedCheckpointError
from dinov2.checkpoint.merge import SAFETENSORS, extract_teacher, merge_checkpoint, write_safetensors
from dinov2.config import load_config, render_config
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.evaluation import save_teacher
from dinov2.train.setup import parallelize
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import checksum_fault, write_with_checksum
from dinov2.utils.seeds import seed_everything

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MIB = 2**20
TENSORS, SIZE = 8, 16 * MIB  # 128 MiB in two rank files


def vit() -> DinoVisionTransformer:
    return DinoVisionTransformer(
        img_size=32, patch_size=8, embed_dim=36, depth=3, num_heads=2, init_values=0.1, num_register_tokens=1
    )


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def build_method() -> SSLMetaArch:
    seed_everything(0)
    values = {"crops.global_crops_size": 32} | {
        f"{head}.{name}": value
        for head in ("dino", "ibot")
        for name, value in (("head_n_prototypes", 64), ("head_hidden_dim", 48), ("head_bottleneck_dim", 16))
    }
    config = load_config({**values, "ibot.separate_head": True})
    model = SSLMetaArch(config, (vit(), vit())).train()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for buffer in model.buffers():
            buffer.add_(torch.randn_like(buffer))
    parallelize(model, config, CPU)
    return model


def write_run(folder: Path) -> None:
    """A step, the teacher as an evaluation writes it, and the live teacher's features."""
    model = build_method()
    optimizer = torch.optim.AdamW(model.student.parameters())
    FSDPCheckpointer(model, folder, optimizer=optimizer, asynchronous=False).save("model_0000007", iteration=7)
    save_teacher(model, folder / "eval" / "training_7")
    with torch.no_grad():
        features = model.teacher_backbone.eval()(images(), is_training=True)
    if dist.get_rank() == 0:
        torch.save({name: value for name, value in features.items() if value is not None}, folder / "features.pth")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    in_processes(2, folder, write_run)
    return folder


def assert_same_features(weights: Path, run: Path) -> None:
    backbone = vit()
    report = load_pretrained_backbone(backbone, weights, log=False)
    assert not report.missing + report.unexpected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        features = backbone.eval()(images(), is_training=True)
    torch.set_num_threads(threads)
    expected = torch.load(run / "features.pth", weights_only=True)
    assert {"x_norm_clstoken", "x_norm_patchtokens"} <= expected.keys()
    for name, value in expected.items():
        assert torch.equal(features[name], value), name


def test_the_merged_teacher_is_the_live_teacher_bit_for_bit(run: Path, tmp_path: Path) -> None:
    merged = merge_checkpoint(run, tmp_path / "teacher.pth")
    assert checksum_fault(merged.path) == ""
    ours = torch.load(merged.path, weights_only=True)
    expected = torch.load(run / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)
    assert list(ours) == list(expected) == ["teacher"]
    assert ours["teacher"].keys() == expected["teacher"].keys()
    for name, tensor in expected["teacher"].items():
        assert torch.equal(ours["teacher"][name], tensor), name
    assert_same_features(merged.path, run)
    assert_same_features(run / "eval" / "training_7" / "teacher_checkpoint.pth", run)
    assert (merged.iteration, merged.tensors) == (7, len(expected["teacher"]))
    assert merged.nbytes == sum(tensor.nbytes for tensor in expected["teacher"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.pth", "teacher.pth.sha256"]


ENDINGS = ("pth", "pth.sha256", "safetensors", "safetensors.sha256")


def test_safetensors_of_every_type(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in SAFETENSORS}
    tensors |= {"é scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
    with (tmp_path / "a.safetensors").open("wb") as file:
        write_safetensors(tensors, {"format": "pt"}, file)
    loaded = load_safetensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("what", ["teacher", "student", "all"])
def test_safetensors_and_pth_hold_the_same(run: Path, tmp_path: Path, what: str) -> None:
    source = run / "model_0000007.rank_1.pth"
    for name in ("a.safetensors", "a.pth"):
        (tmp_path / ".other.pth.0123456789ab.tmp").write_bytes(b"left by a process that was killed")
        merge_checkpoint(source, tmp_path / name, what=what)
        assert {path.name for path in tmp_path.iterdir()} <= {f"a.{end}" for end in ENDINGS}
    never_sharded = build_method()
    values = dict([*never_sharded.named_parameters(), *never_sharded.named_buffers()])
    expected = {name: value for name, value in values.items() if what in ("all", name.partition(".")[0])}
    flat = load_safetensors(tmp_path / "a.safetensors")
    nested = torch.load(tmp_path / "a.pth", weights_only=True)
    unnested = {
        name if part == "other" else f"{part}.{name}": tensor
        for part, state in nested.items()
        for name, tensor in state.items()
    }
    assert flat.keys() == unnested.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(flat[name], value), name
        assert torch.equal(unnested[name], value), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": what, "iteration": "7"}
    if what == "all":
        assert_same_features(tmp_path / "a.pth", run)


@pytest.mark.parametrize("source", [".", "model_0000007.rank_{rank}.pth", "eval/training_7/teacher_checkpoint.pth"])
def test_the_backbone_alone(run: Path, tmp_path: Path, source: str) -> None:
    extract_teacher(run / source, tmp_path / "backbone.pth")
    ours = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert ours.keys() == vit().state_dict().keys()
    assert_same_features(tmp_path / "backbone.pth", run)
    extract_teacher(run / source, tmp_path / "backbone.safetensors")
    assert load_safetensors(tmp_path / "backbone.safetensors").keys() == ours.keys()
    assert_same_features(tmp_path / "backbone.safetensors", run)


def test_options_of_the_run_come_along(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 3}")
    merge_checkpoint(tmp_path / "run", tmp_path / "teacher.pth")
    merge_checkpoint(tmp_path / "run", tmp_path / "teacher.safetensors")
    extract_teacher(tmp_path / "run", tmp_path / "run.safetensors")
    extract_teacher(tmp_path / "teacher.pth", tmp_path / "file.safetensors")
    for name in ("teacher.pth", "teacher.safetensors", "run.safetensors", "file.safetensors"):
        assert read_checkpoint(tmp_path / name)["config"] == "train: {seed: 3}"
        assert_same_features(tmp_path / name, run)


@pytest.mark.parametrize(
    ("length", "fault"), [(-18, "is not as a run"), (0, "is not as a run"), (18, "expected text"), (None, "UTF-8")]
)
def test_damaged_options_do_not_come_along_without_a_word(
    run: Path, tmp_path: Path, length: int | None, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path / "run")
    text = render_config(load_config()).encode()
    path = tmp_path / "run" / "config.yaml"
    path.write_bytes(text)
    merge_checkpoint(tmp_path / "run", tmp_path / "a.pth")
    assert not caplog.text
    path.write_bytes(b"\xff" + text if length is None else text[:length])
    if "not as" in fault:
        merge_checkpoint(tmp_path / "run", tmp_path / "a.pth")
        assert f"{path} {fault}" in caplog.text
    else:
        with pytest.raises(ValueError, match=rf"config\.yaml.*{fault}.* Mend the file"):
            merge_checkpoint(tmp_path / "run", tmp_path / "a.pth")


def test_damage_and_wishes_that_cannot_be_met(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.bin: the new file's name must end in \.pth or \.safetensors"):
        merge_checkpoint(run, tmp_path / "weights.bin")
    with pytest.raises(FileNotFoundError, match=r"the folder .*gone of the new file does not exist"):
        merge_checkpoint(run, tmp_path / "gone" / "a.pth")
    with pytest.raises(ValueError, match="what='head' cannot be merged; choose among teacher, student, all"):
        merge_checkpoint(run, tmp_path / "a.pth", what="head")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        merge_checkpoint(tmp_path, tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*teacher_checkpoint\.pth"):
        extract_teacher(tmp_path / "teacher_checkpoint.pth", tmp_path / "a.pth")
    for path in run.glob("model_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    flip(tmp_path / "model_0000007.rank_1.pth")
    with pytest.raises(DamagedCheckpointError, match=r"model_0000007\.rank_1\.pth is damaged"):
        merge_checkpoint(tmp_path / "model_0000007.rank_0.pth", tmp_path / "a.pth")
    torch.save({"model": 1}, tmp_path / "no_teacher.pth")
    with pytest.raises(ValueError, match="is no teacher's file: it lacks the key teacher"):
        extract_teacher(tmp_path / "no_teacher.pth", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


def test_the_doors(run: Path, tmp_path: Path, repository: Path) -> None:
    for words in (
        ["merge_checkpoint.py", str(run), str(tmp_path / "s.safetensors"), "--what", "student"],
        ["extract_teacher.py", str(run), str(tmp_path / "t.pth")],
    ):
        done = run_python(f"tools/{words[0]}", *words[1:], folder=repository)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{words[2]}: ")
        assert Path(words[2]).exists()


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from torch import nn
from dinov2.fsdp import FSDPCheckpointer
from dinov2.checkpoint.merge import merge_checkpoint

folder, job = Path(sys.argv[1]), sys.argv[2]
rows, width = 4096, 1024

def private():
    # Pages of this process alone; those that map a file can be dropped by the system at any time.
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

class Peak(threading.Thread):
    def run(self):
        self.maximum, self.ended = 0, threading.Event()
        while not self.ended.wait(0.0005):
            self.maximum = max(self.maximum, private())

model = nn.Module()
if job == "load":
    model.teacher = nn.ParameterList([torch.zeros(rows, width) for _ in range({tensors})])
    for parameter in model.parameters():
        parameter.data.fill_(1)  # so that its pages exist
    checkpointer = FSDPCheckpointer(model, folder, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
warm = torch.cat([torch.zeros(10), torch.zeros(10)]).sum()
before, peak = private(), Peak()
peak.start()
if job == "load":
    checkpointer.resume_or_load("")
    assert all(p[0, 0] == n and p[-1, -1] == n + 1 for n, p in enumerate(model.teacher))
else:
    merge_checkpoint(folder, folder / f"merged{{job}}")
peak.ended.set()
peak.join()
print(peak.maximum - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
def test_loading_holds_one_tensor_beside_the_model_and_merging_none(tmp_path: Path) -> None:
    rows, width = 4096, SIZE // 4096 // 4
    for rank in range(2):
        names = [f"teacher.{number}" for number in range(TENSORS)]
        content = {
            "format_version": 2,
            "rank": rank,
            "world_size": 2,
            "iteration": 3,
            "optimizer": {},
            "model": {name: torch.full((rows // 2, width), float(rank + int(name[8:]))) for name in names},
            "rows": {name: [rank * rows // 2, rows // 2, rows] for name in names},
        }
        save = partial(torch.save, content)
        write_with_checksum(tmp_path / f"model_0000003.rank_{rank}.pth", save)
        (tmp_path / f"last_checkpoint.rank_{rank}").write_text(f"model_0000003.rank_{rank}.pth\n")
    for job in ("load", ".pth", ".safetensors"):
        done = run_python(str(tmp_path), job, code=MEMORY.format(tensors=TENSORS))
        assert done.returncode == 0, done.stderr
        extra = int(done.stdout or 0)
        assert extra < (SIZE if job == "load" else 0) + 10 * MIB, f"{job}: {extra / MIB:.0f} MiB"
    for merged in tmp_path.glob("merged.*"):
        assert merged.suffix == ".sha256" or merged.stat().st_size > TENSORS * SIZE

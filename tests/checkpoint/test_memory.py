"""Memory beside the model: one tensor for loading, none for merging, however large the checkpoint is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
TENSORS, SIZE = 16, 16 * MIB  # 256 MiB in two rank files

SCRIPT = """
import sys, threading
from pathlib import Path
import torch
from torch import nn
from dinov2.fsdp import FSDPCheckpointer
from dinov2.checkpoint.merge import merge_checkpoint
from dinov2.utils.files import write_with_checksum

folder, job = Path(sys.argv[1]), sys.argv[2]
rows, width = 4096, 1024

def private():
    # Pages of this process alone; those that map a file can be dropped by the system at any time.
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

class Peak(threading.Thread):
    def run(self):
        self.most, self.ended = 0, threading.Event()
        while not self.ended.wait(0.0005):
            self.most = max(self.most, private())

if job == "write":
    for rank in range(2):
        names = [f"teacher.{{number}}" for number in range({tensors})]
        content = {{
            "format_version": 2, "rank": rank, "world_size": 2, "iteration": 3, "optimizer": {{}},
            "model": {{name: torch.full((rows // 2, width), float(rank + int(name[8:]))) for name in names}},
            "rows": {{name: [rank * rows // 2, rows // 2, rows] for name in names}},
        }}
        write_with_checksum(folder / f"model_0000003.rank_{{rank}}.pth", lambda file: torch.save(content, file))
        (folder / f"last_checkpoint.rank_{{rank}}").write_text(f"model_0000003.rank_{{rank}}.pth\\n")
    sys.exit()
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
print(peak.most - before)
"""


def run(folder: Path, job: str) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tensors=TENSORS), str(folder), job],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout or 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    run(folder, "write")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's memory")
@pytest.mark.parametrize("job", ["load", ".pth", ".safetensors"])
def test_a_tensor_at_a_time(large: Path, job: str) -> None:
    extra = run(large, job)
    print(job, extra / MIB)
    assert extra < (SIZE if job == "load" else 0) + 10 * MIB, f"{extra / MIB:.0f} of {TENSORS * SIZE / MIB:.0f} MiB"
    if job != "load":
        assert (large / f"merged{job}").stat().st_size > TENSORS * SIZE
        (large / f"merged{job}").unlink()

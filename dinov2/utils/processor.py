"""What the processor multiplies in hardware, and how much memory the machine has."""

import contextlib
from pathlib import Path

import psutil

CPUINFO = Path("/proc/cpuinfo")

# Dot products and matrix products of bf16: x86 with AVX-512 or AMX, ARM with BFMMLA.
_BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
_FLAG_LINES = ("flags", "Features")  # x86, ARM

_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def multiplies_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether every core multiplies bf16 matrices in hardware; false where that is not certain.

    Elsewhere torch computes bf16 on a processor as well, but slower than float32.

    Args:
        cpuinfo: where Linux describes the cores; other systems have no such file.
    """
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    lines = (line.partition(":") for line in text.splitlines())
    cores = [set(flags.split()) for name, _, flags in lines if name.strip() in _FLAG_LINES]
    return bool(cores) and all(flags & _BF16_FLAGS for flags in cores)


def memory_of_machine() -> int:
    """Bytes of this machine, or of the container or job that this process is in."""
    limits = [int(psutil.virtual_memory().total)]
    for path in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # none, or the word max
            limits.append(int(path.read_text()))
    return min(limits)

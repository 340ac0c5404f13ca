"""What the processor does in hardware."""

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# Dot products and matrix products of bf16: x86 with AVX-512 or AMX, ARM with BFMMLA.
_BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
_FLAG_LINES = ("flags", "Features")  # x86, ARM


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

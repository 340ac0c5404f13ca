"""Small measures of a running process, and how they are written."""

import psutil
import torch


def memory_gib(device: torch.device | None = None) -> float:
    """Memory in GiB: the peak that torch allocated on a CUDA device, or what this process holds where there is none.

    Args:
        device: device of the work; None stands for the current CUDA device where one is in use, else for the CPU.
    """
    if device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.device("cuda")
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return int(psutil.Process().memory_info().rss) / 2**30


def format_duration(seconds: float) -> str:
    """``0:12:40``, with days in front where there are any: ``2 d 3:04:05``. A negative length counts as zero."""
    total = round(max(seconds, 0.0))
    days, rest = divmod(total, 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock

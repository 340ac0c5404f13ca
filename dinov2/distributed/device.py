"""Which device this process computes on."""

import torch


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Returns the device to compute on.

    Args:
        name: ``cpu``, ``cuda``, ``mps``, or ``auto`` for the best that is there.
        local_rank: this process's number on its machine, which selects the GPU.

    Raises:
        ValueError: when the device asked for is not there, or there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but this machine has none")
    if name == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError("device cuda was asked for, but torch sees no GPU")
        if local_rank >= count:
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: torch sees {count}; start fewer processes"
            )
        return torch.device("cuda", local_rank)
    return torch.device(name)

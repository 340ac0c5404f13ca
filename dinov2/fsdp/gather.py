"""Putting a sharded network together again."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.distributed import is_main_process


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Collects whole tensors on the main process, one at a time; other processes get an empty dict.

    Every process must call it. Tensors are on the processor and independent of the network.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main_process():
            state[name] = whole.detach().cpu().clone()
    return state

"""Names of parameters, whatever is wrapped around their modules."""

import re

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def strip_wrappers(name: str) -> str:
    """Removes what data parallelism, FSDP, activation checkpointing and ``torch.compile`` put into parameter names."""
    return _WRAPPERS.sub("", name)

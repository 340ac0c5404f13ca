"""Which weights are the best so far, and whether waiting for better ones is worth it."""

import math
from typing import Any


class BestSoFar:
    """Follows a figure over epochs.

    Args:
        metric: its name, for messages.
        higher_is_better: whether larger is better.
        patience: epochs without improvement after which the run is stale; 0 for never.

    Attributes:
        figure: the best, NaN before the first.
        epoch: of the best; -1 before the first.
    """

    def __init__(self, metric: str, *, higher_is_better: bool, patience: int) -> None:
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.patience = patience
        self.figure = math.nan
        self.epoch = -1
        self._last_epoch = -1

    def see(self, figure: float, epoch: int) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far, equals not counting."""
        self._last_epoch = epoch
        better = figure > self.figure if self.higher_is_better else figure < self.figure
        if math.isnan(self.figure) or better:
            self.figure, self.epoch = figure, epoch
            return True
        return False

    @property
    def is_stale(self) -> bool:
        """Whether nothing has improved for too long."""
        return self.patience > 0 and self._last_epoch - self.epoch >= self.patience

    def describe(self) -> str:
        """For people."""
        if self.epoch < 0:
            return "nothing was judged"
        return f"the best {self.metric} is {self.figure:.4f}, after epoch {self.epoch} of {self._last_epoch}"

    def state_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {"figure": self.figure, "epoch": self.epoch, "last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.figure, self.epoch, self._last_epoch = state["figure"], state["epoch"], state["last_epoch"]

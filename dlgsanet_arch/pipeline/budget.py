"""The time that a run may take, and where its schedule is by then."""

import math
from time import monotonic


class Budget:
    """The minutes of `train:max_minutes`, used up by the processes that start and resume a run.

    Args:
        minutes: None for no limit; then no time is counted.
        used: Seconds that the run's earlier processes used.
        began: When this process began, by `monotonic`.

    Attributes:
        seconds: How many are used, as the run's processes last agreed.
    """

    def __init__(self, minutes: float | None, used: float, began: float) -> None:
        self._limit = math.inf if minutes is None else 60.0 * minutes
        self._start = began - used
        self.seconds = used

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit < math.inf

    @property
    def is_spent(self) -> bool:
        """Whether no iteration may follow."""
        return self.seconds >= self._limit

    @property
    def left(self) -> float:
        """Seconds that are left by the last agreement."""
        return max(0.0, self._limit - self.seconds)

    def now(self) -> float:
        """Return the seconds used so far by this process's clock."""
        return monotonic() - self._start if self.is_limited else self.seconds

    def position(self, iteration: int, total: int) -> int:
        """Return the iteration whose learning rate applies: the later one by count and by time.

        By time it has the share of `total` that the used seconds have of the budget.
        """
        return max(iteration, int(total * self.seconds / self._limit))

    def __str__(self) -> str:
        return f"the {self._limit / 60:g} minutes of train:max_minutes"

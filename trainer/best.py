"""Which evaluation in training was the best so far, and whether it is time to stop."""

import json
from collections.abc import Mapping
from pathlib import Path

_LOWER = ("triplet_loss",)
"""Metrics of which less is better."""


class Best:
    """Follows one metric over the evaluations of a run. What it says depends on them alone, so a resumed run decides alike.

    Args:
        metric: a name of `SetResult.headline`, or "none" to follow nothing.
        patience: evaluations without a better one after which `exhausted` is true; 0: never.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self._patience = metric, patience
        self.step = 0
        """Of the best evaluation."""
        self.value: float | None = None
        self._since = 0
        """Evaluations since then."""

    @property
    def exhausted(self) -> bool:
        return bool(self._patience) and self._since >= self._patience

    def see(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Counts an evaluation; returns whether it is the best so far (of equal ones the first is)."""
        if self.metric == "none" or self.exhausted:
            return False
        value = scalars.get(self.metric)
        sign = -1 if self.metric in _LOWER else 1
        if value is not None and (self.value is None or sign * value > sign * self.value):
            self.step, self.value, self._since = step, value, 0
            return True
        self._since += 1
        return False

    def see_log(self, path: Path, until: int) -> None:
        """Counts the evaluations of a run's evaluations.jsonl, if it has one, up to a step."""
        for text in path.read_text().splitlines() if path.is_file() else []:
            line = json.loads(text)
            if line["step"] <= until:
                self.see(line["step"], line)

    def farewell(self) -> str:
        """Why training ends early."""
        found = "never measured" if self.value is None else f"{self.value:.4f} at step {self.step}"
        return f"{self._since} evaluations in a row without a better {self.metric} (best: {found}): training ends"

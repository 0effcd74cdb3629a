"""The collapse guard: sees that a network maps everything to one point, says so, and does what the settings say.

Hard triplets of a network that knows nothing yet pull more than they push; all embeddings then meet in one point, where the
distances are 0 and the loss is the margin (or log 2). It shows in the spread of the embeddings.
"""

from dataclasses import replace
from typing import Any

from trainer.config import GuardConfig
from trainer.metric.losses import Objective

_LOWER, _LOWERINGS = 0.1, 2
"""What the learning rate is multiplied by, and how often at most."""


class CollapseGuard:
    """Looks at every line of the log.

    Args:
        state: what it has done, which checkpoints keep; changed in place.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any]) -> None:
        self._config, self._state = config, state
        for name, value in (("lines", 0), ("collapsed", False), ("acted", 0), ("rate", 1.0)):
            state.setdefault(name, value)

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return float(self._state["rate"])

    def see(self, step: int, spread: float, loss: float) -> str:
        """Takes a line of the log; returns what there is to say, or nothing.

        Args:
            spread: see `metric.losses.spread`.
        """
        state, config = self._state, self._config
        if spread >= config.spread:
            recovered, state["lines"], state["collapsed"] = state["collapsed"], 0, False
            return f"step {step}: the embeddings spread again ({spread:.3f})" if recovered else ""
        state["lines"] += 1
        if state["lines"] % config.patience:
            return ""
        state["collapsed"] = True
        return f"step {step}: the embeddings have collapsed (spread {spread:.3f}, loss {loss:.4f}): {self._act()}"

    def objective(self, asked: Objective) -> Objective:
        """What to train with: what the settings ask for or, after a collapse, what they ask for then."""
        action = self._config.action
        if not self._state["acted"] or action in ("warn", "lower_rate"):
            return asked
        if action == "soft_margin":
            return replace(asked, kind="soft_margin", margin=None)
        if action == "smooth":
            return replace(asked, kind="smooth", margin=asked.margin or 0.0)
        return replace(asked, mining=action)

    def _act(self) -> str:
        action, state = self._config.action, self._state
        state["acted"] += 1
        if action == "lower_rate" and state["acted"] <= _LOWERINGS:
            state["rate"] *= _LOWER
            return f"the learning rate is multiplied by {state['rate']:g} from here on"
        if action in ("warn", "lower_rate") or state["acted"] > 1:
            return "begin again with model.head_batchnorm, loss.kind smooth, or a lower optimizer.learning_rate"
        return f"going on with {action}"

"""What the loops of `peers_contenders.py` have in common: turns, learning rate, and how they are judged."""

import json
import math
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from trainer.model import Embedder
from trainer.phases import Enough

SIZE, PEAK_RATE, WARMUP = 112, 1e-3, 0.1
REPLY = "TURN "


class Turns:
    """Stands in a loop at the top of its step, in a recorder's place for ours: lets it run so many steps, or seconds, as it is
    told on standard input, and says on standard output what they took.

    Args:
        total_s: seconds of all turns, for the learning rate; None: it stays at its peak.
    """

    def __init__(self, total_s: float | None) -> None:
        self._total_s, self._spent_s = total_s, 0.0
        self._begun: float | None = None
        self._steps, self._asked = 0, {}
        self.model: Embedder | None = None
        self.details: dict[str, float] = {}

    def next_step(self) -> None:
        """
        Raises:
            Enough: there are no more turns.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self._begun is not None:
            self._steps += 1
            seconds = time.perf_counter() - self._begun
            if self._steps >= self._asked.get("steps", math.inf) or seconds >= self._asked.get("seconds", math.inf):
                self._spent_s += 0.0 if "warm_up" in self._asked else seconds
                self._begun = None
                self._say({"seconds": seconds, "steps": self._steps, **self.details})
        while self._begun is None:
            self._asked = json.loads(sys.stdin.readline() or '{"end": true}')
            if "end" in self._asked:
                raise Enough
            if "judge" in self._asked:
                assert self.model is not None
                self._say({"rank1": rank1(self.model, Path(self._asked["judge"]))})
            else:
                self._begun, self._steps = time.perf_counter(), 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def until_here(self, name: str) -> None:
        pass

    def rate(self) -> float:
        """Linear warm-up, then half a cosine, over the time of all turns."""
        if self._total_s is None:
            return PEAK_RATE
        running = 0.0 if self._begun is None else time.perf_counter() - self._begun
        share = min(1.0, (self._spent_s + running) / self._total_s)
        if share < WARMUP:
            return PEAK_RATE * (share + 1e-3) / WARMUP
        return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))

    def _say(self, found: dict[str, float]) -> None:
        print(REPLY + json.dumps(found), flush=True)


def rank1(model: Embedder, pictures: Path) -> float:
    """Share of the pictures of unseen identities whose nearest of all first pictures is of their own identity."""
    import numpy as np
    from PIL import Image

    images, identities = [], []
    for number, folder in enumerate(sorted(pictures.iterdir())):
        for path in sorted(folder.iterdir()):
            with Image.open(path) as picture:
                images.append(np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
            identities.append(number)
    model.eval()
    device = model.mean.device
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    with torch.no_grad():
        embeddings = torch.cat([model(part) for part in batch.split(64)])
    model.train()
    labels = torch.tensor(identities, device=device)
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=device), labels[1:] != labels[:-1]])
    nearest = (embeddings[~first] @ embeddings[first].T).argmax(1)
    return float((labels[first][nearest] == labels[~first]).double().mean())

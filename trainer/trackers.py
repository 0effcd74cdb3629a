"""Who else is told a run's figures: TensorBoard, Weights & Biases, MLflow, Trackio, all by accelerate's trackers.

Nothing leaves the machine unless the environment says where to, in the trackers' own variables: WANDB_MODE=online,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL. Without them they write below the run folder.
"""

import dataclasses
import importlib.util
import json
import os
import secrets
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from trainer.collectives import rank
from trainer.config import RunConfig, TrainConfig

IDENTITY = "trackers.json"
"""Name of the file in a run folder that says which runs of the trackers it is, so that a resumed run goes on with them."""
_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "trackio": ("trackio",)}


def check_installed(config: RunConfig) -> None:
    """Raises:
    ValueError: a tracker's package is not installed.
    """
    for name in config.trackers:
        for package in _PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"run.trackers has {name}, whose package {package} is not installed: "
                    "pip install 'facescale[trackers]', or leave it out"
                )


class Trackers:
    """The trackers of one run: all of them on rank 0; every rank may call every method.

    A tracker that fails while the run goes on is left alone from then on: its figures are in the run folder anyway.

    Raises:
        ValueError: one is not installed or does not start.
    """

    def __init__(self, config: TrainConfig) -> None:
        check_installed(config.run)
        self._trackers: dict[str, GeneralTracker] = {}
        if rank():
            return
        folder = config.run.folder.absolute()
        path = folder / IDENTITY
        identity = json.loads(path.read_text()) if path.is_file() else {"id": secrets.token_hex(4)}
        if config.run.tensorboard:
            self._start("tensorboard", TensorBoardTracker("tensorboard", folder), {})
        for name in config.run.trackers:
            told = (
                {} if name == "mlflow" and name in identity else flat(config)
            )  # it takes no second value of a parameter
            self._start(name, _MAKE[name](config.run.tracker_project, folder, identity), told)
            identity[name] = self._trackers[name].tracker.info.run_id if name == "mlflow" else identity["id"]
        if config.run.trackers:
            path.write_text(json.dumps(identity) + "\n")

    def log(self, values: dict[str, float], step: int) -> list[str]:
        """Sends figures to all; returns what is to be said of those that failed."""
        return self._each("log", values, step)

    def end(self) -> list[str]:
        """Waits until all have written what they were sent; returns as `log`."""
        return self._each("finish")

    def _start(self, name: str, tracker: GeneralTracker, told: dict[str, Any]) -> None:
        """Begins, and tells the settings, if any."""
        try:
            tracker.start()
            if told:
                tracker.store_init_configuration(told)
        except Exception as error:  # each has its own
            raise ValueError(f"run.trackers: {name} does not start: {_first_line(error)}") from error
        self._trackers[name] = tracker

    def _each(self, method: str, *given: Any) -> list[str]:
        said = []
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*given)
            except Exception as error:  # a server that is gone, a full disk: no reason to stop training
                said.append(f"tracker {name} failed and is told no more: {_first_line(error)}")
                del self._trackers[name]
        return said


def flat(config: Any, prefix: str = "") -> dict[str, bool | int | float | str]:
    """Every setting by its dotted name, as trackers take hyperparameters: what is no number is told in words."""
    found: dict[str, bool | int | float | str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value if isinstance(value, bool | int | float) else str(value)
    return found


def _wandb(project: str, folder: Path, identity: dict[str, str]) -> GeneralTracker:
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_CONSOLE", "off")  # it would take over standard error
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")
    return WandBTracker(project, dir=str(folder), id=identity["id"], name=folder.name, resume="allow")


def _mlflow(project: str, folder: Path, identity: dict[str, str]) -> GeneralTracker:
    """In a database of the run, as MLflow's store of files is no more, and its artefacts beside it."""
    artefacts = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        (folder / "mlflow").mkdir(exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
        artefacts = (folder / "mlflow" / "artifacts").as_uri()
    return MLflowTracker(project, logging_dir=artefacts, run_id=identity.get("mlflow"), run_name=folder.name)


def _trackio(project: str, folder: Path, identity: dict[str, str]) -> GeneralTracker:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
    return TrackioTracker(project, name=f"{folder.name}-{identity['id']}", resume="allow")


_MAKE = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"

"""Which extra of the package brings what a command misses."""

import importlib.util

_OF_TRAINING = "gpu"
EXTRAS = {
    "ray": "ray",
    "sklearn": "report",
    "umap": "report",
    "plotly": "report",
    "jinja2": "report",
    "markupsafe": "report",
    "threadpoolctl": "report",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "huggingface_hub": "export",
    "wandb": "trackers",
    "mlflow": "trackers",
    "trackio": "trackers",
    **dict.fromkeys(
        (
            "torch",
            "torchvision",
            "nvidia",
            "timm",
            "accelerate",
            "deepspeed",
            "transformers",
            "webdataset",
            "faiss",
            "tyro",
            "safetensors",
            "tensorboard",
        ),
        _OF_TRAINING,
    ),
}
"""By the name that is imported."""


def missing(error: ModuleNotFoundError) -> str | None:
    """What to install, in words; None where the module is not of a package that an extra brings."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(module)
    if extra is None or (module == "nvidia" and importlib.util.find_spec("nvidia.dali") is not None):
        return None
    other = " (or facescale[cpu] on a machine without a GPU)" if extra == _OF_TRAINING else ""
    return f"this needs {error.name}, which is not installed: pip install 'facescale[{extra}]'{other}"

"""ONNX: one file, any batch size, checked against the network in onnxruntime."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.config import ExportedConfig
from trainer.export.network import INPUT, OUTPUT, Exported, check, new_folder
from trainer.model import Embedder

FILE = "model.onnx"
OPSET = 18
NEEDS = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raises ValueError where a package that this format needs is not installed."""
    if missing := [name for name in NEEDS if find_spec(name) is None]:
        raise ValueError(
            f"export: onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'facescale[export]'"
        )


def write(model: Embedder, config: ExportedConfig, out: Path) -> float:
    """Writes OUT/model.onnx: float32 `images`, shape (batch, 3, H, W), in [0, 255], to unit-norm `embeddings`, (batch, d).

    Its metadata has the config under `facescale`.

    Returns:
        the largest difference from the network, of an embedding's component.
    Raises:
        ValueError: `out` exists and is not empty, a package is missing, the network has an operation that ONNX has not, or the
            file does not give what the network gives.
    """
    check_packages()
    import onnxruntime

    with new_folder(out) as folder:
        _save(model, config, folder / FILE)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

        return check(FILE, run, model)


def _save(model: Embedder, config: ExportedConfig, path: Path) -> None:
    from torch.onnx.errors import OnnxExporterError

    example = torch.zeros(2, 3, model.image_size, model.image_size)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                Exported(model),
                (example,),
                dynamo=True,
                dynamic_shapes={INPUT: {0: "batch"}},
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
    except OnnxExporterError as error:
        said = str(error.__cause__ or error).strip().splitlines()[0][:300]
        raise ValueError(f"export: {config.model.trunk} cannot be written as ONNX: {said}") from None
    assert program is not None, "torch.onnx.export gives a program with dynamo=True"
    program.model.metadata_props["facescale"] = config.json()
    program.model.producer_name = "facescale"
    program.save(path, external_data=False)

"""What the report says of a run in words."""

from types import SimpleNamespace

from trainer.evaluation.report.notes import training


def test_the_network_is_told_with_its_size():
    """resnet18 has 11,176,512 parameters without its classifier and 1.814 x 10^9 multiply-adds at 224 px; the head 512 x 64."""
    log = [{"step": 5, "images_seen": 40, "images_per_s": 2.0, "data_wait_percent": 0.0}]
    config = {"model": {"trunk": "resnet18", "embedding_size": 64, "weights": "gone.pth"}, "data": {"image_size": 224}}
    said = training(SimpleNamespace(config=config, log=log))
    assert said.startswith(
        "Trunk resnet18, 64 dimensions, 11.2 million parameters, 1.81 x 10^9 multiply-adds an image; "
    )
    config["model"]["trunk"] = "of a later version"
    assert training(SimpleNamespace(config=config, log=log)).startswith("Trunk of a later version, 64 dimensions; ")

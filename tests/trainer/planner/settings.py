"""Small clusters and made-up profiles whose right answers can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

from trainer.planner.hardware import Gpu, Network, Storage
from trainer.planner.network import NetworkCost
from trainer.planner.rates import Rates
from trainer.planner.workload import Cluster

GPU = Gpu(
    name="round", half_tflops=100, tf32_tflops=50, fp32_tflops=10, bandwidth_gb_s=1000, memory_gb=10, jpeg_engines=2,
    peer_gb_s=100, peer_latency_s=0, host_gb_s=10, price=2, source="made up",
)  # fmt: skip
NETWORK = Network(gbit_s=80, latency_s=0, link_for_each_gpu=False, source="made up")
STORAGE = Storage(mb_s=1000, reads_per_s=1e9)
COST = NetworkCost(
    parameters=1_000_000, forward_flops=1e9, backward_flops=2e9, saved_bytes=1e6, saved_once_bytes=2e6, traffic_bytes=1e6,
    layers=100,
)  # fmt: skip
RATES = Rates(
    flops_per_s=3e13, bytes_per_s=1e12, traffic_bytes_per_s=1e12, mining_s=1e-12, weight_bytes=0, plan_s=1e-6,
    source="made up",
)  # fmt: skip


def cluster(**changes: Any) -> Cluster:
    """Two machines of four round GPUs."""
    given: dict[str, Any] = {"gpu": GPU, "network": NETWORK, "storage": STORAGE, "gpus_per_node": 4, "nodes": 2}
    return Cluster(**(given | {"cores_per_node": 40} | changes))


PROFILE: dict[str, Any] = {
    "machine": {"cores": 2},
    "device": "cpu",
    "ranks": 2,
    "image_size": 32,
    "images_per_rank": 16,
    "p": 8,
    "k": 4,
    "embedding_size": 8,
    "trunk": "resnet18",
    "precision": "fp32",
    "steps": 10,
    "step_s": {"median": 0.5, "lower_quartile": 0.5, "upper_quartile": 0.5},
    "images_per_s": 64.0,
    "critical_path_s": {
        "wait": 0.01,
        "copy": 0.001,
        "forward": 0.12,
        "gather_mining_loss": 0.01,
        "backward": 0.28,
        "all_reduce_exposed": 0.04,
        "optimizer": 0.03,
        "other": 0.009,
    },
    "all_reduce_total_s": 0.1,
    "loader": {
        "cpu_s_per_image": {"plan_and_bytes": 5e-5, "decode": 4e-4},
        "images_per_s": 2000.0,
        "threads": 1,
        "mean_picture_bytes": 6000.0,
        "mean_picture_pixels": 25600.0,
    },
    "peak_memory_bytes": 900_000_000,
}


def write_profile(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(PROFILE | changes))
    return path

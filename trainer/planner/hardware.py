"""GPUs, networks and storage as data: vendors' peak figures, and assumptions where nobody publishes one (each says so)."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp32"]

PRICES_ASSUMED = "assumed on 2026-11-25, no quote: give --price"
NVLINK_LATENCY_S, PCIE_LATENCY_S = 3e-6, 10e-6
"""Assumed, of one hop of a collective within a machine."""


@dataclass(kw_only=True, frozen=True)
class Gpu:
    """One accelerator. Peaks are those of dense matrices; what a network attains of them is in `utilisation`."""

    name: str
    half_tflops: float
    """fp16 or bf16 on tensor cores with fp32 sums; 0 where there are none."""
    fp32_tflops: float
    """Without tensor cores."""
    tf32_tflops: float = 0.0
    """What PyTorch's float32 convolutions use from Ampere on (torch.backends.cudnn.allow_tf32); 0 where there is none."""
    bf16: bool = True
    """Whether facescale trains in bf16 there (compute capability 8.0 and later); it does not offer fp16."""
    bandwidth_gb_s: float
    """Of the GPU's memory."""
    memory_gb: float
    """10^9 bytes."""
    jpeg_engines: int = 0
    """Cores of the hardware JPEG decoder."""
    peer_gb_s: float
    """To the other GPUs of the machine, in one direction."""
    peer_latency_s: float = NVLINK_LATENCY_S
    host_gb_s: float
    """From the machine's memory, in one direction."""
    price: float
    """Assumed, per GPU and hour, in any currency; see PRICES_ASSUMED."""
    source: str

    def peak_flops(self, precision: Precision) -> float:
        """FLOP/s, of the unit that convolutions of this precision use."""
        if precision == "bf16":
            return 1e12 * self.half_tflops
        return 1e12 * (self.tf32_tflops or self.fp32_tflops)

    def family(self, precision: Precision) -> str:
        """Which fitted utilisation applies."""
        if precision == "bf16":
            return "half"
        return "tf32" if self.tf32_tflops else "fp32"


_PCIE3, _PCIE4, _PCIE5 = 12.0, 25.0, 50.0
"""GB/s of 16 lanes as copies attain them, some 0.8 of the line rate (assumed)."""

GPUS: dict[str, Gpu] = {
    "p100": Gpu(
        name="Tesla P100 SXM2 16 GB", half_tflops=0, fp32_tflops=10.6, bf16=False, bandwidth_gb_s=732, memory_gb=17.1,
        peer_gb_s=80, host_gb_s=_PCIE3, price=0.4, source="NVIDIA Tesla P100 data sheet (published checks alone)",
    ),
    "v100": Gpu(
        name="Tesla V100 SXM2 32 GB", half_tflops=125, fp32_tflops=15.7, bf16=False, bandwidth_gb_s=900, memory_gb=34.3,
        peer_gb_s=150, host_gb_s=_PCIE3, price=0.8, source="NVIDIA V100 data sheet",
    ),
    "t4": Gpu(
        name="T4", half_tflops=65, fp32_tflops=8.1, bf16=False, bandwidth_gb_s=320, memory_gb=16.1,
        peer_gb_s=_PCIE3, host_gb_s=_PCIE3, price=0.35, source="NVIDIA T4 data sheet", peer_latency_s=PCIE_LATENCY_S,
    ),
    "a100-40": Gpu(
        name="A100 SXM4 40 GB", half_tflops=312, tf32_tflops=156, fp32_tflops=19.5, bandwidth_gb_s=1555, memory_gb=42.4,
        jpeg_engines=5, peer_gb_s=300, host_gb_s=_PCIE4, price=1.3, source="NVIDIA A100 data sheet and white paper",
    ),
    "a100": Gpu(
        name="A100 SXM4 80 GB", half_tflops=312, tf32_tflops=156, fp32_tflops=19.5, bandwidth_gb_s=2039, memory_gb=85.0,
        jpeg_engines=5, peer_gb_s=300, host_gb_s=_PCIE4, price=1.8, source="NVIDIA A100 data sheet and white paper",
    ),
    "h100": Gpu(
        name="H100 SXM5 80 GB", half_tflops=989.4, tf32_tflops=494.7, fp32_tflops=66.9, bandwidth_gb_s=3350,
        memory_gb=85.0, jpeg_engines=7, peer_gb_s=450, host_gb_s=_PCIE5, price=2.5,
        source="NVIDIA H100 data sheet and white paper; JPEG engines: MIG user guide",
    ),
    "h100-pcie": Gpu(
        name="H100 PCIe 80 GB", half_tflops=756, tf32_tflops=378, fp32_tflops=51.2, bandwidth_gb_s=2039, memory_gb=85.0,
        jpeg_engines=7, peer_gb_s=_PCIE5, host_gb_s=_PCIE5, price=2.0, source="NVIDIA H100 data sheet",
        peer_latency_s=PCIE_LATENCY_S,
    ),
    "h200": Gpu(
        name="H200 SXM 141 GB", half_tflops=989.4, tf32_tflops=494.7, fp32_tflops=66.9, bandwidth_gb_s=4800,
        memory_gb=150.0, jpeg_engines=7, peer_gb_s=450, host_gb_s=_PCIE5, price=3.0, source="NVIDIA H200 data sheet",
    ),
    "b200": Gpu(
        name="B200 SXM 180 GB", half_tflops=2250, tf32_tflops=1125, fp32_tflops=75, bandwidth_gb_s=8000, memory_gb=192.0,
        jpeg_engines=7, peer_gb_s=900, host_gb_s=_PCIE5, price=5.0, source="NVIDIA HGX B200 data sheet, halved from sparse",
    ),
    "l4": Gpu(
        name="L4", half_tflops=121, tf32_tflops=60, fp32_tflops=30.3, bandwidth_gb_s=300, memory_gb=24.0, jpeg_engines=4,
        peer_gb_s=_PCIE4, host_gb_s=_PCIE4, price=0.6, source="NVIDIA L4 data sheet, halved from sparse",
        peer_latency_s=PCIE_LATENCY_S,
    ),
    "l40s": Gpu(  # its JPEG engines: none counted, their number is not certain
        name="L40S", half_tflops=362, tf32_tflops=183, fp32_tflops=91.6, bandwidth_gb_s=864, memory_gb=48.3,
        peer_gb_s=_PCIE4, host_gb_s=_PCIE4, price=1.0, source="NVIDIA L40S data sheet", peer_latency_s=PCIE_LATENCY_S,
    ),
    "rtx4090": Gpu(
        name="GeForce RTX 4090", half_tflops=165.2, tf32_tflops=82.6, fp32_tflops=82.6, bandwidth_gb_s=1008,
        memory_gb=25.7, peer_gb_s=_PCIE4, host_gb_s=_PCIE4, price=0.45, source="NVIDIA Ada white paper, appendix",
        peer_latency_s=PCIE_LATENCY_S,
    ),
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class Network:
    """What joins machines."""

    gbit_s: float
    """Of one link."""
    latency_s: float
    """Assumed, of one hop of a collective."""
    link_for_each_gpu: bool
    """As in DGX machines (InfiniBand); else one link for each machine."""
    source: str


NETWORKS: dict[str, Network] = {
    "ethernet10": Network(gbit_s=10, latency_s=50e-6, link_for_each_gpu=False, source="IEEE 802.3ae; TCP"),
    "ethernet25": Network(gbit_s=25, latency_s=50e-6, link_for_each_gpu=False, source="IEEE 802.3by; TCP"),
    "ethernet50": Network(gbit_s=50, latency_s=50e-6, link_for_each_gpu=False, source="IEEE 802.3cd; TCP"),
    "ethernet100": Network(gbit_s=100, latency_s=30e-6, link_for_each_gpu=False, source="IEEE 802.3bj; RoCE or TCP"),
    "hdr": Network(gbit_s=200, latency_s=5e-6, link_for_each_gpu=True, source="InfiniBand HDR, as in DGX A100"),
    "ndr": Network(gbit_s=400, latency_s=5e-6, link_for_each_gpu=True, source="InfiniBand NDR, as in DGX H100"),
}


@dataclass(kw_only=True, frozen=True)
class Storage:
    """Where shards lie, for each machine. All figures are typical ones, assumed: give --storage-mb-s."""

    mb_s: float
    """10^6 bytes a second, many reads under way."""
    reads_per_s: float
    """Of single pictures at random places; facescale picks each picture by its place in a tar."""


STORAGE: dict[str, Storage] = {
    "ram": Storage(mb_s=10_000, reads_per_s=5e6),
    "nvme": Storage(mb_s=3_000, reads_per_s=500_000),
    "sata-ssd": Storage(mb_s=500, reads_per_s=75_000),
    "disk": Storage(mb_s=180, reads_per_s=150),
    "nfs": Storage(mb_s=1_000, reads_per_s=20_000),
    "object-store": Storage(mb_s=1_000, reads_per_s=3_000),
}

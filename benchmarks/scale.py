"""A rank of 1,024, on one machine: its slice of the plan, the messages that its step sends, the memory that its step takes.

    python benchmarks/scale.py [--ranks 8 64 256 1024] [--out benchmarks/results/scale.json]

Every row is a process of its own that believes itself to be the last rank of that many, in PyTorch's fake process group: the real
plan, the real `TrainStep`, ResNet-50 at 112 px, 64 images a rank, 128 dimensions, K = 4. No message leaves the process: what
would be sent is counted, and what would come back from a gather is made up of other identities. Times of messages are not
measured. The plan is over 42 million pictures of 500,000 identities, whose sizes are drawn.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import machine, memory, reset_peak  # noqa: E402

IMAGES, IMAGES_OF_ONE, SIZE, MIB = 64, 4, 112, 2**20


def last_rank_of(ranks: int) -> dict[str, Any]:
    """Messages in MiB a step and rank, seconds, MiB of memory; and whether all ranks' slices make up the global batch."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn.functional import normalize
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from data_shards.loader import Batch
    from data_shards.plan import Plan, PlanConfig
    from trainer import collectives
    from trainer.config import TrainConfig
    from trainer.engine import PlainEngine
    from trainer.model import Embedder
    from trainer.precision import use_bf16
    from trainer.train import make_optimizer
    from trainer.train_step import TrainStep, make_pool, objective_of

    plan_config = PlanConfig(identities_per_batch=ranks * IMAGES // IMAGES_OF_ONE, images_per_identity=IMAGES_OF_ONE)
    sizes = np.random.default_rng(0).gamma(1.5, 56, 500_000).astype(np.int64) + 2
    starts = np.concatenate([[0], np.cumsum(sizes)])
    before = memory("VmRSS")
    begun = time.perf_counter()
    plan = Plan(starts, plan_config, seed=0)
    plan.batch(0, ranks - 1, ranks)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    for step in range(1, 21):
        plan.batch(step, ranks - 1, ranks)
    later = (time.perf_counter() - begun) / 20
    plan_mib = memory("VmRSS") - before
    whole = plan.global_batch(5).samples
    slices = np.concatenate([plan.batch(5, rank, ranks).samples for rank in range(ranks)])

    dist.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    messages: dict[str, float] = {}
    labels = (torch.arange(ranks)[:, None] * IMAGES + torch.arange(IMAGES) // IMAGES_OF_ONE).view(-1, 1)  # int64
    others = torch.cat([normalize(torch.randn(len(labels), 128)), labels.view(torch.float32)], 1)

    def gather(out: torch.Tensor, mine: torch.Tensor) -> None:
        messages["gathered"] = out.nbytes / MIB
        out.copy_(others)
        out[-IMAGES:] = mine

    def scatter(out: torch.Tensor, gradient: torch.Tensor) -> None:
        messages["gradient of the gathered, summed and scattered"] = gradient.nbytes / MIB
        out.copy_(gradient[-IMAGES:])

    def reduce(value: torch.Tensor) -> None:
        messages["sums"] = value.nbytes / MIB

    collectives.dist.all_gather_single = gather  # type: ignore[assignment]
    collectives.dist.reduce_scatter_single = scatter  # type: ignore[assignment]
    collectives.dist.all_reduce = reduce  # type: ignore[assignment]
    config = TrainConfig(plan=plan_config)
    model = Embedder(config.model, use_bf16("auto", torch.device("cpu"))).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config.optimizer)
    identities = (ranks - 1) * IMAGES + torch.arange(IMAGES) // IMAGES_OF_ONE
    pictures = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = Batch(pictures, identities, torch.arange(IMAGES))
    step_of = TrainStep(PlainEngine(model, optimizer), config)
    step_of(batch)
    held = reset_peak()
    step_of(batch)
    step_peak = memory("VmHWM") - held

    objective = objective_of(config)
    embeddings = normalize(torch.randn(IMAGES, config.model.embedding_size)).requires_grad_()

    def exchange() -> None:
        gathered = collectives.gather_labelled(embeddings, identities)
        objective(make_pool(embeddings, identities, gathered), IMAGES_OF_ONE).total.backward()

    exchange()
    held, seconds = reset_peak(), []
    for _ in range(5):
        begun = time.perf_counter()
        exchange()
        seconds.append(time.perf_counter() - begun)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    return {
        "ranks": ranks,
        "global_batch": plan_config.batch_size,
        "slices_are_the_batch": bool((slices == whole).all() and len(whole) == ranks * IMAGES),
        "plan": {"first_batch_s": first, "batch_ms": 1000 * later, "mib": plan_mib},
        "messages_mib": {name: round(size, 4) for name, size in messages.items()}
        | {"gradients of the weights": weights},
        "step_peak_mib": step_peak,
        "exchange_peak_mib": memory("VmHWM") - held,
        "exchange_ms": 1000 * min(seconds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| ranks | global batch | plan: first batch, s | a batch, ms | MiB | gathered, MiB | its gradient, MiB "
        "| weights' gradients, MiB | gather + mining + loss, ms | its peak, MiB | peak of the step, MiB |",
        "|" + "---:|" * 11,
    ]
    for row in rows:
        messages, plan = row["messages_mib"], row["plan"]
        cells = [
            f"{row['ranks']:,}",
            f"{row['global_batch']:,}",
            f"{plan['first_batch_s']:.1f}",
            f"{plan['batch_ms']:.1f}",
        ]
        cells += [f"{plan['mib']:.0f}", f"{messages['gathered']:.2f}"]
        cells += [f"{messages['gradient of the gathered, summed and scattered']:.2f}"]
        cells += [f"{messages['gradients of the weights']:.0f}", f"{row['exchange_ms']:.0f}"]
        cells += [f"{row['exchange_peak_mib']:.0f}", f"{row['step_peak_mib']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scale.json")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(last_rank_of(args.one)))
        return 0
    rows = []
    for ranks in args.ranks:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(ranks)], stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    args.out.write_text(json.dumps({"machine": machine("torch"), "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which triplets to train with: Rank-1 on unseen identities after equally many images, several seeds, a table and a plot.

    python benchmarks/ablation.py [--shards demo/shards] [--seeds 3] [--steps 200] [--only NAME ...] [--out results.json]

Two processes on the CPU, ResNet-18 at 48 px from random weights, P x K = 24 x 4, AdamW 3e-3. The original project trained on
random triplets of embeddings of length 10, so that its margins 0.2, 0.7, 1.7 and 1.9 are 0.02 to 0.19 of unit-norm embeddings.
Runs that are in the results file already are not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ARCFACE = "--softmax.kind arcface --softmax.scale 16"
SETTINGS = {
    "smooth (the default)": "--loss.kind smooth --loss.margin 0.1",
    "smooth, own rank": "--loss.kind smooth --loss.margin 0.1 --loss.candidates own_rank",
    "batch-hard, soft margin": "--loss.kind soft_margin",
    "batch-hard, soft margin, own rank": "--loss.kind soft_margin --loss.candidates own_rank",
    "batch-hard, margin 0.2": "--loss.kind margin --loss.margin 0.2",
    "hardest-semi-hard, margin 0.2": "--loss.kind margin --loss.mining hardest_semi_hard --loss.margin 0.2",
    "semi-hard, margin 0.2": "--loss.kind margin --loss.mining semi_hard --loss.margin 0.2",
    "batch-all, margin 0.2": "--loss.kind margin --loss.mining batch_all --loss.margin 0.2",
    "distance-weighted, margin 0.2": "--loss.kind margin --loss.mining distance_weighted --loss.margin 0.2",
    "ArcFace alone": "--softmax.kind arcface --softmax.triplet-weight 0",
    "ArcFace alone, scale 16": f"{ARCFACE} --softmax.triplet-weight 0",
    "CosFace alone, scale 16": "--softmax.kind cosface --softmax.scale 16 --softmax.triplet-weight 0",
    "AdaFace alone, scale 16": "--softmax.kind adaface --softmax.scale 16 --softmax.triplet-weight 0",
    "ArcFace alone, scale 16, a third of the centres": f"{ARCFACE} --softmax.triplet-weight 0 --softmax.sample-rate 0.33",
    "ArcFace for 50 steps, then batch-hard": f"{ARCFACE} --loss.kind soft_margin --softmax.weight 0 --softmax.warmup-steps 50",
    "batch-hard + 0.1 ArcFace": f"{ARCFACE} --loss.kind soft_margin --softmax.weight 0.1",
    "smooth + 0.1 ArcFace": f"{ARCFACE} --loss.kind smooth --loss.margin 0.1 --softmax.weight 0.1",
    "contrastive, margin 1": "--loss.kind contrastive --loss.margin 1",
    "random triplets, 0.2 at length 10": "--loss.kind margin --loss.mining random --loss.margin 0.02",
    "random triplets, 0.7 at length 10": "--loss.kind margin --loss.mining random --loss.margin 0.07",
    "random triplets, 1.7 at length 10": "--loss.kind margin --loss.mining random --loss.margin 0.17",
    "random triplets, 1.9 at length 10": "--loss.kind margin --loss.mining random --loss.margin 0.19",
}
COMMON = (
    "--data.image-size 48 --plan.identities-per-batch 24 --plan.images-per-identity 4 --model.trunk resnet18 "
    "--augment.mirror 0 --augment.crop-area 0.85 1 --augment.brightness 0.05 --augment.contrast 0.05 "
    "--augment.saturation 0.05 --augment.greyscale 0 --optimizer.learning-rate 3e-3 --optimizer.warmup-steps 20 "
    "--run.evaluate-images 2000 --run.checkpoint-every 100000 --run.no-tensorboard --guard.action warn"
)


def trained(name: str, shards: Path, seed: int, steps: int) -> dict[str, float]:
    """The last evaluation of a run, and the last line of its log."""
    with tempfile.TemporaryDirectory(prefix="facescale-ablation-") as folder:
        run = Path(folder, "run")
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        command += ["--config_file", "launch/accelerate/cpu.yaml", "--num_processes", "2", "-m", "trainer.train"]
        command += [*COMMON.split(), *SETTINGS[name].split(), "--data.shards", str(shards), "--run.folder", str(run)]
        command += ["--run.seed", str(seed), "--run.steps", str(steps), "--run.evaluate-every", str(steps)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        found: dict[str, float] = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
        last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    return {name: found[name] for name in ("rank1", "rank5", "knn")} | {
        name: last[name] for name in ("loss", "d_ap", "d_an", "embedding_spread", "effective_rank")
    }


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in SETTINGS if name in results]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names) + 1.2), layout="constrained")
    for row, name in enumerate(reversed(names)):
        values = [100 * run["rank1"] for run in results[name].values()]
        colour = "#0072B2" if "own rank" not in name and "random" not in name else "#D55E00"
        axes.barh(row, statistics.mean(values), color=colour, alpha=0.35, height=0.7)
        axes.plot(values, [row] * len(values), "o", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), reversed(names))
    axes.set_xlabel("Rank-1 on unseen identities, % (bars: mean; dots: seeds)")
    axes.set_xlim(0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| trained with | Rank-1, % | seeds | Rank-5, % | spread | effective rank |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name in SETTINGS:
        if runs := list(results.get(name, {}).values()):
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            each = ", ".join(f"{100 * run['rank1']:.1f}" for run in runs)
            lines.append(
                f"| {name} | {100 * mean['rank1']:.1f} | {each} | {100 * mean['rank5']:.1f} | "
                f"{mean['embedding_spread']:.2f} | {mean['effective_rank']:.1f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=ROOT / "demo" / "shards")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json", help="results; the plot lies beside it")
    args = parser.parse_args()
    path = args.out
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {}
    for seed in range(args.seeds):
        for name in args.only:
            runs = results.setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = trained(name, args.shards, seed, args.steps)
                path.write_text(json.dumps(results, indent=1) + "\n")
                print(name, seed, runs[str(seed)], flush=True)
    print(table(results))
    plot(results, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

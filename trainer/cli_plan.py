"""`facescale plan`: what a cluster would train at, on the command line."""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.planner.calibration import Profile
    from trainer.planner.capacity import Capacity
    from trainer.planner.workload import Cluster, Workload

ADD = Callable[..., argparse.ArgumentParser]


def add_plan(add: ADD) -> None:
    text = "Predict pace, limit, memory, cost and scaling of training on a cluster, before renting it; see launch/README.md."
    parser = add("plan", text, _plan)
    _add_cluster(parser.add_argument_group("cluster"))
    _add_workload(
        parser.add_argument_group("workload", "defaults are those of the profile, where --calibrate gives one")
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--shards", type=Path, metavar="DIR", help="take images, identities and sizes from this set")
    text = "profile.json of `facescale profile`: predict from what this machine attained"
    group.add_argument("--calibrate", type=Path, metavar="FILE", help=text)
    text = (
        "of a GPU's pace: share of its peak arithmetic, or of its bandwidth where that gives less; not with --calibrate"
    )
    group.add_argument("--basis", choices=("arithmetic", "cautious"), default="arithmetic", help=text)
    group.add_argument(
        "--check", action="store_true", help="print the predictions for published figures, and their errors"
    )
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for plan.json and plan.png; made where it is not there"
    )


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    from trainer.planner.hardware import GPUS, NETWORKS, STORAGE

    text = "cpu needs --calibrate; h100 if not given, or cpu with a CPU's profile"
    group.add_argument("--gpu", choices=(*GPUS, "cpu"), help=text)
    group.add_argument("--gpus-per-node", type=int, help="8 if not given; on a CPU: ranks, as profiled")
    group.add_argument("--nodes", type=int, default=1, help="machines")
    group.add_argument(
        "--network", choices=tuple(NETWORKS), help="between machines; ndr if not given, on CPUs ethernet10"
    )
    group.add_argument(
        "--links-per-node", type=int, help="of that network; if not given one a GPU (hdr, ndr) or one (ethernet)"
    )
    group.add_argument("--storage", choices=tuple(STORAGE), default="nvme", help="where each machine reads its shards")
    group.add_argument("--storage-mb-s", type=float, help="measured, in place of what is assumed for --storage")
    group.add_argument("--cores-per-node", type=int, help="CPU cores; 12 a GPU if not given; on a CPU: as profiled")
    group.add_argument("--decode", choices=("cpu", "gpu"), help="where JPEGs are decoded; on the GPU if there is one")
    group.add_argument("--jpeg-per-s", type=float, help="pictures that one GPU decodes a second; assumed if not given")
    group.add_argument("--price", type=float, help="per GPU and hour; assumed if not given")


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trunk", help="as model.trunk, with its auto head; resnet50 if not given")
    group.add_argument("--image-size", type=int, help="pixels; 112 if not given")
    group.add_argument("--p", type=int, help="identities in the global batch; 64 if not given")
    group.add_argument("--k", type=int, help="images of each; 4 if not given")
    group.add_argument("--dim", type=int, help="d; 128 if not given")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="as run.precision")
    group.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="as optimizer.kind")
    group.add_argument("--micro-batch", type=int, help="as run.micro_batch: images of a rank at once; all if not given")
    group.add_argument("--images", type=int, help="of the training split; VGGFace2's if not given")
    group.add_argument("--identities", type=int, help="of the training split; VGGFace2's if not given")
    group.add_argument("--picture-size", metavar="WxH", help="mean size of the stored pictures; 137x180 if not given")
    group.add_argument("--picture-bytes", type=float, help="mean size of their files; 15000 if not given")
    group.add_argument("--epochs", type=int, default=20, help="for the whole time and cost")
    group.add_argument(
        "--target-shard-mb", type=float, default=268.4, help="10^6 bytes of a shard, as `facescale shard` cuts"
    )


def _plan(args: argparse.Namespace) -> int:
    import json

    from trainer.planner.published import check
    from trainer.planner.report import as_json, published, text

    capacity = capacity_of(args)
    checks = check() if args.check else ()
    found = as_json(capacity, checks)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print(text(capacity))
        if checks:
            print(f"\nPublished checks\n{published(checks)}")
    if args.out is not None:
        _write(capacity, found, args.out, quiet=args.json)
    return 0


def _write(capacity: "Capacity", found: dict[str, Any], out: Path, quiet: bool) -> None:
    import json

    from trainer.planner.figure import write_png

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out is {out}, which is a file; it must be a folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(found, indent=1) + "\n")
    write_png(capacity, out / "plan.png")
    if not quiet:
        print(f"\nPlan: {out / 'plan.json'}; picture: {out / 'plan.png'}")


def capacity_of(args: argparse.Namespace) -> "Capacity":
    """The plan that the options ask for.

    Raises:
        ValueError: an option is not allowed, or two do not go together; the line names them.
    """
    from trainer.planner.calibration import calibrated, read_profile
    from trainer.planner.capacity import plan
    from trainer.planner.dataset import estimate, read_shards
    from trainer.planner.rates import gpu_rates

    profile = read_profile(args.calibrate) if args.calibrate else None
    cluster = _cluster(args, profile)
    found = read_shards(args.shards) if args.shards else None
    known = vars(found) if found else {}
    job = _workload(args, profile, cluster, known)
    cautious = None
    if profile is None:
        rates = gpu_rates(cluster.gpu, job.precision, args.basis)
        cautious = gpu_rates(cluster.gpu, job.precision, "cautious")
    else:
        rates = calibrated(profile, cluster.gpu, cluster.gpus_per_node)
        if job.precision != profile.workload.precision:
            raise ValueError(
                f"--precision is {job.precision}; --calibrate was measured in {profile.workload.precision}: allowed is that"
            )
    dataset = found.dataset(job) if found else estimate(job, round(1e6 * args.target_shard_mb))
    return plan(cluster, job, rates, dataset, cautious)


def _cluster(args: argparse.Namespace, profile: "Profile | None") -> "Cluster":
    from trainer.planner.calibration import cpu_device, own_cluster
    from trainer.planner.hardware import GPUS, NETWORKS, STORAGE
    from trainer.planner.workload import Cluster, between

    on_cpu = profile is not None and profile.on_cpu
    name = args.gpu or ("cpu" if on_cpu else "h100")
    if (name == "cpu") != on_cpu or (profile is not None and args.gpu is None and not on_cpu):
        what = profile.device if profile else "not given"
        raise ValueError(
            f"--gpu is {args.gpu}, the device of --calibrate is {what}; allowed is the GPU that was profiled"
        )
    storage = STORAGE[args.storage]
    if args.storage_mb_s is not None:
        between("--storage-mb-s", args.storage_mb_s, 0.1, 10**6)
        storage = replace(storage, mb_s=args.storage_mb_s)
    options = {
        "nodes": args.nodes,
        "network": NETWORKS[args.network or ("ethernet10" if on_cpu else "ndr")],
        "storage": storage,
        "links_per_node": args.links_per_node,
        "price": args.price,
    }
    given = {
        "gpus_per_node": args.gpus_per_node,
        "cores_per_node": args.cores_per_node,
        "decode": args.decode,
        "jpeg_per_s": args.jpeg_per_s,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if profile is not None:
        return replace(own_cluster(profile, cpu_device(profile) if on_cpu else GPUS[name]), **options, **given)
    between("--gpus-per-node", given.setdefault("gpus_per_node", 8), 1, 64)
    given.setdefault("cores_per_node", 12 * given["gpus_per_node"])
    return Cluster(gpu=GPUS[name], **options, **given)


def _workload(
    args: argparse.Namespace, profile: "Profile | None", cluster: "Cluster", known: dict[str, Any]
) -> "Workload":
    from trainer.planner.workload import Workload

    start = profile.workload if profile else Workload(precision="bf16" if cluster.gpu.bf16 else "fp32")
    width, height = _picture_size(args.picture_size) if args.picture_size else (None, None)
    given = {
        "trunk": args.trunk,
        "image_size": args.image_size,
        "p": args.p,
        "k": args.k,
        "embedding_size": args.dim,
        "precision": None if args.precision == "auto" else args.precision,
        "micro_batch": args.micro_batch,
        "images": args.images,
        "identities": args.identities,
        "picture_width": width,
        "picture_height": height,
        "picture_bytes": args.picture_bytes,
    }
    for name in ("images", "identities"):
        if known and given[name] is not None:
            raise ValueError(f"--{name} is {given[name]:,}; with --shards it must not be given, the shards say it")
    names = ("images", "identities", "picture_width", "picture_height", "picture_bytes")
    from_shards = {name: known[name] for name in names if name in known}
    if args.precision == "bf16" and profile is None and not cluster.gpu.bf16:
        raise ValueError(f"--precision is bf16; {cluster.gpu.name} has none: allowed is fp32")
    own = {name: value for name, value in given.items() if value is not None}
    return replace(start, optimizer=args.optimizer, epochs=args.epochs, **(from_shards | own))


def _picture_size(said: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", said)
    if not found:
        raise ValueError(f"--picture-size is {said!r}; it must be like 137x180, width and height in pixels")
    return int(found[1]), int(found[2])

"""Whole networks of adders beside PyTorch's multiplying ones, on this machine's CPU.

    pip install "jadder[bench]"
    python -m benchmarks.torch                                      # ResNet-20, batch 128
    python -m benchmarks.torch --network vit                        # AdderViT beside a SimpleViT
    python -m benchmarks.torch --network resnet18 --size 224 --batch 8

A step is forward, backward and SGD; "inference" is the forward pass with running statistics.
PyTorch runs channels last, eager and compiled (`torch.compile`, where it finds a compiler), and in
a process of its own; so does JAX, the adder networks and the multiplying twin. Each uses all
processors that this process may use, and only one of them runs at a time: in each round every
program has a turn of some calls, of which the first is not timed. Both processes have memory in
huge pages (glibc's tunable) unless --small-pages. A figure is the minimum over all calls, and the
median in brackets; ratios are to PyTorch's eager program, and to the faster of its two.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processor import processor
from benchmarks.torch.turns import Process, Workload, in_turns

MODULES = {"PyTorch": "benchmarks.torch.multiplying", "JAX": "benchmarks.torch.adding"}
NETWORKS = ("resnet20", "resnet18", "vit")
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of programs, and writes the figures as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", default="resnet20", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=128, help="images at once")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image")
    parser.add_argument("--programs", nargs="+", choices=("step", "inference"),
                        default=["step", "inference"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=12, help="of a turn of each program")
    parser.add_argument("--seconds", type=float, default=0.5, help="about what a turn takes")
    parser.add_argument("--small-pages", action="store_true", help="as glibc maps them by itself")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")
    if min(args.batch, args.size, args.rounds) < 1:
        parser.error("--batch, --size and --rounds must be positive")

    workload = Workload(args.network, args.batch, args.size, tuple(args.programs))
    environment = {} if args.small_pages else huge_pages(os.environ)
    processes = {name: Process(module, workload, environment) for name, module in MODULES.items()}
    try:
        about = {
            **vars(args),
            "processor": processor(),
            "processes": {name: process.about for name, process in processes.items()},
        }
        print(f"{args.network}, batch {args.batch}, {args.size} pixels: {about['processor']}")
        for name, process in processes.items():
            print(f"{name}: {json.dumps(process.about)}", flush=True)
        times = in_turns(processes, args.rounds, args.seconds)
    finally:
        for process in processes.values():
            process.close()
    rows = summary(times)
    print(f"\n{'':32}{'ms':>8}{'(median)':>10}{'/ eager':>9}{'/ best':>8}")
    for row in rows:
        print(
            f"{row['system'] + ': ' + row['program']:32}{row['ms']:8.1f}{row['median']:10.1f}"
            f"{row['ratio']:9.2f}{row['best_ratio']:8.2f}",
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """What has glibc ask for huge pages, unless other tunables are set."""
    given = environment.get("GLIBC_TUNABLES")
    return {} if given else {"GLIBC_TUNABLES": HUGE_PAGES}


def summary(times: Mapping[tuple[str, str], Sequence[float]]) -> list[dict[str, Any]]:
    """A row for each program, with its least and median milliseconds and its ratios to PyTorch's.

    Example:
      >>> times = {("PyTorch", "step, eager"): [0.2, 0.4], ("JAX", "step, adder"): [0.1]}
      >>> [(row["ms"], row["ratio"]) for row in summary(times)]
      [(200.0, 1.0), (100.0, 0.5)]
    """
    least = {key: min(seconds) for key, seconds in times.items()}
    rows = []
    for (system, program), seconds in times.items():
        kind = program.split(",")[0]
        ways = {way: least.get(("PyTorch", f"{kind}, {way}")) for way in ("eager", "compiled")}
        eager = ways["eager"]
        assert eager is not None
        best = min(value for value in ways.values() if value is not None)
        rows.append({
            "system": system,
            "program": program,
            "ms": 1e3 * least[system, program],
            "median": 1e3 * statistics.median(seconds),
            "calls": len(seconds),
            "ratio": least[system, program] / eager,
            "best_ratio": least[system, program] / best,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()

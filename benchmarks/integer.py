"""Speed of integer programs, beside the multiplying twin in ONNX Runtime and float32 networks.

    pip install "jadder[bench]"
    python -m benchmarks.integer                                    # ResNet-20, 32 × 32
    python -m benchmarks.integer --model resnet18 --size 224 --batches 1 8

The adder network and its conv twin have random parameters, with the batch statistics of random
images. Each becomes a program of bytes (`jadder.quantize`); the twin becomes an ONNX graph too,
with its batch norms folded, in float32 and in int8 as ONNX Runtime quantises it (static, QDQ, uint8
activations, int8 weights for each channel). "float" is jadder's float32 network under `jax.jit`.

All run in one process with as many threads as it may use processors, in turns. Both runtimes' idle
threads spin for a while after a call, which would take processors from the other: so a turn begins
with a pause and a call that is not timed, and then times several. ONNX Runtime gets normalised
float32 images in its own order of dimensions, jadder's programs the pixels. A figure is images/s,
from the minimum over all rounds, and the median in brackets.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from flax import nnx

import jadder
from benchmarks import onnx_twin
from benchmarks.processor import processor
from jadder import models
from jadder.integer import native
from jadder.models import BatchNorm, ResNet

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BASELINE = "onnxruntime int8"

Call = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each batch size, and writes the figures as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    resnets = [name for name in models.names() if name.startswith("resnet")]
    parser.add_argument("--model", default="resnet20", choices=resnets)
    parser.add_argument("--size", type=int, default=32, help="height and width of an image")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=12, help="of turns")
    parser.add_argument("--seconds", type=float, default=0.1, help="about what a turn takes")
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "model": args.model, "size": args.size, "processor": processor(), "threads": threads,
        "instructions": native.instruction_set(), "jax": jax.__version__,
        "onnxruntime": onnxruntime.__version__, "rounds": args.rounds,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        systems = make_systems(args.model, args.size, threads or 1, Path(folder))
    rows = []
    for batch in args.batches:
        pixels = random_pixels(batch, args.size, seed=batch)
        chosen = {
            name: system(pixels)
            for name, system in systems.items()
            if args.only in name or name == BASELINE
        }
        times = in_turns(chosen, args.rounds, args.seconds)
        print(f"\nbatch {batch:4}             images/s  (median)   / {BASELINE}")
        for name, seconds in times.items():
            row = {
                "batch": batch,
                "system": name,
                "images_per_second": batch / min(seconds),
                "median": batch / statistics.median(seconds),
                "ratio": min(times[BASELINE]) / min(seconds),
                "median_ratio": statistics.median(times[BASELINE]) / statistics.median(seconds),
            }
            rows.append(row)
            print(
                f"{name:22}{row['images_per_second']:10.0f} {row['median']:9.0f}"
                f"     {row['ratio']:5.2f} ({row['median_ratio']:.2f})",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)


def make_systems(
    name: str, size: int, threads: int, folder: Path
) -> dict[str, Callable[[Any], Call]]:
    """For each system, from uint8 pixels (batch, size, size, 3) to what is timed."""
    calibration = random_pixels(128 if size < 100 else 32, size, seed=0)
    floats = normalized(calibration)
    systems: dict[str, Callable[[Any], Call]] = {}
    for family in ("adder", "conv"):
        model = random_network(name, family, floats)
        program = jadder.quantize(model, calibration, mean=MEAN, std=STD)
        systems[f"{family} program"] = _jax_system(program, lambda pixels: pixels)
        graphdef, state = nnx.split(model)

        def network(x: Any, graphdef: Any = graphdef, state: Any = state) -> Any:
            return nnx.merge(graphdef, state)(x)

        systems[f"{family} float"] = _jax_system(jax.jit(network), normalized)
        if family == "conv":
            onnx_twin.export(model, size, folder / "float.onnx")
    images = floats.transpose(0, 3, 1, 2)
    onnx_twin.quantize(folder / "float.onnx", images, folder / "int8.onnx")
    for kind in ("int8", "float"):
        session = onnx_twin.session(folder / f"{kind}.onnx", threads)
        systems[f"onnxruntime {kind}"] = _onnx_system(session)
    return systems


def random_network(name: str, family: str, images: Any) -> ResNet:
    """A network in evaluation mode, with the batch statistics of these images."""
    model: Any = models.create(name, family=family, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.momentum = 0.0
    nnx.jit(lambda model, x: model(x))(model, images)
    model.eval()
    network: ResNet = model
    return network


def random_pixels(count: int, size: int, seed: int) -> Any:
    """uint8 (count, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def normalized(pixels: Any) -> Any:
    """What the networks take, float32."""
    return ((pixels / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def in_turns(calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The seconds of every timed call: in each round a turn of each, of at least two calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.05)  # until the other runtime's threads have gone to sleep
            call()
            begin = time.perf_counter()
            for index in range(10_000):
                start = time.perf_counter()
                if index >= 2 and start - begin > seconds:
                    break
                call()
                times[name].append(time.perf_counter() - start)
    return times


def _jax_system(function: Callable[[Any], Any], prepare: Any) -> Callable[[Any], Call]:
    def system(pixels: Any) -> Call:
        images = jax.device_put(prepare(pixels))
        return lambda: jax.block_until_ready(function(images))

    return system


def _onnx_system(session: onnxruntime.InferenceSession) -> Callable[[Any], Call]:
    def system(pixels: Any) -> Call:
        images = np.ascontiguousarray(normalized(pixels).transpose(0, 3, 1, 2))
        return lambda: session.run(None, {"images": images})

    return system


if __name__ == "__main__":
    main()

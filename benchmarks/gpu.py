"""The adder products on an NVIDIA GPU: right, and how fast, in one command of under 8 minutes.

    python -m benchmarks.gpu --json gpu.json        # everything that fits into 8 minutes
    python -m benchmarks.gpu --only 512 --minutes 2 # shapes whose name has "512" in it
    python -m benchmarks.gpu --smoke                # tiny shapes, on any machine: does it run?

First every implementation is checked against float64 on small and odd shapes. Then each shape is
timed, forward, dx and dw, for the multiplying product in float32, tf32 and bfloat16, for the loops
that XLA compiles and for the Hopper kernels; and whole training steps of ResNet-20. A time is that
of one call in a burst of calls, the least over interleaved repeats, with the layout changes around
a kernel in it. GMAC/s are 10⁹ terms a second. "of limit" is the share of what the float32 lanes
can issue: 128 · multiprocessors · clock / instructions for each term.

What fails is a row with the error. Shapes come in order of importance, and those that the time
does not allow are listed as skipped. The JSON file is written after every row, and a run that
hangs is ended when its time is over.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.shapes import (
    MATMULS,
    RESNET18_CONVS,
    RESNET20_CONVS,
    SMALL_CONVS,
    SMALL_MATMULS,
    Conv,
    Matmul,
)
from benchmarks.step import training_step
from benchmarks.timing import interleaved_minimum
from jadder.kernels import linear, mosaic_gpu, reference, xla
from jadder.kernels.spec import ConvSpec
from jadder.models import get_family
from jadder.rules import Clip

Shape = Matmul | Conv
Row = dict[str, Any]
LANES = 128  # float32 instructions that a multiprocessor issues in a clock
INSTRUCTIONS = {
    "float32": 2.0,
    "bfloat16": 1.0,
    "float16": 1.0,
    "uint8": 0.25,
    "dx": 2.0,
    "sign": 3.0,
}
"""For each term, at least: the limit of the hardware. `jadder.kernels.mosaic_gpu` says how many its
own loops take."""
HARD_TANH, SIGN, LINEAR = Clip(1.0, 1.0), Clip(float("inf"), 1.0), Clip(1.0, float("inf"))
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "uint8": 0.0}
"""Of the largest value."""
CHECKED: Sequence[Shape] = (
    *(SMALL_MATMULS[i] for i in (0, 2, 5)),
    *(SMALL_CONVS[i] for i in (1, 2, 5, 8)),
)
VIT_MATMULS = (
    Matmul(12608, 384, 1536),
    Matmul(12608, 1536, 384),
    Matmul(12608, 384, 1152),
    Matmul(12608, 384, 384),
)
"""MLP and projections of a small SimpleViT, for 64 images of 197 patches."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--minutes", type=float, default=8, help="the time to end in")
    parser.add_argument("--repeats", type=int, default=5, help="bursts to take the minimum of")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")

    report = Report(args.json, 60 * args.minutes)
    kernels = _kernels(args.smoke)
    print(f"jax {jax.__version__}, {', '.join(report.device.values())}")
    if "mosaic_gpu" not in kernels:
        print(f"mosaic_gpu: {_refusal(args.smoke)}")
    for name, job in _jobs(kernels, args.repeats, args.smoke):
        if args.only in name:
            report.run(name, job)
    report.finish()


def _jobs(
    kernels: dict[str, Any], repeats: int, smoke: bool
) -> Iterable[tuple[str, Callable[[], Iterable[Row]]]]:
    """Everything there is to do, the most important first, by name."""
    small, shapes, model, batch = CHECKED, _timed_shapes(), "resnet20", 256
    if smoke:
        small, shapes, model, batch = SMALL_MATMULS[1:2], [SMALL_CONVS[0]], "lenet5", 2
    for shape in small:
        yield f"check {shape.name}", functools.partial(check, shape, kernels, smoke)
    for i, shape in enumerate(shapes):
        yield shape.name, functools.partial(measure, shape, kernels, repeats, smoke)
        if i == min(3, len(shapes) - 1):
            steps = functools.partial(measure_steps, model, batch, repeats, smoke)
            yield f"step {model}", steps


class Report:
    """Rows, printed and written as they come, until ``seconds`` are over."""

    def __init__(self, file: str | None, seconds: float) -> None:
        self.file, self.deadline = file, time.monotonic() + seconds - 20
        self.device = _device()
        self.limit = _instructions_per_second(self.device)
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.longest = {"step": 90.0}  # seconds that a job of each kind took
        self.watchdog = threading.Timer(seconds - 5, self._give_up)
        self.watchdog.daemon = True
        self.watchdog.start()

    def run(self, name: str, job: Callable[[], Iterable[Row]]) -> None:
        """The rows of one job, or none if it may not end in time."""
        start, kind = time.monotonic(), name.split()[0]
        if start + self.longest.get(kind, 0) > self.deadline:
            self.skipped.append(name)
            return
        try:
            for row in job():
                self._add(row)
        except Exception as error:
            self._add({"shape": name, "error": _first_line(error)})
        self.longest[kind] = max(self.longest.get(kind, 0), time.monotonic() - start)

    def finish(self) -> None:
        """Says what was left out and what was wrong."""
        self.watchdog.cancel()
        wrong = [row for row in self.rows if row.get("right") is False]
        failed = [row for row in self.rows if "error" in row]
        print(f"\n{len(self.rows)} rows, {len(wrong)} wrong, {len(failed)} failed")
        if self.skipped:
            print(f"skipped for lack of time: {', '.join(self.skipped)}")
        self._write()

    def _add(self, row: Row) -> None:
        if "gmacs" in row and self.limit and row["form"].startswith("mosaic"):
            terms = self.limit / INSTRUCTIONS[row["kind"]]
            row["of_limit"] = 1e9 * row["gmacs"] / terms
        self.rows.append(row)
        print(_line(row), flush=True)
        self._write()

    def _give_up(self) -> None:
        """Ends a process whose GPU does not answer."""
        self.skipped.append("the rest: the time was over in the middle of a job")
        self.finish()
        os._exit(1)

    def _write(self) -> None:
        if self.file:
            content = {
                "jax": jax.__version__,
                "device": self.device,
                "instructions_per_second": self.limit,
                "rows": self.rows,
                "skipped": self.skipped,
            }
            Path(self.file).write_text(json.dumps(content, indent=1))


def check(shape: Shape, kernels: dict[str, Any], smoke: bool) -> Iterable[Row]:
    """How far each implementation is from float64, on one shape."""
    functions = {
        (form, kind): (_product(shape, kernel, kind), kind if kind in TOLERANCES else "float32")
        for form, kernel in kernels.items()
        for kind in _kinds(form, smoke)
    }
    arrays = _operands(shape)
    programs, failures = _compile(functions, arrays)
    for (form, kind), (_, dtype) in functions.items():
        row: Row = {"check": shape.name, "form": form, "kind": kind}
        if (form, kind) in failures:
            row["error"] = failures[form, kind]
        else:
            program, operands = programs[form, kind]
            actual = np.asarray(program(*operands), "float64")
            expected = _in_float64(_product(shape, reference, kind, exact=True), operands)
            scale = max(float(np.abs(expected).max()), 1e-30)
            row["deviation"] = float(np.abs(actual - expected).max()) / scale
            row["right"] = row["deviation"] <= TOLERANCES[dtype]
        yield row


def measure(shape: Shape, kernels: dict[str, Any], repeats: int, smoke: bool) -> Iterable[Row]:
    """Times of every form of one shape, and how far adders are from the loops of XLA."""
    functions = {
        (pass_name, form, kind): (function, dtype)
        for form, kind, pass_name, function, dtype in _forms(shape, kernels, smoke)
    }
    programs, failures = _compile(functions, _operands(shape))
    bursts = {str(key): _Burst(program, operands) for key, (program, operands) in programs.items()}
    seconds = interleaved_minimum(bursts, repeats)
    for key in (*programs, *failures):
        pass_name, form, kind = key
        row: Row = {"shape": shape.name, "pass": pass_name, "form": form, "kind": kind}
        if key in failures:
            row["error"] = failures[key]
        else:
            burst = bursts[str(key)]
            row["us"] = 1e6 * seconds[str(key)] / burst.calls
            row["gmacs"] = shape.macs / row["us"] / 1e3
            beside = (pass_name, "xla", "float32" if kind in ("bfloat16", "float16") else kind)
            if form == "mosaic_gpu" and beside in programs:
                row["deviation"] = _deviation(programs[key], programs[beside])
                row["right"] = row["deviation"] <= 2 * TOLERANCES.get(kind, 1e-5)
        yield row


def measure_steps(model: str, batch: int, repeats: int, smoke: bool) -> Iterable[Row]:
    """Whole training steps: the multiplying network, and the adder network of each kernel."""
    forms: dict[str, tuple[str, Any, str | None]] = {
        "conv f32": ("conv", None, "highest"),
        "conv tf32": ("conv", None, None),
        "xla": ("adder", "xla", None),
        "mosaic_gpu": ("adder", "mosaic_gpu", None),
    }
    if smoke:
        forms = {"conv f32": forms["conv f32"]}
    runs: dict[str, _Burst] = {}
    for form, (family, implementation, precision) in forms.items():
        try:
            layers = get_family(family)
            if implementation is not None:
                layers = dataclasses.replace(layers, implementation=implementation)
            step, operands = training_step(model, layers, batch, 32)
            with _precision(precision):
                program = jax.jit(step).lower(*operands).compile()
            jax.block_until_ready(program(*operands))
            runs[form] = _Burst(program, list(operands))
        except Exception as error:
            yield {"step": f"{model} batch {batch}", "form": form, "error": _first_line(error)}
    for form, seconds in interleaved_minimum(runs, repeats, slow=2).items():
        us = 1e6 * seconds / runs[form].calls
        yield {"step": f"{model} batch {batch}", "form": form, "us": us}


def _compile(
    functions: dict[Any, tuple[Callable[..., Array], str]], arrays: Sequence[Array]
) -> tuple[dict[Any, tuple[Any, list[Array]]], dict[Any, str]]:
    """Programs that ran once, with their operands in each one's dtype, and why others did not."""
    programs, failures, lowered = {}, {}, {}
    for key, (function, dtype) in functions.items():
        operands = [_cast(a, dtype) for a in arrays]
        try:
            lowered[key] = jax.jit(function).lower(*operands), operands
        except Exception as error:
            failures[key] = _first_line(error)
    with ThreadPoolExecutor(8) as pool:
        waiting = {key: pool.submit(low.compile) for key, (low, _) in lowered.items()}
        for key, future in waiting.items():
            try:
                program, operands = future.result(), lowered[key][1]
                jax.block_until_ready(program(*operands))
                programs[key] = program, operands
            except Exception as error:
                failures[key] = _first_line(error)
    return programs, failures


class _Burst:
    """Calls a program often enough to hide what one call costs the host."""

    def __init__(self, program: Callable[..., Any], operands: Sequence[Array]) -> None:
        self.program, self.operands = program, operands
        start = time.perf_counter()
        jax.block_until_ready(program(*operands))
        self.calls = int(np.clip(0.02 / (time.perf_counter() - start), 1, 100))

    def __call__(self) -> Any:
        for _ in range(self.calls):
            result = self.program(*self.operands)
        return result


def _timed_shapes() -> list[Shape]:
    """In order of importance: the first four come before the training steps."""
    many: list[Shape] = [dataclasses.replace(conv, batch=256) for conv in RESNET20_CONVS]
    images: list[Shape] = [dataclasses.replace(conv, batch=64) for conv in RESNET18_CONVS]
    tall: list[Shape] = [dataclasses.replace(shape, m=8 * shape.m) for shape in MATMULS]
    square = MATMULS[3]
    rest = [shape for shape in MATMULS if shape != square]
    return [
        square,
        *many[:3],
        tall[3],
        *many[3:],
        images[1],
        *tall[:3],
        *images[3:],
        *VIT_MATMULS,
        tall[4],
        images[0],
        images[2],
        *rest,
    ]


def _forms(
    shape: Shape, kernels: dict[str, Any], smoke: bool
) -> Iterable[tuple[str, str, str, Callable[..., Array], str]]:
    """(form, kind, pass, function of x, w and g, dtype of the operands)."""
    for kind, dtype, precision in (
        ("f32", "float32", "highest"),
        ("tf32", "float32", "default"),
        ("bf16", "bfloat16", "default"),
    ):
        multiply = _multiply(shape, precision)
        yield "multiply", kind, "forward", lambda x, w, g, f=multiply: f(x, w), dtype
        yield "multiply", kind, "dx", functools.partial(_vjp, multiply, 0), dtype
        yield "multiply", kind, "dw", functools.partial(_vjp, multiply, 1), dtype
    yield "adder", "f32", "dw", _product(shape, xla, "dw"), "float32"
    for form, kernel in kernels.items():
        for kind in _kinds(form, smoke):
            dtype = kind if kind in TOLERANCES else "float32"
            pass_name = "dx" if kind in ("dx", "sign") else "forward"
            yield form, kind, pass_name, _product(shape, kernel, kind), dtype


def _kinds(form: str, smoke: bool) -> Sequence[str]:
    """The forward products and input gradients that are looked at."""
    if smoke:
        return "float32", "dx"
    if form == "xla":
        return "float32", "uint8", "dx", "sign"
    return "float32", "bfloat16", "float16", "uint8", "dx", "sign"


def _product(
    shape: Shape, kernels: Any, kind: str, *, exact: bool = False
) -> Callable[[Array, Array, Array], Array]:
    """The forward product in a type, or a gradient, by some kernels."""
    conv = isinstance(shape, Conv)
    spec: dict[str, Any] = {"spec": _spec(shape)} if isinstance(shape, Conv) else {}
    out_dtype = "float64" if exact else "int32" if kind == "uint8" else "float32"
    options = {**spec, "out_dtype": out_dtype}
    if kind == "dw":
        gradient = kernels.conv_dw if conv else kernels.matmul_dw
        return functools.partial(gradient, clip=LINEAR, precision="highest", **options)
    if kind in ("dx", "sign"):
        gradient = kernels.conv_dx if conv else kernels.matmul_dx
        return functools.partial(gradient, clip=HARD_TANH if kind == "dx" else SIGN, **options)
    forward = functools.partial(kernels.conv if conv else kernels.matmul, **options)
    return lambda x, w, g: forward(x, w)


def _multiply(shape: Shape, precision: str) -> Callable[[Array, Array], Array]:
    if isinstance(shape, Conv):
        spec = _spec(shape)
        return lambda x, w: linear.conv_product(x, w, spec, lax.Precision(precision))
    return functools.partial(jnp.matmul, precision=precision)


def _vjp(product: Callable[..., Array], wrt: int, x: Array, w: Array, g: Array) -> Array:
    return jax.vjp(product, x, w)[1](g)[wrt]


def _spec(shape: Conv) -> ConvSpec:
    missing = max((shape.out_size - 1) * shape.stride + shape.window - shape.size, 0)
    same = (missing // 2, missing - missing // 2)
    return ConvSpec((shape.stride,) * 2, (same, same), (1, 1), (1, 1), shape.groups)


def _operands(shape: Shape) -> tuple[Array, Array, Array]:
    """x, w and g of N(0, 1)."""
    if isinstance(shape, Conv):
        window, plane = (shape.window,) * 2, (shape.size,) * 2
        shapes: tuple[tuple[int, ...], ...] = (
            (shape.batch, *plane, shape.channels),
            (*window, shape.channels // shape.groups, shape.features),
            (shape.batch, shape.out_size, shape.out_size, shape.features),
        )
    else:
        shapes = (1, shape.m, shape.k), (1, shape.k, shape.n), (1, shape.m, shape.n)
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(size, np.float32)) for size in shapes)
    return x, w, g


def _cast(array: Array, dtype: str) -> Array:
    """In a narrower type; as bytes, N(0, 1) becomes N(128, 40²)."""
    return (
        jnp.clip(128 + 40 * array, 0, 255).astype(dtype)
        if dtype == "uint8"
        else array.astype(dtype)
    )


def _in_float64(function: Callable[..., Array], operands: Sequence[Array]) -> np.ndarray[Any, Any]:
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = [jnp.asarray(np.asarray(a).astype("float64")) for a in operands]
        return np.asarray(function(*exact))


def _deviation(one: tuple[Any, list[Array]], other: tuple[Any, list[Array]]) -> float:
    """The largest difference of two programs' results, as a share of the largest value."""
    actual, expected = (program(*operands).astype("float32") for program, operands in (one, other))
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def _kernels(smoke: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"xla": xla}
    if _refusal(smoke) is None:
        interpret = mosaic_gpu.unavailable() is not None
        found["mosaic_gpu"] = mosaic_gpu.MosaicGpuKernels(interpret=interpret)
    return found


def _refusal(smoke: bool) -> str | None:
    """Why the Hopper kernels cannot run; for a smoke test the interpreter does."""
    refusal = mosaic_gpu.unavailable()
    if refusal is None or not smoke:
        return refusal
    from jax.experimental.pallas import mosaic_gpu as pallas

    if hasattr(pallas, "InterpretGPUParams"):
        return None
    return f"{refusal}, and jax {jax.__version__} has no interpreter for Mosaic GPU"


def _precision(name: str | None) -> Any:
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


def _device() -> dict[str, str]:
    """What there is to say of the device, in words."""
    device = jax.devices()[0]
    words = {"device": device.device_kind}
    if device.platform == "gpu":
        words["multiprocessors"] = f"{getattr(device, 'core_count', 'unknown')} multiprocessors"
        words["clock"] = f"{_nvidia_smi('clocks.max.sm')} MHz at most"
        words["driver"] = f"driver {_nvidia_smi('driver_version')}"
    return words


def _instructions_per_second(words: dict[str, str]) -> float | None:
    """Instructions that all float32 lanes issue in a second, where the device says enough."""
    try:
        multiprocessors = int(words["multiprocessors"].split()[0])
        return LANES * multiprocessors * 1e6 * float(words["clock"].split()[0])
    except (KeyError, ValueError):
        return None


def _nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def _line(row: Row) -> str:
    where = row.get("shape") or row.get("step") or f"check {row['check']}"
    words = [f"{where:34}", f"{row.get('pass', ''):8}"]
    words += [f"{row.get('form', ''):11}", f"{row.get('kind', ''):9}"]
    if "error" in row:
        return "".join(words) + f"failed: {row['error']}"
    if "us" in row:
        words.append(f"{row['us']:11.1f} us")
    if "gmacs" in row:
        words.append(f"{row['gmacs']:10.1f} GMAC/s")
    if "of_limit" in row:
        words.append(f"{row['of_limit']:7.1%} of limit")
    if "deviation" in row:
        verdict = "" if row["right"] else "  WRONG"
        words.append(f"   off by {row['deviation']:.1e}{verdict}")
    return "".join(words)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]


if __name__ == "__main__":
    main()

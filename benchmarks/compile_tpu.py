"""Compiles the TPU kernels for a TPU that need not be there, and prints what memory they take.

    python -m benchmarks.compile_tpu                 # every shape, several minutes
    python -m benchmarks.compile_tpu --only 4096     # shapes whose name has "4096" in it

Lowering alone does not show whether Mosaic accepts a kernel; its compiler does, and comes with the
package ``libtpu``, which this needs (``pip install libtpu``, several hundred MB) and nothing else
in the project does. For each shape, pass and dtype it prints the seconds that the compiler took and
the bytes of the program's code, operands, results and temporaries in the device's memory; no
temporaries means that XLA keeps them in the chip's own. The exit status is 1 if anything failed to
compile, 2 without libtpu.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from benchmarks.shapes import (
    MATMULS,
    RESNET18_CONVS,
    RESNET20_CONVS,
    SINGLE_IMAGE_CONVS,
    SMALL_CONVS,
    SMALL_MATMULS,
    Conv,
    Matmul,
)
from jadder import ADDERNET, SIGN
from jadder.kernels.mosaic_tpu import MosaicTpuKernels
from jadder.kernels.spec import ConvSpec

SHAPES = (
    *MATMULS,
    *RESNET20_CONVS,
    *RESNET18_CONVS,
    *SINGLE_IMAGE_CONVS,
    *SMALL_MATMULS,
    *SMALL_CONVS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_tpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--topology", default="v5e:2x2", help="of which one device is compiled for")
    args = parser.parse_args(argv)
    shapes = [shape for shape in SHAPES if args.only in shape.name]
    if not shapes:
        parser.error(f"no shape has {args.only!r} in its name")
    library = _find_libtpu()
    if library is None:
        print("benchmarks.compile_tpu: no libtpu here; it comes with `pip install libtpu`")
        return 2
    os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask about
    jax.config.update("jax_platforms", "cpu")
    topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    device = topology.devices[0]
    print(f"jax {jax.__version__}, for {device.device_kind} ({args.topology})\n")
    columns = ("seconds", "code", "operands", "results", "temporaries")
    print(f"{'shape':32} {'pass':9} {'dtype':9}" + "".join(f"{name:>12}" for name in columns))
    failures = 0
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            for name, function, operands in passes(shape, jnp.dtype(dtype)):
                row = f"{shape.name:32} {name:9} {dtype:9}"
                try:
                    cells = [f"{cell:>12}" for cell in compile_for(device, function, operands)]
                except Exception as error:
                    failures += 1
                    cells = [f" failed: {error}"]
                print(row + "".join(cells), flush=True)
    print(f"\n{failures} failed to compile" if failures else "\nall compiled")
    return 1 if failures else 0


def passes(
    shape: Matmul | Conv, dtype: jnp.dtype
) -> list[tuple[str, Callable[..., Array], tuple[jax.ShapeDtypeStruct, ...]]]:
    """The name of each pass that has a kernel, the pass, and its operands."""
    kernels: Any = MosaicTpuKernels()
    kind = "matmul" if isinstance(shape, Matmul) else "conv"
    extra = () if isinstance(shape, Matmul) else (spec_of(shape),)
    x_shape, w_shape, g_shape = shapes_of(shape)
    x, w = jax.ShapeDtypeStruct(x_shape, dtype), jax.ShapeDtypeStruct(w_shape, dtype)
    g = jax.ShapeDtypeStruct(g_shape, dtype)

    def gradient(which: str, clip: Any) -> Callable[..., Array]:
        function = getattr(kernels, f"{kind}_{which}")
        return lambda x, w, g: function(x, w, g, *extra, clip, out_dtype=jnp.float32)

    forward = getattr(kernels, kind)
    found: list[tuple[str, Callable[..., Array], tuple[jax.ShapeDtypeStruct, ...]]] = [
        ("forward", lambda x, w: forward(x, w, *extra, out_dtype=jnp.float32), (x, w)),
        ("dx", gradient("dx", ADDERNET.x), (x, w, g)),
        ("dx sign", gradient("dx", SIGN.x), (x, w, g)),
    ]
    if isinstance(shape, Matmul):
        found.append(("dw", gradient("dw", ADDERNET.x), (x, w, g)))
    return found


def shapes_of(shape: Matmul | Conv) -> tuple[tuple[int, ...], ...]:
    """Of x, w and the result, as the kernels take them."""
    if isinstance(shape, Matmul):
        return (1, shape.m, shape.k), (1, shape.k, shape.n), (1, shape.m, shape.n)
    return (
        (shape.batch, shape.size, shape.size, shape.channels),
        (shape.window, shape.window, shape.channels // shape.groups, shape.features),
        (shape.batch, shape.out_size, shape.out_size, shape.features),
    )


def spec_of(shape: Conv) -> ConvSpec:
    """The convolution that a shape stands for."""
    window, strides = (shape.window,) * 2, (shape.stride,) * 2
    padding = lax.padtype_to_pads((shape.size,) * 2, window, strides, "SAME")
    pairs = tuple((int(low), int(high)) for low, high in padding)
    return ConvSpec(strides, pairs, (1, 1), (1, 1), shape.groups)


def compile_for(
    device: Any, function: Callable[..., Array], operands: Sequence[jax.ShapeDtypeStruct]
) -> tuple[str, ...]:
    """Seconds that compiling took, and bytes of code, operands, results and temporaries."""
    sharding = SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in operands]
    # Pallas asks what it lowers for, and would else find the CPU that this runs on.
    target = AbstractDevice(device.device_kind, device.num_cores, device.platform)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=target)):
        lowered = jax.jit(function, out_shardings=sharding).lower(*placed)
    if "tpu_custom_call" not in lowered.as_text():
        raise RuntimeError("no kernel in the lowered program")
    memory: Any = lowered.compile().memory_analysis()
    return (
        f"{time.perf_counter() - start:.1f}",
        *(
            str(getattr(memory, f"{kind}_size_in_bytes"))
            for kind in ("generated_code", "argument", "output", "temp")
        ),
    )


def _find_libtpu() -> Path | None:
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).with_name("libtpu.so")
    return library if library.exists() else None


if __name__ == "__main__":
    sys.exit(main())

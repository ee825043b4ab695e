"""Speed of the products, beside the multiplying ones, in one process.

    python -m benchmarks.ops                    # every shape and implementation, 2 to 5 minutes
    python -m benchmarks.ops --only 4096        # shapes whose name has "4096" in it

For each shape it prints GMAC/s (10⁹ terms |x - w| per second) of the forward product, of the
input's gradient and of the kernel's, each the minimum time over interleaved repeats, and the ratio
to the forward pass of ``jnp.dot`` or ``lax.conv_general_dilated`` on the same shape. "naive" is
the broadcast form that a reader of the paper writes first; where it would take more than 1 GiB of
temporaries, the table says how much instead.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.shapes import MATMULS, RESNET20_CONVS, Conv, Matmul
from benchmarks.timing import interleaved_minimum
from jadder import ops

Product = Callable[[Array, Array], Array]
PASSES = ("forward", "dx", "dw")
MEMORY_LIMIT = 2**30


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--repeats", type=int, default=12, help="rounds to take the minimum of")
    parser.add_argument("--skip-naive", action="store_true", help="leave out the slowest form")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)

    shapes = [s for s in (*MATMULS, *RESNET20_CONVS) if args.only in s.name]
    if not shapes:
        parser.error(f"no shape has {args.only!r} in its name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {cores} processor cores")
    print(f"GMAC/s, minimum of {args.repeats} interleaved runs; in brackets: / multiply forward\n")
    print(f"{'shape':34} {'form':10}" + "".join(f"{name:>18}" for name in PASSES))
    rows = []
    for shape in shapes:
        for row in measure(shape, args.repeats, naive=not args.skip_naive):
            rows.append(row)
            cells = "".join(f"{_cell(row[p], row['multiply']):>18}" for p in PASSES)
            print(f"{row['shape']:34} {row['form']:10}{cells}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"jax": jax.__version__, "repeats": args.repeats, "rows": rows}, file, indent=1
            )


def measure(shape: Matmul | Conv, repeats: int, *, naive: bool) -> list[dict[str, Any]]:
    """GMAC/s of every form on one shape: a row for each, with the multiplying forward's."""
    products, x_shape, w_shape = _products(shape)
    if not naive:
        del products["naive"]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    y_shape = jax.eval_shape(products["multiply"], x, w).shape
    g = jax.random.normal(keys[2], y_shape)

    runs: dict[str, Callable[[], Any]] = {}
    rate: dict[str, float | str] = {}
    for form, product in products.items():
        for name, function in zip(PASSES, _passes(product), strict=True):
            operands = (x, w) if name == "forward" else (x, w, g)
            program = jax.jit(function).lower(*operands).compile()
            analysis: Any = program.memory_analysis()
            memory = analysis.temp_size_in_bytes
            if memory > MEMORY_LIMIT:
                rate[f"{form} {name}"] = f"{memory / 2**30:.1f} GiB"
            else:
                runs[f"{form} {name}"] = functools.partial(program, *operands)
    for name, seconds in interleaved_minimum(runs, repeats).items():
        rate[name] = shape.macs / seconds / 1e9
    return [
        {
            "shape": shape.name,
            "form": form,
            **{name: rate[f"{form} {name}"] for name in PASSES},
            "multiply": rate["multiply forward"],
        }
        for form in products
    ]


def _cell(rate: float | str, multiply: float) -> str:
    return rate if isinstance(rate, str) else f"{rate:.1f} ({rate / multiply:5.2f})"


def _passes(product: Product) -> tuple[Callable[..., Array], ...]:
    def dx(x: Array, w: Array, g: Array) -> Array:
        return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

    def dw(x: Array, w: Array, g: Array) -> Array:
        return jax.vjp(lambda w: product(x, w), w)[1](g)[0]

    return product, dx, dw


def _products(
    shape: Matmul | Conv,
) -> tuple[dict[str, Product], tuple[int, ...], tuple[int, ...]]:
    adders: dict[str, ops.Implementation] = {"naive": "reference", "xla": "xla"}
    if isinstance(shape, Matmul):
        products: dict[str, Product] = {"multiply": jnp.dot}
        for form, name in adders.items():
            products[form] = functools.partial(ops.adder_matmul, implementation=name)
        return products, (shape.m, shape.k), (shape.k, shape.n)

    strides = (shape.stride, shape.stride)
    layout = ("NHWC", "HWIO", "NHWC")
    arguments = (strides, "SAME", None, None, layout, shape.groups)

    def multiply(x: Array, w: Array) -> Array:
        return lax.conv_general_dilated(x, w, *arguments)

    products = {"multiply": multiply}
    for form, name in adders.items():

        def adder(x: Array, w: Array, name: Any = name) -> Array:
            return ops.adder_conv_general_dilated(x, w, *arguments, implementation=name)

        products[form] = adder
    x_shape = (shape.batch, shape.size, shape.size, shape.channels)
    w_shape = (shape.window, shape.window, shape.channels // shape.groups, shape.features)
    return products, x_shape, w_shape


if __name__ == "__main__":
    main()

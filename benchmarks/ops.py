"""Speed of the products, beside the multiplying ones, in one process.

    python -m benchmarks.ops                    # every shape and implementation, 3 to 6 minutes
    python -m benchmarks.ops --only 4096        # shapes whose name has "4096" in it
    python -m benchmarks.ops --forms cpu xla    # these implementations

For each shape it prints GMAC/s (10⁹ terms |x - w| per second) of the forward product, of the
input's gradient and of the kernel's, each the minimum time over interleaved repeats, and two
ratios: to the forward pass of ``jnp.dot`` or ``lax.conv_general_dilated`` on the same shape, and to
the same pass of it. "naive" is the broadcast form that a reader of the paper writes first; where it
would take more than 1 GiB of temporaries, the table says how much instead. "uint8" is the forward
product of bytes, summed in int32. "euclid", "euclid_16" and "euclid_xla" are -Σ(x - w)², by the
implementations "cpu", "cpu_int16" and "xla".
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.shapes import (
    MATMULS,
    RESNET18_CONVS,
    RESNET20_CONVS,
    SINGLE_IMAGE_CONVS,
    Conv,
    Matmul,
)
from benchmarks.timing import interleaved_minimum
from jadder import implementations, ops

Product = Callable[..., Array]
PASSES = ("forward", "dx", "dw")
FORMS = {"naive": "reference", "xla": "xla", "cpu": "cpu", "cpu_fast": "cpu_fast",
         "cpu_int16": "cpu_int16", "uint8": "cpu", "euclid": "cpu", "euclid_16": "cpu_int16",
         "euclid_xla": "xla"}  # fmt: skip
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
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")

    every = (*MATMULS, *RESNET20_CONVS, *RESNET18_CONVS, *SINGLE_IMAGE_CONVS)
    shapes = [s for s in every if args.only in s.name]
    if not shapes:
        parser.error(f"no shape has {args.only!r} in its name")
    found = implementations()
    forms = [form for form in args.forms if found[FORMS[form]].available]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {cores} processor cores")
    for name, availability in found.items():
        print(f"{name}: {availability.about}")
    print(f"GMAC/s, minimum of {args.repeats} interleaved runs;")
    print("in brackets: / multiply's forward, / multiply's same pass\n")
    print(f"{'shape':32} {'form':10}" + "".join(f"{name:>21}" for name in PASSES))
    rows = []
    for shape in shapes:
        slow = shape in (*RESNET18_CONVS, *SINGLE_IMAGE_CONVS)
        chosen = [form for form in forms if not (slow and form == "naive")]
        table = measure(shape, args.repeats, chosen)
        for row in table:
            rows.append(row)
            cells = "".join(f"{_cell(row[p], table[0], p):>21}" for p in PASSES)
            print(f"{row['shape']:32} {row['form']:10}{cells}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"jax": jax.__version__, "repeats": args.repeats, "rows": rows}, file, indent=1
            )


def measure(shape: Matmul | Conv, repeats: int, forms: Sequence[str]) -> list[dict[str, Any]]:
    """GMAC/s of the multiplying product, and then of each form, on one shape."""
    multiply, adder, euclid, x_shape, w_shape = _products(shape)
    products = {"multiply": multiply}
    for form in forms:
        product = euclid if form.startswith("euclid") else adder
        products[form] = functools.partial(product, implementation=FORMS[form])
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    g = jax.random.normal(keys[2], jax.eval_shape(multiply, x, w).shape)

    runs: dict[str, Callable[[], Any]] = {}
    rate: dict[str, float | str] = {}
    for form, product in products.items():
        if form == "uint8":
            product = functools.partial(product, preferred_element_type=jnp.int32)
            operands = [jax.random.bits(keys[i], a.shape, jnp.uint8) for i, a in enumerate((x, w))]
            runs["uint8 forward"] = functools.partial(jax.jit(product), *operands)
            continue
        for name, function in zip(PASSES, _passes(product), strict=True):
            operands = [x, w] if name == "forward" else [x, w, g]
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
        {"shape": shape.name, "form": form, **{p: rate.get(f"{form} {p}", "") for p in PASSES}}
        for form in products
    ]


def _cell(rate: float | str, multiply: dict[str, Any], name: str) -> str:
    if isinstance(rate, str):
        return rate
    return f"{rate:.1f} ({rate / multiply['forward']:.2f}, {rate / multiply[name]:.2f})"


def _passes(product: Product) -> tuple[Callable[..., Array], ...]:
    def dx(x: Array, w: Array, g: Array) -> Array:
        return jax.vjp(lambda x: product(x, w), x)[1](g)[0]

    def dw(x: Array, w: Array, g: Array) -> Array:
        return jax.vjp(lambda w: product(x, w), w)[1](g)[0]

    return product, dx, dw


def _products(
    shape: Matmul | Conv,
) -> tuple[Product, Product, Product, tuple[int, ...], tuple[int, ...]]:
    """The multiplying product, the adder and the Euclid product, and the shapes of x and w."""
    if isinstance(shape, Matmul):
        shapes = (shape.m, shape.k), (shape.k, shape.n)
        return jnp.dot, ops.adder_matmul, ops.euclid_matmul, *shapes

    arguments: dict[str, Any] = {
        "window_strides": (shape.stride, shape.stride),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        "feature_group_count": shape.groups,
    }
    multiply = functools.partial(lax.conv_general_dilated, **arguments)
    adder = functools.partial(ops.adder_conv_general_dilated, **arguments)
    euclid = functools.partial(ops.euclid_conv_general_dilated, **arguments)
    x_shape = (shape.batch, shape.size, shape.size, shape.channels)
    w_shape = (shape.window, shape.window, shape.channels // shape.groups, shape.features)
    return multiply, adder, euclid, x_shape, w_shape


if __name__ == "__main__":
    main()

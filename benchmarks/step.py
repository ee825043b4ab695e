"""Time and memory of a whole training step of the adder network, beside its conv twin.

    python -m benchmarks.step                            # ResNet-20, batch 128
    python -m benchmarks.step --model vgg_small --batch 64

Both networks' steps (forward, backward, statistics, optimizer) run in one process, interleaved; the
figures are the minimum over the repeats. Memory is what XLA plans for temporaries.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from benchmarks.timing import interleaved_minimum
from jadder import adder_mask, adder_sgd, models
from jadder.implementations import Implementation, implementations
from jadder.models import Family, get_family

Step = Callable[[Any, Any, Any, Array, Array], tuple[Any, Any, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line for each form of the network, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet20", choices=models.names())
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image")
    parser.add_argument("--repeats", type=int, default=12, help="rounds to take the minimum of")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    if args.json and not Path(args.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(args.json).parent}")

    forms: dict[str, Family] = {"conv": get_family("conv"), "xla": adder("xla"), "adder": adder()}
    if implementations()["cpu"].available:
        forms |= {"cpu_fast": adder("cpu_fast"), "cpu_int16": adder("cpu_int16")}
    print(f"{args.model}, batch {args.batch}, jax {jax.__version__}, {jax.devices()[0]}")
    runs, rows = {}, {}
    for name, family in forms.items():
        step, operands = training_step(args.model, family, args.batch, args.size)
        program = jax.jit(step).lower(*operands).compile()
        memory: Any = program.memory_analysis()
        rows[name] = {"temporaries_mib": memory.temp_size_in_bytes / 2**20}
        runs[name] = functools.partial(program, *operands)
    for name, seconds in interleaved_minimum(runs, args.repeats, slow=60).items():
        rows[name]["step_ms"] = 1e3 * seconds
    for name, row in rows.items():
        time, memory = (row[key] / rows["conv"][key] for key in ("step_ms", "temporaries_mib"))
        print(
            f"{name:10}{row['step_ms']:9.1f} ms ({time:4.2f} of conv)"
            f"{row['temporaries_mib']:9.1f} MiB ({memory:4.2f} of conv)",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"jax": jax.__version__, **vars(args), "rows": rows}, file, indent=1)


def adder(implementation: Implementation | None = None) -> Family:
    """The adder family with these kernels; the best ones by default."""
    return dataclasses.replace(get_family("adder"), implementation=implementation)


def training_step(
    model: str, family: Family, batch: int, size: int, num_classes: int = 10
) -> tuple[Step, tuple[Any, Any, Any, Array, Array]]:
    """A step of AdderNet's recipe; parameters, statistics, optimizer's state, images and labels."""
    network = models.create(
        model, num_classes=num_classes, family=family, image_size=(size, size), rngs=nnx.Rngs(0)
    )
    parts: Any = nnx.split(network, nnx.Param, ...)
    graphdef, params, rest = parts
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    tx = adder_sgd(0.1, mask=adder_mask(network))

    def step(params: Any, rest: Any, state: Any, images: Array, labels: Array) -> Any:
        def loss(params: Any) -> tuple[Array, Any]:
            net: Any = nnx.merge(graphdef, params, rest)
            cross = optax.softmax_cross_entropy_with_integer_labels(net(images), labels)
            return cross.mean(), nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.Param)))

        gradients, new_rest = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), new_rest, state

    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
    labels = jnp.arange(batch) % 10
    return step, (params, rest, tx.init(params), images, labels)


if __name__ == "__main__":
    main()

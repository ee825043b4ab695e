"""Serves the programs of jadder's networks: of adders, and of their multiplying twin in JAX."""

import dataclasses
import functools
import sys
from typing import Any

import jax
from flax import nnx

from benchmarks.step import training_step
from benchmarks.torch.turns import Call, Workload, serve, threads
from jadder import implementations, models
from jadder.models import Family, get_family


def main(argument: str) -> None:
    """Serves a workload, as JSON, to the process that began this one."""
    workload = Workload.from_json(argument)
    calls: dict[str, Call] = {}
    for program in workload.programs:
        make = training if program == "step" else inference
        for name, family in families().items():
            calls[f"{program}, {name}"] = make(workload, family)
    native = implementations()["cpu"]
    serve({"jax": jax.__version__, "threads": threads(), "cpu": native.about}, calls)


def families() -> dict[str, Family]:
    """The twin, and the adders that are compared with it."""
    adder = get_family("adder")
    found = {"conv": get_family("conv"), "adder": adder}
    for name in ("cpu_fast", "cpu_int16"):
        if implementations()[name].available:
            implementation: Any = name
            found[f"adder, {name}"] = dataclasses.replace(adder, implementation=implementation)
    return found


def training(workload: Workload, family: Family) -> Call:
    """Forward, backward and optimizer, each call with the state that the last one left."""
    step, operands = training_step(
        workload.network, family, workload.batch, workload.size, workload.num_classes
    )
    *state, images, labels = operands
    program = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*operands).compile()
    kept: list[Any] = [state]

    def call() -> None:
        kept[0] = jax.block_until_ready(program(*kept[0], images, labels))

    return call


def inference(workload: Workload, family: Family) -> Call:
    """Logits of a network in evaluation mode."""
    make = functools.partial(models.create, workload.network, num_classes=workload.num_classes)
    size = (workload.size, workload.size)
    network: Any = make(family=family, image_size=size, rngs=nnx.Rngs(0))
    network.eval()
    graphdef, state = nnx.split(network)
    images = jax.random.normal(jax.random.key(0), (workload.batch, *size, 3))
    program = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    compiled = program.lower(state, images).compile()
    return lambda: jax.block_until_ready(compiled(state, images))


if __name__ == "__main__":
    main(sys.argv[1])

"""The gradient rules drawn: what stands in for sign(d), and the function it is the derivative of.

As evidence, each potential's finite difference beside the gradient that the library computes.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jadder
from experiments.common.allocation import restart_with_huge_pages
from experiments.common.drawing import new_figure, save
from experiments.studies.command import Experiment, Place
from experiments.studies.outcome import Cell, Outcome, Picture, Table
from jadder.rules import Clip, GradientRule

ABOUT = """\
The gradient rules of adder products: psi and its potential.

Draws what stands in for sign(d) in the derivative of |d|, for the sign itself, full precision,
HT(d) of AdderNet and HT(4d) of Adder-ViT, and the potentials that these are derivatives of. Then
compares the gradients that the library computes by each of them with finite differences of the
potential, and with the gradient by the sign.
"""
RULES: Mapping[str, Clip] = {
    "sign": jadder.SIGN.x,
    "full precision": jadder.ADDERNET.kernel,
    "HT(d)": jadder.ADDERNET.x,
    "HT(4d)": jadder.ADDER_VIT.x,
}
IMPLEMENTATIONS = ("cpu", "xla", "reference")
Floats = NDArray[np.floating[Any]]


def run(options: argparse.Namespace, place: Place) -> Outcome:
    m, k, n = (4, 6, 3) if options.smoke else (128, 256, 64)
    available = jadder.implementations()
    implementations = [name for name in IMPLEMENTATIONS if available[name].available]
    checks = check(m, k, n, implementations)
    pull = likeness(m, k, n)
    draw(place.folder / "rules.png")
    return Outcome(
        "Gradient rules: ψ and its potential ρ",
        tables=[check_table(checks, (m, k, n)), likeness_table(pull)],
        pictures=[Picture("rules.png", "ψ, and the potential ρ whose derivative it is")],
        notes=[
            "Differences are odd multiples of 1/32 and the finite difference's step is 1/64, so "
            "no knee of ρ lies within a step, and what is left is the rounding of float32.",
        ],
        data={"checks": checks, "likeness": pull, "shape": {"m": m, "k": k, "n": n}},
    )


# -- the library's gradients beside the potentials -------------------------------------------------


def check(m: int, k: int, n: int, implementations: list[str]) -> list[dict[str, Any]]:
    """For each rule and operand: the largest error of each implementation's gradient.

    x (m, k) and kernel (k, n) differ by odd multiples of 1/32, so that a central difference with a
    step of 1/64 stays on one side of every knee (0, 1/4 and 1), where a piecewise quadratic
    function's central difference is its derivative.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(-32, 33, (m, k)) / 16
    kernel = rng.integers(-32, 33, (k, n)) / 16 + 1 / 32
    g = rng.standard_normal((m, n))
    rows = []
    for name, clip in RULES.items():
        for operand, expected in finite_differences(clip, x, kernel, g).items():
            errors = {}
            for implementation in implementations:
                got = library_gradient(clip, operand, x, kernel, g, implementation)
                errors[implementation] = float(np.max(np.abs(got - expected)))
            largest = float(np.max(np.abs(expected)))
            rows.append({"rule": name, "operand": operand, "largest": largest, "errors": errors})
    return rows


def finite_differences(
    clip: Clip, x: Floats, kernel: Floats, g: Floats, *, step: float = 1 / 64
) -> dict[str, Floats]:
    """Central differences of -Σ g[m, n] ρ(x[m, k] - kernel[k, n]), in float64.

    Returns:
        x: (m, k), for each element of x.
        kernel: (k, n), for each element of the kernel.
    """
    difference = x[:, :, None] - kernel
    with jax.enable_x64(True):
        above, below = (np.asarray(clip.potential(difference + h)) for h in (step, -step))
    # Of ρ(x - w); to move w up is to move the difference down.
    slopes = (above - below) / (2 * step) * g[:, None]
    return {"x": -slopes.sum(2), "kernel": slopes.sum(0)}


def library_gradient(
    clip: Clip, operand: str, x: Floats, kernel: Floats, g: Floats, implementation: Any
) -> Floats:
    """What `jax.grad` gives through `jadder.adder_matmul`, in float32."""
    rule = GradientRule(x=clip, kernel=clip)

    def weighted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jadder.adder_matmul(x, kernel, rule=rule, implementation=implementation)
        return jnp.vdot(jnp.asarray(g, jnp.float32), y)

    place = ("x", "kernel").index(operand)
    gradient = jax.jit(jax.grad(weighted, argnums=place))
    return np.asarray(gradient(*(jnp.asarray(a, jnp.float32) for a in (x, kernel))))


def check_table(checks: list[dict[str, Any]], shape: tuple[int, int, int]) -> Table:
    m, k, n = shape
    names = list(checks[0]["errors"])
    columns = ["ψ", "gradient of", "largest element", *(f"error, {name}" for name in names)]
    rows: list[list[Cell]] = [
        [row["rule"], row["operand"], row["largest"], *row["errors"].values()] for row in checks
    ]
    formats = {"largest element": ".2f"} | dict.fromkeys(columns[3:], ".1e")
    title = (
        f"Largest error of the float32 gradient against the finite difference of Σρ, {m}x{k}x{n}"
    )
    return Table(title, columns, rows, formats)


# -- how near the rules are to the sign ------------------------------------------------------------


def likeness(m: int, k: int, n: int) -> list[dict[str, Any]]:
    """For x, kernel and g from N(0, 1): where ψ is clipped, and the angle to the sign's gradient.

    The input's gradient is Σ_n ψ(w - x) g; the sign rule's is the true subgradient of y.
    """
    rng = np.random.default_rng(1)
    x, kernel, g = (rng.standard_normal(shape) for shape in ((m, k), (k, n), (m, n)))
    difference = np.abs(x[:, :, None] - kernel)
    gradients = {
        name: library_gradient(clip, "x", x, kernel, g, None) for name, clip in RULES.items()
    }
    true = gradients["sign"]
    rows: list[dict[str, Any]] = []
    for name, clip in RULES.items():
        knee = 0.0 if clip.is_sign else clip.bound / clip.scale
        cosine = np.sum(gradients[name] * true) / math.sqrt(
            np.sum(gradients[name] ** 2) * np.sum(true**2)
        )
        clipped = float(np.mean(difference > knee))
        rows.append({"rule": name, "knee": knee, "clipped": clipped, "cosine": float(cosine)})
    # JSON has no infinity.
    return [row | {"knee": row["knee"] if math.isfinite(row["knee"]) else None} for row in rows]


def likeness_table(rows: list[dict[str, Any]]) -> Table:
    return Table(
        "Input gradients of one layer with x, w and g from N(0, 1), beside the sign's",
        ("ψ", "clipped from |d| =", "share of d clipped", "cosine to the sign's gradient"),
        [[row["rule"], row["knee"], row["clipped"], row["cosine"]] for row in rows],
        {
            "clipped from |d| =": ".2f",
            "share of d clipped": ".1%",
            "cosine to the sign's gradient": ".3f",
        },
    )


# -- the picture -----------------------------------------------------------------------------------


def draw(path: Path) -> None:
    """ψ on the left and ρ on the right, for every rule."""
    figure = new_figure(10, 4.2, "What stands in for the derivative of |d|, and its potential")
    psi, rho = figure.subplots(1, 2)
    d = np.linspace(-2, 2, 1601)
    lines = {"sign": "-", "full precision": "--", "HT(d)": "-", "HT(4d)": "-"}
    for name, clip in RULES.items():
        style = {"linestyle": lines[name], "linewidth": 2, "label": name}
        psi.plot(d, np.asarray(clip(d)), **style)
        rho.plot(d, np.asarray(clip.potential(d)), **style)
    psi.set_ylabel("ψ(d)")
    psi.set_title("ψ: what the gradient uses")
    rho.set_ylabel("ρ(d)")
    rho.set_title("ρ: what it is the gradient of (ρ' = ψ)")
    for axes in (psi, rho):
        axes.set_xlabel("difference d")
        axes.grid(alpha=0.3)
    psi.legend(loc="upper left")
    rho.legend(loc="upper center")
    save(figure, path)


EXPERIMENT = Experiment("gradient_rules", ABOUT, run, saves=False)
main = EXPERIMENT.main

if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())

"""What changes of a run for adder networks on CIFAR-10: recipes by name."""

import argparse
from collections.abc import Mapping
from typing import Any

CENTERED = ("norm=centered_batch",)
INSIDE: Mapping[str, Any] = {"eta": 0.1, "kernel_min": -0.25, "kernel_max": 2.5}
"""Options that keep adder kernels where inputs are that come from a normalisation and a ReLU."""
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "short": {"eta": 0.4, "model_options": CENTERED},
    "inside": {**INSIDE, "model_options": CENTERED},
    "exact": {**INSIDE, "model_options": CENTERED, "anneal": "exact"},
    "annealed": {**INSIDE, "model_options": CENTERED, "anneal": "distance_exact"},
    "addernet": {"eta": 0.2},
}
"""Fields of `TrainConfig`: steps of a size for few epochs, kernels kept inside their inputs' range
too, the same with derivatives that become exact, the same begun with Euclid's distance besides, and
AdderNet's paper (Chen et al., 2020)."""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds --recipe, whose value is a name of `RECIPES`, or None where it is not given."""
    parser.add_argument("--recipe", choices=tuple(RECIPES),
                        help="of adder networks (default: short on CIFAR-10)")  # fmt: skip

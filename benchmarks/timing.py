"""Fair timing of several functions on a noisy machine."""

import time
from collections.abc import Callable, Mapping

import jax


def interleaved_minimum(
    functions: Mapping[str, Callable[[], object]], repeats: int, slow: float = 0.5
) -> dict[str, float]:
    """The least seconds that each function takes, over ``repeats`` rounds of all of them.

    Rounds interleave the functions, so that a change of the machine's clock or load meets all of
    them alike. A function whose first timed run takes more than ``slow`` seconds runs in three
    rounds only.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    best: dict[str, float] = {}
    for i in range(repeats):
        for name, function in functions.items():
            if i >= 3 and best[name] > slow:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds = time.perf_counter() - start
            best[name] = min(seconds, best.get(name, seconds))
    return best

"""Fair timing of several functions on a noisy machine."""

import time
from collections.abc import Callable, Mapping

import jax


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, slow: float = 0.5
) -> dict[str, list[float]]:
    """The seconds that each function takes in each of ``repeats`` rounds of all of them.

    Rounds interleave the functions, so that a change of the machine's clock or load meets all of
    them alike. A function of which every timed run took more than ``slow`` seconds runs in three
    rounds only.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        for name, function in functions.items():
            if i >= 3 and min(times[name]) > slow:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def interleaved_minimum(
    functions: Mapping[str, Callable[[], object]], repeats: int, slow: float = 0.5
) -> dict[str, float]:
    """The least seconds that each function takes over the rounds of `interleaved`."""
    times = interleaved(functions, repeats, slow)
    return {name: min(seconds) for name, seconds in times.items()}

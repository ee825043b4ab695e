"""What C can be written for."""

import dataclasses
from collections.abc import Mapping
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Target:
    """A processor, or any that C99 knows.

    Attributes:
      name: as given to ``export_c``.
      about: one line for the README.
      kernels: of convolutions without groups: 'portable' loops, 'vector' intrinsics with portable
        loops where the compiler has none, or 'thumb' assembly.
      flags: what its Makefile gives to the compiler besides -O2.
    """

    name: str
    about: str
    kernels: Literal["portable", "vector", "thumb"]
    flags: str = ""


def _cortex(name: str) -> Target:
    about = f"Arm {name.capitalize()}: Thumb-2 assembly with USADA8 and SMLAD"
    return Target(name, about, "thumb", f"-mcpu={name} -mthumb")


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("c99", "any processor with a C99 compiler", "portable"),
        _cortex("cortex-m4"),
        _cortex("cortex-m7"),
        Target("aarch64", "64-bit Arm: NEON's UABD and UADALP", "vector"),
        Target("x86", "x86-64: SSE2's PSADBW, or AVX2's where compiled for it", "vector", "-mavx2"),
    )
}

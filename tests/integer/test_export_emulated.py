"""C and assembly for small processors in an emulator: bit for bit, and in how many instructions."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jadder.integer import IntegerProgram
from tests.integer import oracle
from tests.integer.cifar_resnets import resnet
from tests.integer.compiled import Emulated, needs_emulator
from tests.integer.layers import chains
from tests.integer.programs import images, programs

pytestmark = needs_emulator()

several = settings(max_examples=3, phases=(Phase.explicit, Phase.generate))

ADDER8, TWIN8, ADDER20 = range(3)


@pytest.mark.parametrize(
    ("machine", "target", "strategy"),
    [
        ("cortex-m4", "cortex-m4", chains),
        ("cortex-m4", "cortex-m4", programs),
        ("cortex-m0", "c99", chains),
        ("aarch64", "aarch64", chains),
    ],
    ids=["m4, chains", "m4, all operations", "m0", "aarch64"],
)
def test_random_programs(
    machine: str, target: str, strategy: Callable[[], Any], tmp_path: Path
) -> None:
    places = map(str, itertools.count())

    @several
    @given(drawn=st.lists(strategy(), min_size=8, max_size=8), seed=st.integers(0, 2**32))
    def check(drawn: list[IntegerProgram], seed: int) -> None:
        together = Emulated(drawn, machine, tmp_path / next(places), target)
        for index, program in enumerate(drawn):
            x = images(program, 2, seed)
            processor = together.load(index)
            for image, expected in zip(x, oracle.every_value(program, x)[-1], strict=True):
                np.testing.assert_array_equal(processor.run(image)[0], expected.reshape(-1))

    check()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[IntegerProgram], Emulated]:
    """ResNet-8 adding and multiplying, and ResNet-20, for a Cortex-M4."""
    drawn = [resnet(1), resnet(1, "multiply"), resnet(3)]
    return drawn, Emulated(drawn, "cortex-m4", tmp_path_factory.mktemp("m4"), "cortex-m4")


@pytest.mark.parametrize("which", [ADDER8, TWIN8, ADDER20], ids=["adder8", "twin8", "adder20"])
def test_whole_networks_on_20_images(
    which: int, networks: tuple[list[IntegerProgram], Emulated]
) -> None:
    programs, together = networks
    processor = together.load(which)
    x = images(programs[which], 20, 0)
    expected = oracle.every_value(programs[which], x)[-1].reshape(20, 10)
    assert len(np.unique(expected)) > 20  # not all the same, nor all at their bounds
    found = np.array([processor.run(image)[0] for image in x])
    np.testing.assert_array_equal(found, expected)


def test_counts_of_instructions(networks: tuple[list[IntegerProgram], Emulated]) -> None:
    """Nearly all are of the assembly; the rest depends on the compiler's version a little."""
    programs, together = networks
    image = images(programs[0], 1, 0)[0]
    counts = [together.load(which).run(image)[1] for which in range(3)]
    assert counts[ADDER8] == pytest.approx(5_370_000, rel=0.01)
    assert counts[TWIN8] == pytest.approx(10_100_000, rel=0.01)
    assert counts[ADDER20] == pytest.approx(16_680_000, rel=0.01)
    another = images(programs[0], 1, 1)[0]  # bounds that C looks at may take a branch
    assert counts[ADDER8] == pytest.approx(together.load(ADDER8).run(another)[1], abs=200)


def test_memory_of_a_resnet8(tmp_path: Path) -> None:
    alone = Emulated([resnet(1)], "cortex-m4", tmp_path, "cortex-m4")
    sizes = alone.load(0).sizes
    assert alone.codes[0].plan.size <= 64 * 1024
    assert sizes.code + sizes.constants <= 110 * 1024
    assert sizes.constants == pytest.approx(alone.codes[0].table_size, rel=0.02)
    # What the folder's README says about its code.
    assert 0 <= alone.codes[0].code_size - sizes.code < 2048


def test_the_size_of_assembly_is_known(networks: tuple[list[IntegerProgram], Emulated]) -> None:
    from elftools.elf.elffile import ELFFile

    _, together = networks
    with together.elf.open("rb") as file:
        symbols = ELFFile(file).get_section_by_name(".symtab")
        sizes = {each.name: each["st_size"] for each in symbols.iter_symbols()}
    for index, code in enumerate(together.codes):
        rows = [size for name, size in sizes.items() if name.startswith(f"n{index}_row")]
        rows += [size for name, size in sizes.items() if name.startswith(f"n{index}_widen")]
        assert sum(-(-size // 4) * 4 for size in rows) == code.assembly_size

"""C on this machine: equal to the definition, in every compiler, and what is refused."""

import dataclasses
import filecmp
import itertools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jadder
from jadder.integer import HybridProgram, IntegerProgram, Rescale
from jadder.integer.c import export as module
from jadder.integer.c.emit import emit
from jadder.integer.c.plan import reads
from jadder.integer.c.targets import TARGETS
from tests.integer import oracle
from tests.integer.cifar_resnets import resnet
from tests.integer.compiled import check_on_host, compiler
from tests.integer.layers import chains
from tests.integer.programs import images, programs

SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# Several programs for each compilation; shrinking would compile for minutes.
several = settings(max_examples=3, phases=(Phase.explicit, Phase.generate))
batches = given(
    drawn=st.lists(st.one_of(programs(), chains()), min_size=8, max_size=8),
    seed=st.integers(0, 2**32),
)


def export_all(
    drawn: list[IntegerProgram], place: Path, target: str, seed: int, patch: pytest.MonkeyPatch
) -> list[Path]:
    """Exports programs with the oracle's outputs as their vectors."""
    folders = []
    for index, program in enumerate(drawn):
        x = images(program, 2, seed)
        expected = oracle.every_value(program, x)[-1]
        patch.setattr(module.xla, "run", lambda _, __, expected=expected: expected)
        folders.append(place / f"n{index}")
        jadder.export_c(program, folders[-1], target=target, name=f"n{index}", images=x)
    return folders


def has_avx2() -> bool:
    cpus = Path("/proc/cpuinfo")
    return cpus.is_file() and "avx2" in cpus.read_text()


@pytest.mark.parametrize(
    ("target", "flags"),
    [("c99", ()), ("x86", ("-mavx2",)), ("x86", ()), ("aarch64", ())],
    ids=["c99", "avx2", "as the compiler is", "without intrinsics"],
)
def test_sanitized_programs_compute_what_is_defined(
    target: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*compiler("gcc"), *SANITIZED, *flags]
    if flags and not has_avx2():
        pytest.skip("no AVX2 here")
    places = map(str, itertools.count())

    @several
    @batches
    def check(drawn: list[IntegerProgram], seed: int) -> None:
        place = tmp_path / next(places)
        folders = export_all(drawn, place, target, seed, monkeypatch)
        check_on_host(command, folders, place / "build")

    check()


@pytest.mark.parametrize("name", ["gcc", "clang"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_compilers_agree_and_have_nothing_to_say(
    name: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*compiler(name), level]
    drawn = [resnet(1), resnet(1, "multiply")]
    for target in ("c99", "x86", "aarch64"):
        folders = export_all(drawn, tmp_path / target, target, 0, monkeypatch)
        check_on_host(command, folders, tmp_path / target / "build")


def test_make_check_of_the_folder(tmp_path: Path) -> None:
    command = " ".join(compiler("gcc"))
    jadder.export_c(resnet(1), tmp_path / "tiny", name="tiny")
    done = subprocess.run(
        ["make", "check", f"CC={command}"], cwd=tmp_path / "tiny", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny: 3 vectors, 0 of 30 outputs differ" in done.stdout


def test_a_wrong_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = resnet(1)
    monkeypatch.setattr(module.xla, "run", lambda _, x: np.zeros((len(x), 1, 1, 10), np.int32))
    jadder.export_c(program, tmp_path / "n0", name="n0")
    with pytest.raises(AssertionError, match="of 30 outputs differ"):
        check_on_host([*compiler("gcc")], [tmp_path / "n0"], tmp_path / "build")


def test_only_the_interface_is_seen_from_outside(tmp_path: Path) -> None:
    jadder.export_c(resnet(1), tmp_path / "n0", name="n0")
    subprocess.run(
        [*compiler("gcc"), "-c", "-o", tmp_path / "n0.o", tmp_path / "n0" / "n0.c"], check=True
    )
    listed = subprocess.run(
        ["nm", "-g", tmp_path / "n0.o"], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1]: line.split()[-2] for line in listed.stdout.splitlines()}
    assert {name for name, kind in names.items() if kind != "U"} == {"n0_run"}
    assert {name for name, kind in names.items() if kind == "U"} <= {
        "memcpy", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail",
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_program_gives_the_same_files(target: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        jadder.export_c(resnet(1), folder, target=target)
    compared = filecmp.dircmp(*folders)
    assert compared.common_files
    assert compared.left_only == compared.right_only == []
    _, mismatch, errors = filecmp.cmpfiles(*folders, compared.common_files, shallow=False)
    assert mismatch == errors == []


@pytest.mark.parametrize("target", TARGETS)
@given(program=st.one_of(programs(), chains()))
@settings(max_examples=40)
def test_activations_that_live_at_the_same_time_do_not_overlap(
    target: str, program: IntegerProgram
) -> None:
    """But for a result that replaces what its operation adds, position by position."""
    plan = emit(program, TARGETS[target], "n").plan
    operations = program.operations
    last_use = [
        max((i for i, each in enumerate(operations) if value in reads(each)), default=value - 1)
        for value in range(len(operations))
    ]
    spans = [
        None if offset is None else (offset, offset + layout.size)
        for offset, layout in zip(plan.offsets, plan.layouts, strict=True)
    ]
    for new in range(1, len(spans)):
        for old in range(new):
            if spans[new] is None or spans[old] is None or last_use[old] < new - 1:
                continue
            apart = spans[new][1] <= spans[old][0] or spans[old][1] <= spans[new][0]
            replaced = (
                plan.offsets[new] == plan.offsets[old]
                and plan.layouts[new] == plan.layouts[old]
                and last_use[old] == new - 1
                and (isinstance(operations[new - 1], Rescale) or operations[new - 1].input != old)
            )  # fmt: skip
            assert apart or replaced, (old, new)
    assert all(span is None or span[1] <= plan.size for span in spans)


def test_a_residual_is_replaced_by_its_sum() -> None:
    """A ResNet-8 needs two of its largest activations, with their borders, and a row or so."""
    largest = 34 * 34 * 16
    assert emit(resnet(1), TARGETS["c99"], "n").plan.size < 2.2 * largest
    assert emit(resnet(1), TARGETS["cortex-m4"], "n").plan.size < 64 * 1024


def refused(folder: Path, error: type[Exception], match: str, **arguments: Any) -> None:
    before = sorted(folder.parent.rglob("*"))
    program = arguments.pop("program", resnet(1))
    with pytest.raises(error, match=match):
        jadder.export_c(program, folder, **arguments)
    assert sorted(folder.parent.rglob("*")) == before


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    hybrid = object.__new__(HybridProgram)
    refused(folder, TypeError, "IntegerProgram expected, got HybridProgram", program=hybrid)
    refused(folder, ValueError, "unknown target 'cortex-m0'; the targets are c99, cortex-m4",
            target="cortex-m0")  # fmt: skip
    for name in ("", "Model", "2nd", "a-b", "int", "main", "a\n"):
        refused(folder, ValueError, "lower-case C name", name=name)
    shape = np.zeros((1, 32, 32, 1), np.uint8)
    refused(folder, ValueError, r"images must be \(batch, 32, 32, 3\), got \(1, 32, 32, 1\)",
            images=shape)  # fmt: skip
    refused(folder, TypeError, "images must be uint8, got float64", images=np.zeros((1, 32, 32, 3)))
    grid = dataclasses.replace(resnet(1).input, maximum=127)
    narrow = dataclasses.replace(resnet(1), input=grid)
    refused(folder, ValueError, "images up to 127 expected, got 200", program=narrow,
            images=np.full((1, 32, 32, 3), 200, np.uint8))  # fmt: skip


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    jadder.export_c(resnet(1), folder)  # an empty one is fine
    refused(folder, FileExistsError, "must be an empty folder or a new one")
    refused(folder / "model.h", FileExistsError, "must be an empty folder or a new one")

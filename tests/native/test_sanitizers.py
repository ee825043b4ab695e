"""The native kernels under sanitizers, over random shapes, from many threads.

Each driver is a C++ program, `name [seed] [cases] [threads]`, that compares every product with its
literal sum and says which instruction set it ran: `avx2: 600 cases agree`.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

NATIVE = Path(__file__).resolve().parent
SOURCES = NATIVE.parents[1] / "csrc"
DRIVERS = ("fuzz", "integers", "normalize", "programs", "tasks")

# Cases for each of three callers, and threads of the pool they share.
SANITIZERS = {"address,undefined": (120, 4), "thread": (30, 8)}

# The flags of *kernels.cc, which are compiled once for each of these. As in csrc/CMakeLists.txt.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
if IS_X86:
    AVX2 = ("-mavx2", "-mfma")
    AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", *AVX2)
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512}

# What integer programs and products of 16-bit integers know, and take unless less is asked for.
VNNI_INSTRUCTION_SETS = {"avx512vnni": (*AVX512, "-mavx512vnni")} if IS_X86 else {}

# A deadlock ends here; a slow machine does not.
TIMEOUT_SECONDS = 600


class Build(NamedTuple):
    """A compiler with its flags, and the objects that every driver is linked with."""

    command: tuple[str, ...]
    directory: Path
    objects: tuple[Path, ...]


def _run(command: Sequence[str | Path], **environment: str) -> str:
    """The program's output, which is also the message of a failure."""
    done = subprocess.run(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, (
        f"{environment} {command} returned {done.returncode}:\n" + done.stdout[-8000:]
    )
    return done.stdout


def _compile_all(
    command: Sequence[str], jobs: Iterable[tuple[Path, Path, Sequence[str]]]
) -> tuple[Path, ...]:
    """Compiles each (source, object, flags)."""

    def compile_one(job: tuple[Path, Path, Sequence[str]]) -> Path:
        source, target, flags = job
        _run([*command, *flags, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(pool.map(compile_one, jobs))


@pytest.fixture(scope="module", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    sanitizer: str = request.param
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler found: neither g++ nor clang++")
    directory = tmp_path_factory.mktemp("sanitized")
    flags = ["-std=c++17", "-O1", "-g1", f"-I{SOURCES}", *(["-DJADDER_X86"] if IS_X86 else [])]
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    command = (compiler, *flags, *sanitize)

    probe = directory / "probe.cc"
    probe.write_text("int main() {}\n")
    try:
        _run([*command, probe, "-o", directory / "probe"])
        _run([directory / "probe"])
    except AssertionError as error:
        pytest.skip(f"{compiler} cannot build or run programs with {sanitize[0]}: {error}")

    kernels = sorted(SOURCES.glob("*kernels.cc"))
    others = (
        set(SOURCES.glob("*.cc")) - set(kernels) - set(SOURCES.glob("*ffi.cc"))
    )  # XLA's headers
    jobs = [  # the longest first
        (source, directory / f"{source.stem}_{name}.o", extra)
        for name, extra in reversed(INSTRUCTION_SETS.items())
        for source in kernels
    ]
    jobs += [
        (SOURCES / f"{stem}.cc", directory / f"{stem}_{name}.o", extra)
        for name, extra in VNNI_INSTRUCTION_SETS.items()
        for stem in ("kernels", "program_kernels")
    ]
    jobs += [(source, directory / f"{source.stem}.o", ()) for source in sorted(others)]
    return Build(command, directory, _compile_all(command, jobs))


@pytest.mark.parametrize("driver", DRIVERS)
def test_products_under_sanitizer(
    build: Build, driver: str, request: pytest.FixtureRequest
) -> None:
    cases, threads = SANITIZERS[request.node.callspec.params["build"]]
    program = build.directory / driver
    _run([*build.command, NATIVE / f"{driver}.cc", *build.objects, "-o", program])
    ran = set()
    sets = [
        *INSTRUCTION_SETS,
        *(VNNI_INSTRUCTION_SETS if driver in ("fuzz", "programs") else ()),
    ]
    for name in sets:
        output = _run([program, "1", str(cases), str(threads)], JADDER_CPU_ISA=name)
        assert f"{3 * cases} cases agree" in output
        ran.add(output.split(":")[0])
    # A processor without an instruction set runs the next lower one in its stead.
    assert "baseline" in ran

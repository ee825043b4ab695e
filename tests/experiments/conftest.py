"""Tiny data sets in the published formats, and the command line as a child process."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    """An IDX file of unsigned bytes, as http://yann.lecun.com/exdb/mnist describes it."""
    header = bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(20) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (7, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(7),
    }


@pytest.fixture
def mnist_folder(tmp_path: Path, mnist_arrays: dict[str, np.ndarray[Any, Any]]) -> Path:
    """MNIST's four files, two of them compressed."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for i, (name, array) in enumerate(mnist_arrays.items()):
        if i % 2:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return folder


@pytest.fixture
def cifar_arrays() -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {n: (rng.integers(0, 10, 6), rng.integers(0, 256, (6, 32, 32, 3))) for n in names}


@pytest.fixture
def cifar_folder(
    tmp_path: Path, cifar_arrays: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
) -> Path:
    """CIFAR-10's binary version: a label, then the red, green and blue planes of an image."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, (labels, images) in cifar_arrays.items():
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        records = np.concatenate([labels[:, None], planes], axis=1).astype(np.uint8)
        (folder / name).write_bytes(records.tobytes())
    return folder


@pytest.fixture
def quick_compiler() -> Iterator[None]:
    """Compiling takes most of the time of a small run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, Fashion-MNIST and CIFAR-10 as published, where this checkout has them beside it."""
    script = ROOT.parent / "shared" / "data" / "unpack.py"
    if not script.is_file():
        pytest.skip(f"no real data: {script} is absent")
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


Train = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What child processes have compiled, for the next ones."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def train(tmp_path: Path, programs: Path) -> Train:
    """Starts `python -m experiments.train` in a folder of its own.

    XLA shares its threads among the devices that it makes of a processor and adds up in another
    order where they are fewer, so the child has as many devices as this process. It optimises as
    much as this process does, too.
    """
    quick = jax.config.read("jax_disable_most_optimizations")

    def start(*options: object) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *map(str, options)],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(len(jax.devices("cpu"))),
                "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(quick)),
                "JAX_COMPILATION_CACHE_DIR": str(programs),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start

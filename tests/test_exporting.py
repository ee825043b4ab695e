"""Exported models, loaded in another process: with native code, or without any of jadder."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
SERVER = """
import sys
import jax
import numpy as np
{imports}
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
np.save(sys.argv[3], exported.call(np.load(sys.argv[2])))
{checks}
"""
NATIVE = {"imports": "import jadder", "checks": ""}
ALONE = {
    "imports": "",
    "checks": "assert not [name for name in sys.modules if name.split('.')[0] == 'jadder']",
}


class Net(nnx.Module):
    """A convolution, a normalisation and a product."""

    def __init__(self, rngs):
        self.conv = jadder.AdderConv(2, 4, (3, 3), rngs=rngs)
        self.norm = jadder.models.BatchNorm(4, rngs=rngs)
        self.head = jadder.AdderLinear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@pytest.fixture(scope="module")
def net():
    net = Net(nnx.Rngs(0))
    net.eval()
    return net


def run_elsewhere(exported, x, folder, **server):
    (folder / "exported").write_bytes(exported.serialize())
    np.save(folder / "x.npy", x)
    paths = [folder / name for name in ("exported", "x.npy", "y.npy")]
    path = str(ROOT) if server is NATIVE else ""
    subprocess.run(
        [sys.executable, "-c", SERVER.format(**server), *paths], check=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    return np.load(paths[2])


def exported(model, **options):
    (batch,) = jax.export.symbolic_shape("batch")
    graphdef, state = nnx.split(model)
    function = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    return jax.export.export(function, **options)(
        jax.ShapeDtypeStruct((batch, 6, 5, 2), jnp.float32)
    )


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native code here")
def test_native_products_in_another_process(net, tmp_path):
    with pytest.raises(ValueError, match="jadder_conv"):
        exported(net)
    file = exported(net, disabled_checks=jadder.DISABLED_CHECKS)
    assert "jadder_conv" in file.mlir_module()
    x = np.random.default_rng(0).normal(size=(3, 6, 5, 2)).astype(np.float32)
    np.testing.assert_array_equal(run_elsewhere(file, x, tmp_path, **NATIVE), net(jnp.asarray(x)))


def test_xla_products_in_a_process_without_jadder(net, tmp_path):
    portable = nnx.clone(net)
    assert jadder.set_implementation(portable, "xla") == 2
    file = exported(portable, platforms=("cpu", "cuda", "tpu"))
    assert "@jadder_" not in file.mlir_module()
    x = np.random.default_rng(0).normal(size=(3, 6, 5, 2)).astype(np.float32)
    y = run_elsewhere(file, x, tmp_path, **ALONE)
    np.testing.assert_allclose(y, net(jnp.asarray(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native code here")
@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [(jnp.float32, "cpu"), (jnp.float32, "cpu_int16"), (jnp.int8, "cpu")],
)
def test_every_native_product_is_among_the_checks(dtype, implementation):
    """Products and both gradients, of matmuls and convolutions, of floats and of bytes."""
    x, w = jnp.ones((1, 4, 4, 2), dtype), jnp.ones((3, 3, 2, 3), dtype)
    wide = None if dtype == jnp.float32 else jnp.int32

    options = {"rule": jadder.SIGN, "implementation": implementation}
    kind = "integer" if wide else "int16" if implementation == "cpu_int16" else ""

    def products(x, w):
        y = jadder.adder_conv(x, w, preferred_element_type=wide, **options)
        flat = jadder.adder_matmul(x[0, 0], w[0, 0], preferred_element_type=wide, **options)
        total = y.sum() + flat.sum()
        if wide:
            return total
        total += jadder.euclid_conv(x, w, implementation=implementation).sum()
        return total + jadder.euclid_matmul(x[0, 0], w[0, 0], implementation=implementation).sum()

    function = products if wide else jax.value_and_grad(products, (0, 1))
    file = jax.export.export(jax.jit(function), disabled_checks=jadder.DISABLED_CHECKS)(x, w)
    called = {target for target in cpu.TARGETS if f"@jadder_{target}(" in file.mlir_module()}
    kinds = {name: next((k for k in ("integer", "int16") if name.startswith(k)), "")
             for name in cpu.TARGETS}  # fmt: skip
    assert called == {name for name, its in kinds.items() if its == kind}


def test_a_training_step_without_native_products_runs_anywhere():
    """Batch normalisation's native code has no name by which it is turned off."""
    portable = Net(nnx.Rngs(0))
    assert jadder.set_implementation(portable, "xla") == 2
    graphdef, state = nnx.split(portable)

    @jax.jit
    def gradient(state, x):
        return jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graphdef, s)(x))))(state)

    x = jnp.ones((3, 6, 5, 2)) * jnp.arange(3.0)[:, None, None, None]
    kinds = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, x))
    file = jax.export.export(gradient, platforms=("cpu", "cuda"))(*kinds)
    assert "@jadder_" not in file.mlir_module()
    found, expected = file.call(state, x), gradient(state, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)

"""Settings that all tests share."""

import jax
import pytest
from hypothesis import HealthCheck, settings

# Before any array exists: sharding tests need several devices, and one more costs nothing.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation makes the first example of each shape slow, whatever the example.
settings.register_profile(
    "jadder",
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("short", settings.get_profile("jadder"), max_examples=5)
settings.load_profile("jadder")


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Each module's programs are its own; kept, they would fill the memory of a long session."""
    yield
    jax.clear_caches()

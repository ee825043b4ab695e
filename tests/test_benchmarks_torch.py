"""The benchmark beside PyTorch compares networks that compute the same."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")

import torch

from benchmarks.torch import __main__ as command
from benchmarks.torch import adding, multiplying, networks
from benchmarks.torch.turns import Process, Workload, in_turns, turn
from jadder import models


def separate(state):
    """A state dict with a layer each for queries, keys and values, and jadder's names."""
    arrays = {}
    for name, value in state.items():
        if name.endswith("attention.qkv.weight"):
            for part, rows in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                arrays[name.replace("qkv", f"{part}.product")] = rows
            continue
        for layer in ("patch_embedding", "attention.out", "mlp_in", "mlp_out", "head"):
            name = name.replace(f"{layer}.", f"{layer}.product.")
        arrays[name] = value
    return arrays


@pytest.mark.parametrize(("name", "size"), [("resnet20", 8), ("resnet18", 32), ("vit", 8)])
def test_the_networks_are_those_of_jadder(name, size):
    torch.manual_seed(0)
    network = networks.create(name, size)
    images = np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        network(torch.randn(4, 3, size, size))  # statistics that are not those of the start
        network.eval()
        logits = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    workload = Workload(name, 4, size)
    model = models.create(
        name, num_classes=workload.num_classes, family="conv", image_size=size, rngs=nnx.Rngs(0)
    )
    state = {key: value.numpy() for key, value in network.state_dict().items()}
    models.load_torch_state(model, separate(state))
    model.eval()
    np.testing.assert_allclose(model(jnp.asarray(images)), logits, rtol=1e-3, atol=1e-4)


def test_a_step_of_pytorch_trains():
    workload = Workload("resnet20", 4, 8, ("step",))
    network = networks.create("resnet20", 8)
    before = network.fc.weight.detach().clone()
    step = multiplying.training_step(
        network, torch.randn(4, 3, 8, 8), torch.arange(4), compiled=False
    )
    step()
    assert (network.fc.weight != before).any()
    assert len(turn(multiplying.make(workload, "inference", compiled=False), 0.0)) == 2


def test_a_step_of_ours_trains_from_where_the_last_one_ended():
    call = adding.training(Workload("lenet5", 4, 12), adding.families()["adder"])
    call()
    call()
    assert set(adding.families()) >= {"conv", "adder"}


def test_programs_have_their_turns_in_processes_of_their_own():
    workload = Workload("lenet5", 2, 12, ("inference",))
    process = Process("benchmarks.torch.adding", workload)
    try:
        assert process.about["jax"] == jax.__version__
        times = in_turns({"JAX": process}, rounds=2, seconds=0.0)
    finally:
        process.close()
    assert {("JAX", "inference, conv"), ("JAX", "inference, adder")} <= set(times)
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in times.values())


def test_a_process_that_ends_early_is_said():
    with pytest.raises(RuntimeError, match="ended with status 1"):
        Process("benchmarks.torch.adding", Workload("no such network", 2, 8))


def test_the_table_is_of_minima(tmp_path, capsys, monkeypatch):
    class Fake:
        about = {"programs": ["step, eager"], "refused": {}}  # noqa: RUF012

        def __init__(self, module, workload, environment):
            assert workload == Workload("vit", 3, 8, ("step",))

        def turn(self, program, seconds):
            return [0.25, 0.5]

        def close(self):
            pass

    monkeypatch.setattr(command, "Process", Fake)
    file = tmp_path / "figures.json"
    command.main(["--network", "vit", "--batch", "3", "--size", "8", "--programs", "step",
                  "--rounds", "2", "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    assert [row["ms"] for row in report["rows"]] == [250.0, 250.0]
    assert report["rows"][0]["median"] == 375.0
    assert "family" in report["processor"] or report["processor"]
    assert "PyTorch: step, eager" in capsys.readouterr().out

"""Serves the programs of a multiplying network in PyTorch, channels last, eager and compiled."""

import contextlib
import logging
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch import networks
from benchmarks.torch.turns import Call, Workload, serve, threads


def main(argument: str) -> None:
    """Serves a workload, as JSON, to the process that began this one."""
    workload = Workload.from_json(argument)
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(threads())
    calls: dict[str, Call] = {}
    refusals: dict[str, str] = {}
    for program in workload.programs:
        for way in ("eager", "compiled"):
            call = make(workload, program, compiled=way == "compiled")
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    call()
            except Exception as error:
                if way == "eager":
                    raise
                refusals[f"{program}, {way}"] = f"{type(error).__name__}: {str(error)[:200]}"
            else:
                calls[f"{program}, {way}"] = call
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "refused": refusals}
    serve(about, calls)


def make(workload: Workload, program: str, *, compiled: bool) -> Call:
    """A program that is ready to be called; what it computes goes nowhere."""
    torch.manual_seed(0)
    network = networks.create(workload.network, workload.size)
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(workload.batch, 3, workload.size, workload.size)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(workload.batch) % 10
    if program == "inference":
        return inference(network, images, compiled=compiled)
    return training_step(network, images, labels, compiled=compiled)


def inference(network: nn.Module, images: Tensor, *, compiled: bool) -> Call:
    network.eval()
    function = torch.compile(network) if compiled else network

    def call() -> None:
        with torch.inference_mode():
            function(images)

    return call


def training_step(network: nn.Module, images: Tensor, labels: Tensor, *, compiled: bool) -> Call:
    network.train()
    function = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(function(images), labels).backward()
        optimizer.step()

    return call


if __name__ == "__main__":
    main(sys.argv[1])

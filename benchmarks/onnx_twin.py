"""A multiplying ResNet of the library as ONNX graphs, for ONNX Runtime: float32 and int8."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from jadder.models import ResNet

_OPSET = 21


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU, with all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def export(model: ResNet, size: int, path: Path) -> None:
    """Writes the network in evaluation mode, its batch norms folded into the products.

    The graph takes "images", float32 (batch, channels, size, size), and gives "logits".
    """
    graph = _Graph()
    x = graph.convolve("images", model.conv1, model.bn1, relu=True)
    if model.stem == "imagenet":
        x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage in range(model.num_stages):
        for block in getattr(model, f"layer{stage + 1}"):
            x = graph.block(x, block)
    x = graph.add("Flatten", graph.add("GlobalAveragePool", x))
    weights, bias = _folded(model.fc, model.bn2)
    x = graph.add("Gemm", x, graph.constant(weights), graph.constant(bias))
    shape: Any = ["batch", model.channels, size, size]
    made = helper.make_graph(
        graph.nodes,
        "resnet",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", len(bias)])],
        graph.constants,
    )
    written = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)])
    onnx.checker.check_model(written)
    onnx.save(written, path)


def quantize(path: Path, images: NDArray[np.float32], to: Path) -> None:
    """int8 as ONNX Runtime makes it: static, uint8 activations, int8 weights for each channel."""
    prepared = to.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared))
    quantize_static(
        str(prepared),
        str(to),
        _Batches(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: NDArray[np.float32]) -> None:
        self.batches: Iterator[Any] = iter(np.array_split(images, max(1, len(images) // 32)))

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names = (f"value_{i}" for i in itertools.count())

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = next(self.names)
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, array: NDArray[Any]) -> str:
        name = next(self.names)
        self.constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def convolve(self, x: str, conv: Any, norm: Any, *, relu: bool = False) -> str:
        kernel, bias = _folded(conv, norm)
        height, width = kernel.shape[:2]
        strides = conv.strides if isinstance(conv.strides, tuple) else (conv.strides,) * 2
        side = conv.padding if isinstance(conv.padding, int) else None
        if side is None:
            raise ValueError(f"padding of one number expected, got {conv.padding!r}")
        y = self.add(
            "Conv",
            x,
            self.constant(kernel.transpose(3, 2, 0, 1)),
            self.constant(bias),
            kernel_shape=[height, width],
            strides=list(strides),
            pads=[side] * 4,
        )
        return self.add("Relu", y) if relu else y

    def block(self, x: str, block: Any) -> str:
        shortcut = x if block.downsample is None else self.convolve(x, *block.downsample)
        convs = [name for name in ("conv1", "conv2", "conv3") if hasattr(block, name)]
        for name in convs:
            norm = getattr(block, name.replace("conv", "bn"))
            x = self.convolve(x, getattr(block, name), norm, relu=name != convs[-1])
        return self.add("Relu", self.add("Add", x, shortcut))


def _folded(product: Any, norm: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Kernel and bias of a product and the batch norm after it."""
    scale = np.asarray(norm.scale[...]) / np.sqrt(np.asarray(norm.var[...]) + norm.epsilon)
    offset = 0.0 if product.bias is None else np.asarray(product.bias[...])
    bias = (offset - np.asarray(norm.mean[...])) * scale + np.asarray(norm.bias[...])
    return np.asarray(product.kernel[...]) * scale, bias

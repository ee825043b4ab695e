"""The benchmark of integer programs compares what computes the same."""

import json

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from benchmarks import integer, onnx_twin


@pytest.mark.parametrize(("name", "size"), [("resnet20", 16), ("resnet18", 40)])
def test_the_twin_computes_what_the_network_does(name, size, tmp_path):
    images = integer.normalized(integer.random_pixels(4, size, seed=1))
    model = integer.random_network(name, "conv", images)
    expected = np.asarray(model(images))
    onnx_twin.export(model, size, tmp_path / "float.onnx")
    onnx_twin.quantize(
        tmp_path / "float.onnx", images.transpose(0, 3, 1, 2), tmp_path / "int8.onnx"
    )
    logits = {}
    for kind in ("float", "int8"):
        session = onnx_twin.session(tmp_path / f"{kind}.onnx", threads=1)
        (logits[kind],) = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(logits["float"], expected, rtol=0, atol=2e-3 * expected.std())
    assert np.corrcoef(logits["int8"].ravel(), expected.ravel())[0, 1] > 0.8


def test_it_runs(tmp_path, capsys):
    file = tmp_path / "figures.json"
    integer.main(["--size", "16", "--batches", "2", "--rounds", "1", "--seconds", "0.001",
                  "--json", str(file)])  # fmt: skip
    report = json.loads(file.read_text())
    assert len(report["rows"]) == 6
    assert all(row["images_per_second"] > 0 for row in report["rows"])
    assert "onnxruntime int8" in capsys.readouterr().out

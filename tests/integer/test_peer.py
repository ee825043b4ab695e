"""A network that others trained in PyTorch, in bytes: the same answers, down to four bits."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import jadder
from jadder.integer import Convolution, xla
from jadder.models import load_torch_state, resnet20

PEER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "peer_resnet20_adder.npz"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

pytestmark = pytest.mark.skipif(not PEER.exists(), reason=f"no {PEER.name} in ../shared/data")


@pytest.fixture(scope="module")
def peer():
    with np.load(PEER) as file:
        return dict(file)


@pytest.fixture(scope="module")
def model(peer):
    state = {key[6:]: array for key, array in peer.items() if key.startswith("state/")}
    model = nnx.eval_shape(lambda: resnet20(rngs=nnx.Rngs(0)))
    load_torch_state(model, state)
    return model


@pytest.mark.parametrize(("bits", "most_changed", "most_error"), [(8, 1, 0.08), (4, 5, 0.3)])
def test_few_answers_change(peer, model, bits, most_changed, most_error):
    images = peer["x_uint8"].transpose(0, 2, 3, 1)
    program = jadder.quantize(model, images, bits=bits, mean=MEAN, std=STD)
    logits, expected = np.asarray(program(images)), peer["eval/logits_f64"].reshape(64, 10)
    assert (logits.argmax(-1) != expected.argmax(-1)).sum() <= most_changed
    assert abs(logits - expected).mean() < most_error * expected.std()
    products = [each for each in program.operations if isinstance(each, Convolution)]
    assert [each.product for each in products].count("adder") == 20
    # Batch norm, ReLU and residuals are in the products' requantizations: one operation for each.
    pools = len(program.operations) - len(products)
    assert pools == (1 if bits == 8 else 8)
    outputs = xla.run(program, images[:2]).reshape(2, 10)
    np.testing.assert_allclose(logits[:2], outputs * program.output.scale[0], rtol=1e-6)

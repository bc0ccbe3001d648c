"""The variants that PyTorch can express, and LRN, against PyTorch."""

import jax
import numpy as np
import pytest

from flax_alexnet import AlexNet, local_response_normalization
from tests.parity.comparison import TOLERANCE, assert_parity, relative_error

torch = pytest.importorskip("torch")
from tests.parity.torch_models import (  # noqa: E402
    caffe,
    caffenet,
    cuda_convnet_11pct,
    cuda_convnet_13pct,
    cuda_convnet_18pct,
    cuda_convnet_19pct,
    cuda_convnet_80sec,
    original,
    paper,
    run_torch,
    torchvision,
)

nn = torch.nn


@pytest.mark.parametrize(
    ("layers_of", "image_size", "flattened"),
    [
        (paper, 224, (6, 6, 256)),
        (caffe, 227, (6, 6, 256)),
        (caffenet, 227, (6, 6, 256)),
        (torchvision, 224, (6, 6, 256)),
        (original, 224, (6, 6, 256)),
        (cuda_convnet_80sec, 32, (4, 4, 64)),
        (cuda_convnet_19pct, 32, (4, 4, 64)),
        (cuda_convnet_18pct, 32, (4, 4, 64)),
        (cuda_convnet_13pct, 24, (6, 6, 32)),
        (cuda_convnet_11pct, 24, (6, 6, 32)),
    ],
)
def test_variant(layers_of, image_size, flattened):
    model = AlexNet(variant=layers_of.__name__, num_classes=10 if image_size <= 32 else 1000)
    with torch.device("meta"):  # no time spent on initial values that are replaced
        layers = layers_of()

    def reference(params, images, labels):
        return run_torch(layers, params, images, labels, flattened)

    assert_parity(model, image_size, reference)


@pytest.mark.parametrize("size", [1, 3, 5, 11, 63])
@pytest.mark.parametrize(
    ("alpha", "beta", "k"), [(1e-4, 0.75, 1.0), (2.0, 0.5, 2.0), (1.0, 1.3, 0.5)]
)
def test_local_response_normalization(size, alpha, beta, k):
    """PyTorch divides alpha by its window, and takes all of the window rather than half."""
    rng = np.random.default_rng(size)
    scale = (size * k / alpha) ** 0.5  # at which the sum of squares counts as much as the bias
    x = (scale * rng.standard_normal((2, 5, 7, 32))).astype(np.float32)
    weight = rng.standard_normal(x.shape, np.float32)
    ours, pullback = jax.vjp(
        lambda x: local_response_normalization(x, (size - 1) // 2, k, alpha / size, beta), x
    )
    theirs_in = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    theirs = nn.LocalResponseNorm(size, alpha, beta, k)(theirs_in)
    theirs.backward(torch.tensor(weight.transpose(0, 3, 1, 2)))
    assert relative_error(ours, theirs.detach().permute(0, 2, 3, 1)) <= TOLERANCE
    assert relative_error(pullback(weight)[0], theirs_in.grad.permute(0, 2, 3, 1)) <= TOLERANCE

"""LPIPS against PyTorch: the published definition, written with PyTorch's own layers."""

import jax
import numpy as np
import pytest
from PIL import Image

from flax_alexnet import AlexNet, lpips
from flax_alexnet.models.lpips import signed
from flax_alexnet.weights.load import load
from tests.parity.comparison import TOLERANCE, random_parameters, relative_error

torch = pytest.importorskip("torch")
from tests.parity.torch_models import to_torch  # noqa: E402

nn = torch.nn

WINDOWS = {"conv1": (4, 2), "conv2": (1, 2), "conv3": (1, 1), "conv4": (1, 1), "conv5": (1, 1)}


def reference(params, heads, a, b, spatial):
    """Torchvision's five stages, unit vectors, 1×1 heads; `a` and `b` are NHWC, as is the map."""

    def stages(x):
        shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
        x = (x - shift) / scale
        for name, (stride, padding) in WINDOWS.items():
            if name in ("conv2", "conv3"):
                x = nn.functional.max_pool2d(x, 3, 2)
            kernel = torch.tensor(to_torch(params[name]["kernel"], None))
            bias = torch.tensor(params[name]["bias"])
            x = nn.functional.conv2d(x, kernel, bias, stride, padding).relu()
            yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    a, b = (torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b))
    total = 0
    for stage, (of_a, of_b) in enumerate(zip(stages(a), stages(b), strict=True)):
        head = torch.tensor(heads[f"lin{stage}"].transpose(3, 2, 0, 1))
        distances = nn.functional.conv2d((of_a - of_b).square(), head)
        if spatial:
            distances = nn.functional.interpolate(distances, a.shape[2:], mode="bilinear")
            total = total + distances[:, 0]
        else:
            total = total + distances.mean((1, 2, 3))
    return total.numpy()


@pytest.fixture(scope="module")
def params():
    return random_parameters(AlexNet("torchvision"), 64)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (131, 64), (224, 224)])
def test_lpips(params, size, spatial):
    rng = np.random.default_rng(0)
    heads = {
        f"lin{stage}": rng.uniform(0, 1, (1, 1, params[name]["bias"].size, 1)).astype(np.float32)
        for stage, name in enumerate(WINDOWS)
    }
    a, b = (rng.uniform(-1, 1, (2, *size, 3)).astype(np.float32) for _ in range(2))
    ours = jax.jit(lpips, static_argnames="spatial")(params, heads, a, b, spatial=spatial)
    assert relative_error(ours, reference(params, heads, a, b, spatial)) <= TOLERANCE


@pytest.mark.parametrize(("other", "expected"), [("p0", 0.72188), ("p1", 0.13757)])
def test_the_real_trunk(shared_data, other, expected):
    """The example images of LPIPS's reference code; the values are PyTorch's, by `reference`."""
    folder = shared_data / "alexnet_owt"
    pretrained = load(folder / "features_and_lpips.npz")
    a, b = (
        signed(np.asarray(Image.open(folder / f"ex_{name}.png").convert("RGB"))[None])
        for name in ("ref", other)
    )
    theirs = reference(
        pretrained.params, pretrained.lpips_heads, np.asarray(a), np.asarray(b), spatial=False
    )
    assert round(float(theirs[0]), 5) == expected
    ours = jax.jit(lpips)(pretrained.params, pretrained.lpips_heads, a, b)
    assert relative_error(ours, theirs) <= TOLERANCE

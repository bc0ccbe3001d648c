"""The variants that PyTorch can express, in its own layers, and the way between both layouts."""

import pytest

torch = pytest.importorskip("torch")
nn = torch.nn


class TowerNorm(nn.Module):
    """The paper's normalization: within each tower, alpha not divided by n as PyTorch does."""

    def __init__(self, alpha=5 * 1e-4):
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=alpha, beta=0.75, k=2.0)

    def forward(self, x):
        return torch.cat([self.norm(tower) for tower in x.chunk(2, dim=1)], dim=1)


class MapNorm(nn.Module):
    """cuda-convnet's `rnorm`: the mean of squares over a window, in which padding counts."""

    def __init__(self, size, scale):
        super().__init__()
        self.mean = nn.AvgPool2d(size, 1, padding=size // 2, count_include_pad=True)
        self.scale = scale

    def forward(self, x):
        return x / (1 + self.scale * self.mean(x**2)) ** 0.75


class Local(nn.Module):
    """cuda-convnet's `local`, then ReLU: a kernel and a bias for each place."""

    def __init__(self, channels, features, side, places):
        super().__init__()
        self.unfold = nn.Unfold(side, padding=side // 2)
        shape = (places * places, features, channels * side * side)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[:2]))

    def forward(self, x):
        patches = self.unfold(x).permute(2, 0, 1)  # (places, images, channels · side · side)
        y = torch.baddbmm(self.bias[:, None], patches, self.weight.transpose(1, 2))
        return nn.functional.relu(y.permute(1, 2, 0).unflatten(2, x.shape[2:]))


def conv(*args, **kwargs):
    return nn.Sequential(nn.Conv2d(*args, **kwargs), nn.ReLU())


def dense(*args):
    return nn.Sequential(nn.Flatten(), nn.Linear(*args), nn.ReLU())


def last(*args):
    return nn.Sequential(nn.Flatten(), nn.Linear(*args))


def caffe_norm():
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)


def caffe_pool():
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def inside_average():
    return nn.AvgPool2d(3, 2, ceil_mode=True, count_include_pad=False)


def towers():
    """What `paper`, `caffe` and `caffenet` have in common; 13 × 13 pixels fit pool5 either way."""
    return {
        "conv3": conv(256, 384, 3, padding=1),
        "conv4": conv(384, 384, 3, padding=1, groups=2),
        "conv5": conv(384, 256, 3, padding=1, groups=2),
        "pool5": caffe_pool(),
        "fc6": dense(9216, 4096),
        "fc7": dense(4096, 4096),
        "logits": last(4096, 1000),
    }


def paper():
    return {
        "conv1": nn.Sequential(nn.ZeroPad2d((0, 3, 0, 3)), conv(3, 96, 11, stride=4)),
        "norm1": TowerNorm(),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": conv(96, 256, 5, padding=2, groups=2),
        "norm2": TowerNorm(),
        "pool2": nn.MaxPool2d(3, 2),
        **towers(),
    }


def caffe():
    return {
        "conv1": conv(3, 96, 11, stride=4),
        "norm1": caffe_norm(),
        "pool1": caffe_pool(),
        "conv2": conv(96, 256, 5, padding=2, groups=2),
        "norm2": caffe_norm(),
        "pool2": caffe_pool(),
        **towers(),
    }


def caffenet():
    return {
        "conv1": conv(3, 96, 11, stride=4),
        "pool1": caffe_pool(),
        "norm1": caffe_norm(),
        "conv2": conv(96, 256, 5, padding=2, groups=2),
        "pool2": caffe_pool(),
        "norm2": caffe_norm(),
        **towers(),
    }


def torchvision():
    return {
        "conv1": conv(3, 64, 11, stride=4, padding=2),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": conv(64, 192, 5, padding=2),
        "pool2": nn.MaxPool2d(3, 2),
        "conv3": conv(192, 384, 3, padding=1),
        "conv4": conv(384, 256, 3, padding=1),
        "conv5": conv(256, 256, 3, padding=1),
        "pool5": nn.MaxPool2d(3, 2),
        "avgpool": nn.AdaptiveAvgPool2d(6),
        "fc6": dense(9216, 4096),
        "fc7": dense(4096, 4096),
        "logits": last(4096, 1000),
    }


def original():
    """Model #145: ReLU after the pooling of linear maps; alpha is divided by n, as in PyTorch."""
    return {
        "conv1": nn.Sequential(nn.ZeroPad2d((0, 3, 0, 3)), nn.Conv2d(3, 96, 11, stride=4)),
        "norm1": TowerNorm(alpha=1e-4),
        "pool1": nn.Sequential(nn.MaxPool2d(3, 2), nn.ReLU()),
        "conv2": conv(96, 256, 5, padding=2, groups=2),
        "norm2": TowerNorm(alpha=1e-4),
        "map_norm2": MapNorm(5, 1e-3),
        "pool2": nn.MaxPool2d(3, 2),
        **towers(),
        "conv5": nn.Conv2d(384, 256, 3, padding=1, groups=2),
        "pool5": nn.Sequential(caffe_pool(), nn.ReLU()),
    }


def three_convolutions():
    return {
        "conv1": conv(3, 32, 5, padding=2),
        "pool1": caffe_pool(),
        "conv2": conv(32, 32, 5, padding=2),
        "pool2": inside_average(),
        "conv3": conv(32, 64, 5, padding=2),
        "pool3": inside_average(),
    }


def cuda_convnet_80sec():
    return {**three_convolutions(), "fc64": dense(1024, 64), "logits": last(64, 10)}


def cuda_convnet_19pct():
    return {**three_convolutions(), "logits": last(1024, 10)}


def cuda_convnet_18pct():
    layers = three_convolutions()
    return {
        **{name: layers[name] for name in ("conv1", "pool1")},
        "map_norm1": MapNorm(3, 5e-5),
        **{name: layers[name] for name in ("conv2", "pool2")},
        "map_norm2": MapNorm(3, 5e-5),
        **{name: layers[name] for name in ("conv3", "pool3")},
        "logits": last(1024, 10),
    }


def cuda_convnet_13pct():
    return {
        "conv1": conv(3, 64, 5, padding=2),
        "pool1": caffe_pool(),
        "conv2": conv(64, 64, 5, padding=2),
        "pool2": caffe_pool(),
        "local3": Local(64, 32, 3, 6),
        "local4": Local(32, 32, 3, 6),
        "logits": last(1152, 10),
    }


def cuda_convnet_11pct():
    def norm():
        return nn.LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1.0)

    return {
        "conv1": conv(3, 64, 5, padding=2),
        "pool1": caffe_pool(),
        "norm1": norm(),
        "conv2": conv(64, 64, 5, padding=2),
        "norm2": norm(),
        "pool2": caffe_pool(),
        "local3": Local(64, 64, 3, 6),
        "local4": Local(64, 32, 3, 6),
        "logits": last(1152, 10),
    }


def to_torch(kernel, spatial):
    """HWIO to OIHW; (in, out) to (out, in), with a flattened `spatial` image from HWC to CHW.

    Kernels of a locally connected layer, (h', w', h, w, in, out), become (h'·w', out, in·h·w).
    """
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    if kernel.ndim == 6:
        places, out = kernel.shape[0] * kernel.shape[1], kernel.shape[-1]
        return kernel.transpose(0, 1, 5, 4, 2, 3).reshape(places, out, -1)
    if spatial is None:
        return kernel.T
    out = kernel.shape[-1]
    return kernel.reshape(*spatial, out).transpose(3, 2, 0, 1).reshape(out, -1)


def to_flax(weight, spatial, local=None):
    """The inverse of `to_torch`, for gradients; `local` is the shape of such a kernel."""
    if local:
        height, width, side, _, channels, out = local
        weight = weight.reshape(height, width, out, channels, side, side)
        return weight.transpose(0, 1, 4, 5, 3, 2)
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0)
    if spatial is None:
        return weight.T
    height, width, channels = spatial
    out = weight.shape[0]
    return weight.reshape(out, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, out)


def run_torch(layers, params, images, labels, flattened):
    """Activations (NHWC) and gradients (Flax's layout) of named PyTorch layers, one after another.

    `flattened` is the (h, w, c) that the first dense layer reads.
    """
    (last_name,) = params.keys() - layers.keys()
    names = [last_name if name == "logits" else name for name in layers]
    dense_names = [name for name in names if name in params and params[name]["kernel"].ndim == 2]
    spatial = {dense_names[0]: flattened}
    weighted = {}
    for name, module in layers.items():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear | Local):
                key = last_name if name == "logits" else name
                weight = torch.tensor(to_torch(params[key]["kernel"], spatial.get(key)))
                assert weight.shape == part.weight.shape
                part.weight = nn.Parameter(weight)
                part.bias = nn.Parameter(torch.tensor(params[key]["bias"]).view(part.bias.shape))
                weighted[key] = part

    x = torch.tensor(images.transpose(0, 3, 1, 2))
    activations = {}
    for name, module in layers.items():
        x = module(x)
        activation = x.detach().numpy()
        activations[name] = activation.transpose(0, 2, 3, 1) if x.ndim == 4 else activation
    nn.functional.cross_entropy(x, torch.tensor(labels)).backward()
    gradients = {}
    for key, part in weighted.items():
        local = params[key]["kernel"].shape if isinstance(part, Local) else None
        gradients[f"{key}/kernel"] = to_flax(part.weight.grad.numpy(), spatial.get(key), local)
        gradients[f"{key}/bias"] = part.bias.grad.numpy().reshape(params[key]["bias"].shape)
    return activations, gradients

"""Weight files as their own systems write them: our model gives the logits that they give.

Each model is built in its own system's formulation, with values drawn in that system's own order,
and fed with images preprocessed as there. Colours have unequal ranges, so that no channel can be
mistaken for another, and every order that could be confused is shown to matter.
"""

import argparse
import functools
import io
import pickle
import shutil
import struct
from typing import ClassVar

import jax
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from flax_alexnet.commands.convert import main
from flax_alexnet.weights.labels import imagenet_labels
from flax_alexnet.weights.load import load
from tests.parity.comparison import TOLERANCE, relative_error

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from tests.parity.torch_models import caffe, caffenet  # noqa: E402

nn = torch.nn
NOTICEABLE = 1000 * TOLERANCE  # what a wrong order must move the logits by, at least


@pytest.fixture(scope="module")
def images():
    colours = np.random.default_rng(0).random((2, 256, 256, 3)) * [255, 150, 60]
    return colours.astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder that is removed at once: files of full size would fill up the disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def randomize(modules):
    """Values at which half of the units live, the biases matter, and the logits are small."""
    generator = torch.Generator().manual_seed(0)
    layers = [m for module in modules for m in module.modules() if hasattr(m, "weight")]
    for layer in layers:
        layer.to_empty(device="cpu")
        fan_in = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=(2 / fan_in) ** 0.5, generator=generator)
        nn.init.normal_(layer.bias, generator=generator)
    nn.init.normal_(layers[-1].weight, std=0.001, generator=generator)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, images):
    return model.apply({"params": params}, images)


def logits_of(pretrained, images):
    return np.asarray(apply(pretrained.model, pretrained.params, pretrained.preprocess(images)))


@torch.no_grad()
def run(modules, x):
    x = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    for module in modules:
        x = module(x)
    return x.numpy()


class TorchvisionAlexNet(nn.Module):
    """torchvision's `alexnet`, with its names."""

    def __init__(self):
        super().__init__()
        relu, pool = nn.ReLU, nn.MaxPool2d
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), relu(), pool(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), relu(), pool(3, 2)),
            *(nn.Conv2d(192, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 256, 3, 1, 1), relu()),
            *(nn.Conv2d(256, 256, 3, 1, 1), relu(), pool(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(9216, 4096), relu()),
            *(nn.Dropout(), nn.Linear(4096, 4096), relu()),
            nn.Linear(4096, 1000),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def torchvision_input(images):
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    crops = images[:, 16:240, 16:240].astype(np.float32) / 255
    return ((crops - mean) / std).transpose(0, 3, 1, 2)


def test_torchvision(folder, images, capsys):
    with torch.device("meta"):
        model = TorchvisionAlexNet().eval()
    randomize([model])
    state = model.state_dict()
    files = {name: folder / name for name in ("new.pth", "old.pth", "names.safetensors")}
    torch.save(state, files["new.pth"])
    torch.save(state, files["old.pth"], _use_new_zipfile_serialization=False)
    save_file(state, files["names.safetensors"], {"format": "pt"})

    ours = folder / "ours.safetensors"
    assert main([str(files["new.pth"]), str(ours)]) == 0
    assert "61,100,840 parameters" in capsys.readouterr().out
    pretrained = load(ours)
    assert pretrained.label_names == imagenet_labels()
    logits = logits_of(pretrained, images)
    x = torchvision_input(images)
    assert relative_error(logits, run([model], x)) <= TOLERANCE
    assert relative_error(logits, run([model], x[:, ::-1])) > NOTICEABLE

    for name in ("old.pth", "names.safetensors"):
        jax.tree.map(np.testing.assert_array_equal, load(files[name]).params, pretrained.params)

    assert main([str(ours), str(folder / "back.pth"), "--format", "torchvision"]) == 0
    back = torch.load(folder / "back.pth", weights_only=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)

    with torch.no_grad():  # last, since it changes the model in its place
        fc6 = model.classifier[1].weight
        fc6.copy_(fc6.reshape(-1, 6, 6, 256).permute(0, 3, 1, 2).reshape(4096, 9216).clone())
    assert relative_error(logits, run([model], x)) > NOTICEABLE


@pytest.mark.parametrize("is_new", [True, False])
def test_a_checkpoint_of_a_training(folder, is_new):
    """What a program of training saves beside the model is skipped, whatever it is."""
    with torch.device("meta"):
        model = TorchvisionAlexNet()
    del model.classifier
    model = model.to_empty(device="cpu")
    randomize([model])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.features(torch.ones(1, 3, 64, 64)).sum().backward()
    optimizer.step()
    value = {
        "model": nn.DataParallel(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1, 9).state_dict(),
        "args": argparse.Namespace(device=torch.device("cpu"), dtype=torch.float16, output=folder),
        "random": (torch.get_rng_state(), np.random.default_rng(0)),
        "layers": [model.features[0]],
        "best": np.float64(0.5),
        "complex": torch.ones(2, dtype=torch.complex64) if is_new else None,
    }
    path = folder / "checkpoint.pth.tar"
    torch.save(value, path, _use_new_zipfile_serialization=is_new)
    pretrained = load(path)
    for layer, number in zip(pretrained.params, (0, 3, 6, 8, 10), strict=True):
        kernel = model.features[number].weight.detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(pretrained.params[layer]["kernel"], kernel)


@functools.cache
def caffe_messages():
    """The part of caffe.proto that weights take, as Caffe declares it; `Bytes` is for `extend`."""
    kinds = descriptor_pb2.FieldDescriptorProto
    schema = {
        "BlobShape": [("dim", 1, kinds.TYPE_INT64, True)],
        "BlobProto": [
            *((n, i, kinds.TYPE_INT32, False) for i, n in enumerate(("num", "channels"), 1)),
            *((n, i, kinds.TYPE_INT32, False) for i, n in enumerate(("height", "width"), 3)),
            ("data", 5, kinds.TYPE_FLOAT, True),
            ("diff", 6, kinds.TYPE_FLOAT, True),
            ("shape", 7, "BlobShape", False),
        ],
        "LayerParameter": [
            ("name", 1, kinds.TYPE_STRING, False),
            ("type", 2, kinds.TYPE_STRING, False),
            ("blobs", 7, "BlobProto", True),
        ],
        "V1LayerParameter": [
            ("name", 4, kinds.TYPE_STRING, False),
            ("type", 5, kinds.TYPE_INT32, False),
            ("blobs", 6, "BlobProto", True),
        ],
        "NetParameter": [
            ("name", 1, kinds.TYPE_STRING, False),
            ("layers", 2, "V1LayerParameter", True),
            ("layer", 100, "LayerParameter", True),
        ],
        "Bytes": [("data", 5, kinds.TYPE_BYTES, False)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe")
    for message, fields in schema.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = kind
                field.options.packed = repeated
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
        for name in schema
    }


def caffe_model(layers):
    """The weights of PyTorch modules by Caffe's names, as Caffe has them: OIHW, (out, in)."""
    randomize(layers.values())
    result = {}
    for name, module in layers.items():
        for part in module.modules():
            if hasattr(part, "weight"):
                weights = part.weight.detach().numpy(), part.bias.detach().numpy()
                result["fc8" if name == "logits" else name] = weights
    return result


V1_TYPES = {"conv": 4, "norm": 15, "pool": 17, "fc": 14}
TYPES = {"conv": "Convolution", "norm": "LRN", "pool": "Pooling", "fc": "InnerProduct"}


def write_caffemodel(path, layers, weights, old):
    pretrained = caffe_messages()["NetParameter"](name="some model")
    for name in layers:
        name = "fc8" if name == "logits" else name
        kind = (V1_TYPES if old else TYPES)[name.rstrip("0123456789")]
        layer = (pretrained.layers if old else pretrained.layer).add(name=name, type=kind)
        for value in weights.get(name, ()):
            blob = layer.blobs.add()
            if old:  # four axes, always
                sides = (1,) * (4 - value.ndim) + value.shape
                blob.num, blob.channels, blob.height, blob.width = sides
            else:
                blob.shape.dim.extend(value.shape)
            extend(blob, value)
    path.write_bytes(pretrained.SerializeToString())


def extend(blob, values):
    """As `blob.data.extend(values.ravel())`, in a hundredth of the time."""
    packed = caffe_messages()["Bytes"](data=values.astype("<f4").tobytes())
    blob.MergeFromString(packed.SerializeToString())


def test_extend():
    values = np.random.default_rng(0).standard_normal((2, 3), np.float32)
    quick, plain = (caffe_messages()["BlobProto"]() for _ in range(2))
    extend(quick, values)
    plain.data.extend(values.ravel())
    assert quick.SerializeToString() == plain.SerializeToString()
    assert list(quick.data) == values.ravel().tolist()


def write_mean(path, mean):
    blob = caffe_messages()["BlobProto"](num=1, channels=3, height=256, width=256)
    extend(blob, mean)
    path.write_bytes(blob.SerializeToString())


def caffe_input(images, mean):
    """BGR, (c, h, w), less the mean image, the middle cut out."""
    bgr = images[..., ::-1].astype(np.float32).transpose(0, 3, 1, 2)
    return (bgr - mean)[:, :, 14:241, 14:241]


def assert_orders_matter(logits, layers, x):
    """Wrong orders of channels, of fc6's inputs and of groups move the logits."""
    assert relative_error(logits, run(layers.values(), x[:, ::-1])) > NOTICEABLE
    for name, order in (
        ("fc6", lambda w: w.reshape(-1, 6, 6, 256).permute(0, 3, 1, 2)),
        ("conv2", lambda w: torch.cat([w[128:], w[:128]])),
    ):
        (layer,) = (m for m in layers[name].modules() if hasattr(m, "weight"))
        right = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(order(right).reshape(right.shape))
            assert relative_error(logits, run(layers.values(), x)) > NOTICEABLE
            layer.weight.copy_(right)


@pytest.mark.parametrize(("layers_of", "old"), [(caffe, True), (caffenet, False)])
def test_caffe(layers_of, old, folder, images):
    with torch.device("meta"):
        layers = layers_of()
    weights = caffe_model(layers)
    mean = np.random.default_rng(1).random((3, 256, 256), np.float32) * 200
    theirs, ours = folder / "model.caffemodel", folder / "ours.safetensors"
    write_caffemodel(theirs, layers, weights, old)
    write_mean(folder / "mean.binaryproto", mean)
    assert main([str(theirs), str(ours), "--mean", str(folder / "mean.binaryproto")]) == 0
    converted = load(ours)
    assert converted.config.variant == layers_of.__name__
    logits = logits_of(converted, images)
    x = caffe_input(images, mean)
    assert relative_error(logits, run(layers.values(), x)) <= TOLERANCE
    assert_orders_matter(logits, layers, x)
    if layers_of is caffe:
        check_tf_weights(folder / "bvlc_alexnet.npy", weights, converted.params, images)


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 writes it, where bytes and text are both `str`."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        data = text if isinstance(text, bytes) else text.encode("latin-1")
        short = len(data) < 256
        head = b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_str


def write_tf_weights(path, tensors):
    """`np.save` of a dictionary by Python 2, with NumPy's modules named as they were."""
    stream = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(stream, header)
    Python2Pickler(stream, 2).dump(np.array(tensors, dtype=object))
    path.write_bytes(stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))


def check_tf_weights(path, weights, expected, images):
    """caffe-tensorflow brings Caffe's kernels to (h, w, in, out), fc6's from (c, h, w) first."""
    tensors = {}
    for name, (kernel, bias) in weights.items():
        if name == "fc6":
            kernel = kernel.reshape(4096, 256, 6, 6).transpose(2, 3, 1, 0).reshape(9216, 4096)
        else:
            kernel = kernel.transpose((2, 3, 1, 0) if kernel.ndim == 4 else (1, 0))
        tensors[name] = [kernel, bias]
    write_tf_weights(path, tensors)
    pretrained = load(path)
    jax.tree.map(np.testing.assert_array_equal, pretrained.params, expected)
    assert pretrained.config.variant == "caffe"

    # The demo's formulation: NHWC throughout, BGR less a colour, pool5 flattened as it lies.
    x = images[:, 14:241, 14:241, ::-1] - np.array([104.00698793, 116.66876762, 122.67891434])
    x = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    norm = nn.LocalResponseNorm(5, alpha=5 * 2e-5, beta=0.75, k=1.0)  # TensorFlow's alpha is 2e-5
    for name, padding, groups, after in (
        ("conv1", 0, 1, [nn.ReLU(), norm, nn.MaxPool2d(3, 2)]),
        ("conv2", 2, 2, [nn.ReLU(), norm, nn.MaxPool2d(3, 2)]),
        ("conv3", 1, 1, [nn.ReLU()]),
        ("conv4", 1, 2, [nn.ReLU()]),
        ("conv5", 1, 2, [nn.ReLU(), nn.MaxPool2d(3, 2)]),
    ):
        kernel, bias = map(torch.tensor, tensors[name])
        stride = 4 if name == "conv1" else 1
        x = nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, stride, padding, 1, groups)
        x = nn.Sequential(*after)(x)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        kernel, bias = map(torch.tensor, tensors[name])
        x = nn.functional.relu(x) @ kernel + bias
    assert relative_error(logits_of(pretrained, images), x.numpy()) <= TOLERANCE

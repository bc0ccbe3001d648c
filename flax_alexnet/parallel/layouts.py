"""Layouts: how arrays, and the work of layers, are split over devices.

A layout is a mesh of devices, rules from parameter paths to `PartitionSpec`, and the collectives of
the layers that it splits. These are written with `shard_map`, so that all communication between
devices can be read here and counted in the compiled program. The model and the step are the same
for all layouts, and so are the random numbers: they are drawn for the whole batch on any layout.

- `data`: each device has a whole copy of the parameters and a share of the batch.
- `zero`: as `data`, but dense kernels, and with them their velocities, are split too; a device
  gathers a kernel when it is used (as in ZeRO, Rajbhandari et al. 2020).
- `hybrid`: convolutions as in `data`; each device of the `model` axis computes its share of the
  features of each dense layer, for all images ("One weird trick", Krizhevsky 2014, section 3).
- `towers`: the two halves of the features of each layer on two devices; a layer with two groups
  needs nothing of the other half (Krizhevsky, Sutskever and Hinton 2012, section 3.5).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_alexnet.models.architectures import Conv, Dense, Layer, Norm, Weighted
from flax_alexnet.utils.errors import UserError

LayoutName = Literal["data", "zero", "hybrid", "towers"]
P = PartitionSpec

# The axes of each layout's mesh. Images are split along "data", and in "hybrid" up to the first
# dense layer along "model" too. The features of layers are split along "model" or "tower".
AXES: dict[LayoutName, tuple[str, ...]] = {
    "data": ("data",),
    "zero": ("data",),
    "hybrid": ("data", "model"),
    "towers": ("data", "tower"),
}

# The layers whose features are split.
SPLIT: dict[LayoutName, tuple[type[Conv] | type[Dense], ...]] = {
    "data": (),
    "zero": (),
    "hybrid": (Dense,),
    "towers": (Conv, Dense),
}

# Which parameters are split, by the end of their path; all others are replicated. The last bias is
# replicated, since it is added to each device's own logits.
RULES: dict[LayoutName, tuple[tuple[str, PartitionSpec], ...]] = {
    "data": (),
    "zero": ((r"fc\d+/kernel", P("data", None)),),
    "hybrid": ((r"fc\d+/kernel", P(None, "model")), (r"fc[67]/bias", P("model"))),
    "towers": (
        (r"conv\d+/kernel", P(None, None, None, "tower")),
        (r"fc\d+/kernel", P(None, "tower")),
        (r"(conv\d|fc[67])/bias", P("tower")),
    ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the state and the batches of a model are sharded on a mesh, and its layers split.

    Attributes:
      name: a key of `AXES` and `RULES`.
      mesh: the mesh, whose axes are `AXES[name]`.
      layers: the layers of the model, whose features are set.
    """

    name: LayoutName
    mesh: Mesh
    layers: tuple[Layer, ...]

    @property
    def replicated(self) -> NamedSharding:
        """A whole copy on each device."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """The sharding of a batch into equal blocks of images; both towers see the same images."""
        axes = ("data", "model") if self.name == "hybrid" else "data"
        return NamedSharding(self.mesh, P(axes))

    def shardings(self, tree: Any) -> Any:
        """The sharding of each array (or `ShapeDtypeStruct`) of a state, or any part of it."""

        def of(path: Any, leaf: Any) -> NamedSharding:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for pattern, spec in RULES[self.name]:
                if re.search(f"(^|/){pattern}$", name) and self._divides(leaf.shape, spec):
                    return NamedSharding(self.mesh, spec)
            return self.replicated

        return jax.tree_util.tree_map_with_path(of, tree)

    def _divides(self, shape: Sequence[int], spec: PartitionSpec) -> bool:
        return all(
            axis is None or size % self.mesh.shape[axis] == 0
            for size, axis in zip(shape, spec, strict=True)
        )

    def partition(self, layer: Layer, operator: Callable[..., jax.Array]) -> Callable[..., Any]:
        """Splits the operator of a layer over the devices; it serves as `AlexNet.partition`."""
        if self.name == "zero" and isinstance(layer, Dense):
            return self._gather_kernel(operator)
        if isinstance(layer, SPLIT[self.name]):
            return self._split_features(layer, operator)
        if self.name == "towers" and isinstance(layer, Norm):
            return self._split_norm(layer, operator)
        if isinstance(layer, Weighted):
            return self._on_own_images(operator)
        return operator

    def _on_own_images(self, operator: Callable[..., jax.Array]) -> Callable[..., Any]:
        if self.mesh.size == 1:  # the sum of gradients over one device would be a copy of them
            return operator
        # Without this, XLA gathers the whole batch on every device for a grouped convolution, and
        # for an operation that it does not know, such as oneDNN's.
        images = self.batch.spec
        return self._on_shares(operator, (images, P()), images)

    def _gather_kernel(self, operator: Callable[..., jax.Array]) -> Callable[..., Any]:
        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return operator(x, lax.all_gather(kernel, "data", axis=0, tiled=True))

        def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if not self._divides(kernel.shape, P("data", None)):
                return self._on_own_images(operator)(x, kernel)
            return self._on_shares(local, (P("data"), P("data", None)), P("data"))(x, kernel)

        return split

    def _split_features(
        self, layer: Conv | Dense, operator: Callable[..., jax.Array]
    ) -> Callable[..., Any]:
        """Each device of the last axis computes its share of the features.

        The input of the layer is split by features too, and is gathered first, unless each device
        has its own groups of the layer. Only the first layer that is split reads something else:
        whole images (towers), or the device's own images (hybrid). The last layer gives each device
        the logits of its own images. If the number of classes does not divide by the devices, the
        last layer is not split, and its input is exchanged instead.
        """
        data, axis = self.mesh.axis_names
        count = self.mesh.shape[axis]
        first = next(other for other in self.layers if isinstance(other, SPLIT[self.name]))
        is_first, is_last = layer.name == first.name, layer.name == self.layers[-1].name
        groups = layer.groups if isinstance(layer, Conv) else 1

        def own_images(x: jax.Array) -> jax.Array:
            return lax.all_to_all(x, axis, split_axis=0, concat_axis=x.ndim - 1, tiled=True)

        def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
            if groups > 1:
                return operator(x, kernel, groups=groups // count)
            if not is_first:
                x = lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)
            elif self.name == "hybrid":
                x = lax.all_gather(x, axis, axis=0, tiled=True)
            y = operator(x, kernel)
            return own_images(y) if is_last else y

        def local_with_whole_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return operator(own_images(x), kernel)

        def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
            by_features = P(data, *[None] * (x.ndim - 2), axis)
            whole = kernel.shape[-1] % count != 0
            if whole and is_first:
                return self._on_own_images(operator)(x, kernel)
            if whole:
                return self._on_shares(
                    local_with_whole_kernel, (by_features, P()), P((data, axis))
                )(x, kernel)
            kernel_spec = P(*[None] * (kernel.ndim - 1), axis)
            source = self.batch.spec if is_first else by_features
            rank = 2 if isinstance(layer, Dense) else x.ndim
            target = P(data, *[None] * (rank - 2), axis)
            if is_last:
                target = P((data, axis))
            return self._on_shares(local, (source, kernel_spec), target)(x, kernel)

        return split

    def _split_norm(self, layer: Norm, operator: Callable[..., jax.Array]) -> Callable[..., Any]:
        """Norms within groups are local; others need a few channels of each neighbour."""
        data, axis = self.mesh.axis_names
        count = self.mesh.shape[axis]
        upwards = [(i, i + 1) for i in range(count - 1)]
        downwards = [(i + 1, i) for i in range(count - 1)]

        def local(x: jax.Array) -> jax.Array:
            if layer.groups > 1:
                return operator(x, groups=layer.groups // count)
            reach = min(layer.depth_radius, x.shape[-1])
            # A device without a neighbour on one side receives zeros, which add nothing.
            below = lax.ppermute(x[..., -reach:], axis, upwards)
            above = lax.ppermute(x[..., :reach], axis, downwards)
            y = operator(jnp.concatenate([below, x, above], axis=-1))
            return y[..., reach:-reach]

        spec = P(data, None, None, axis)
        return self._on_shares(local, (spec,), spec)

    def _on_shares(
        self, local: Callable[..., Any], sources: Any, target: Any
    ) -> Callable[..., Any]:
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=sources, out_specs=target, check_vma=False
        )

    def rows(self, batch_size: int) -> list[int]:
        """Which rows of each batch this process's devices hold, in increasing order."""
        return list(_rows(self.batch, batch_size))

    def put(self, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices, as its part of the global batch."""
        rows = _rows(self.batch, batch_size)

        def put(values: np.ndarray) -> jax.Array:
            def block(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(batch_size)
                return values[np.searchsorted(rows, start) :][: stop - start]

            shape = (batch_size, *values.shape[1:])
            return jax.make_array_from_callback(shape, self.batch, block)

        return {name: put(values) for name, values in batch.items()}


@functools.cache
def _rows(batch: NamedSharding, batch_size: int) -> tuple[int, ...]:
    blocks = batch.addressable_devices_indices_map((batch_size,)).values()
    rows_of_blocks = [np.arange(batch_size)[block] for block in blocks]
    return tuple(np.unique(np.concatenate(rows_of_blocks)).tolist())


def make_layout(
    name: LayoutName,
    layers: tuple[Layer, ...],
    shape: Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """A layout of a model on devices.

    Args:
      name: "data", "zero", "hybrid" or "towers".
      layers: the layers of the model, whose features are set.
      shape: devices along each axis of the mesh; none: all along "data", but in "hybrid" those of a
        process along "model", and in "towers" two along "tower".
      devices: the devices of the mesh; None: all devices of all processes.

    Raises:
      UserError: the mesh does not multiply to the number of devices, "towers" has no groups or an
        odd number of devices, or the features do not divide by the devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    grouped = [layer for layer in layers if isinstance(layer, Conv) and layer.groups > 1]
    if name == "towers" and not grouped:
        raise UserError(
            "--parallel.layout towers needs a variant whose convolutions have groups (paper, caffe "
            "or caffenet); take one, or another layout"
        )
    if name == "towers" and count % 2 and not shape:
        raise UserError(f"--parallel.layout towers needs an even number of devices, not {count}")
    along_last = {"hybrid": min(jax.local_device_count(), count), "towers": 2}.get(name, count)
    shape = tuple(shape) or (count // along_last, along_last)[-len(AXES[name]) :]
    if len(shape) != len(AXES[name]) or math.prod(shape) != count or min(shape) < 1:
        raise UserError(
            f"--parallel.mesh {' '.join(map(str, shape))} does not fit: --parallel.layout {name} "
            f"has the axes {', '.join(AXES[name])}, and their sizes multiply to the {count} devices"
        )
    if name == "hybrid" and count > 1 and shape[1] == 1:
        raise UserError(
            "--parallel.layout hybrid splits nothing with one device along 'model'; give more "
            f"devices with --parallel.mesh, such as --parallel.mesh 1 {count}"
        )
    if name == "towers" and any(layer.groups % shape[1] for layer in grouped):
        raise UserError(f"--parallel.layout towers is for 1 or 2 devices a model, not {shape[1]}")
    for layer in layers[:-1]:
        if isinstance(layer, SPLIT[name]) and (layer.features or 0) % shape[1]:
            raise UserError(
                f"--parallel.layout {name}: the {layer.features} features of {layer.name} do not "
                f"divide by the {shape[1]} devices of the axis {AXES[name][1]!r}; take another "
                "--parallel.mesh or --model.width"
            )
    axis_types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(shape, AXES[name], axis_types, devices=devices)
    return Layout(name, mesh, tuple(layers))

"""Work to be timed, each in a process of its own that does it once whenever it is told to.

So frameworks do not share a process (nor threads, allocators, GPU memory), can take turns within
one run of a benchmark, and each has a peak of memory of its own.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], object]  # does the work once, and returns when it is done

RADIUS, BIAS, ALPHA, BETA = 5, 2.0, 1e-4, 0.75  # of the notebook's normalization
PRODUCT = {"cpu": 4096, "gpu": 8192}  # side of the matrices whose product is the limit


@dataclasses.dataclass(frozen=True)
class Work:
    """What a process does: a function of this module, by its name, and its arguments."""

    name: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    python: str = sys.executable


class Worker:
    """The process that does a `Work`; it has done it twice when this returns.

    Raises:
      RuntimeError: it has ended, such as where a package is not installed.
    """

    def __init__(self, work: Work):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [work.python, __file__, json.dumps([work.name, work.arguments])]
        # Another Python has packages of its own, and of ours only what is in this repository.
        here = sys.path if work.python == sys.executable else [str(Path(__file__).parents[2])]
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": os.pathsep.join(here)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,  # a pipe that nobody reads would stop it
            text=True,
            env=env | work.environment,
        )
        self.peak = 0  # bytes, once it has ended
        self.said = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # a line of a framework's own
                return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(self._errors.read().strip().rpartition("\n")[2] or "it ended")

    def seconds(self) -> float:
        """Does the work once more."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process, which then says how much memory it took."""
        assert self._process.stdin
        with self._errors, self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            with contextlib.suppress(RuntimeError):
                self.peak = self._answer()


def serve(name: str, arguments: dict[str, Any]) -> None:
    """The process of a `Worker`."""
    run = globals()[name](**arguments)
    run()
    run()
    print(json.dumps(describe()), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)
    print(peak_memory(), flush=True)


def describe() -> dict[str, str]:
    """The device and the versions of what has been imported."""
    names = ("jax", "jaxlib", "flax", "optax", "tensorflow", "torch", "simplejpeg")
    result = {name: sys.modules[name].__version__ for name in names if name in sys.modules}
    result["python"] = platform.python_version()
    if "jax" in sys.modules:
        import jax

        result["device"] = jax.devices()[0].device_kind
    return result


def peak_memory() -> int:
    """Bytes that this process had at most: of the GPU where one was used, else of the host."""
    if "jax" in sys.modules:
        import jax

        if peak := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
            return int(peak)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak[1]) if peak else 0


def ours_train(variant: str, batch: int, size: int, dtype: str = "float32") -> Run:
    """`flax_alexnet.train_step` as a run makes it, with the crop and flip of uint8 squares."""
    from flax_alexnet.utils.host_memory import keep_for_reuse

    keep_for_reuse()
    import jax
    import jax.numpy as jnp

    from flax_alexnet.data.augment import augment
    from flax_alexnet.data.preprocessing import Preprocessing
    from flax_alexnet.models.alexnet import AlexNet
    from flax_alexnet.models.architectures import architecture
    from flax_alexnet.parallel.layouts import make_layout
    from flax_alexnet.training.optimizer import create_optimizer
    from flax_alexnet.training.step import create_state, train_step

    classes = architecture(variant).num_classes
    model = AlexNet(variant, classes, dtype=jnp.dtype(dtype))
    layout = make_layout("data", architecture(variant).scaled(classes))
    optimizer, key = create_optimizer(), jax.random.key(0)
    create = functools.partial(create_state, model=model, optimizer=optimizer, crop_size=size)
    side = size + size // 8
    mean = np.full((side, side, 3), 120, np.float32)
    rule = Preprocessing(side, "paper", size, mean)
    init = jax.jit(create, out_shardings=layout.replicated)
    state = init(key, mean)
    step = jax.jit(
        functools.partial(
            train_step,
            model=model.clone(partition=layout.partition),
            optimizer=optimizer,
            augment=lambda key, images, mean: augment(key, images, rule.with_mean(mean)),
        ),
        in_shardings=(layout.replicated, layout.batch, layout.replicated),
        out_shardings=layout.replicated,
        donate_argnums=0,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, side, side, 3), np.uint8)
    labels = rng.integers(0, classes, batch, np.int32)
    put = layout.put({"image": images, "label": labels}, batch)

    def run() -> None:
        nonlocal state
        state, loss = step(state, put, key)
        jax.block_until_ready((state, loss))

    return run


def ours_infer(variant: str, batch: int, size: int, dtype: str = "float32") -> Run:
    """The logits of float32 images."""
    from flax_alexnet.utils.host_memory import keep_for_reuse

    keep_for_reuse()
    import jax
    import jax.numpy as jnp

    from flax_alexnet.models.alexnet import AlexNet
    from flax_alexnet.models.architectures import architecture

    model = AlexNet(variant, architecture(variant).num_classes, dtype=jnp.dtype(dtype))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    images = jnp.asarray(np.random.default_rng(0).uniform(-128, 128, (batch, size, size, 3)))
    images = images.astype(jnp.float32)
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images))
    return lambda: jax.block_until_ready(apply(params, images))


def torch_train(variant: str, batch: int, size: int) -> Run:
    """See `peers.torch_runs`."""
    from peers import torch_runs

    return torch_runs(variant, batch, size)[0]


def torch_infer(variant: str, batch: int, size: int) -> Run:
    """See `peers.torch_runs`."""
    from peers import torch_runs

    return torch_runs(variant, batch, size)[1]


def tensorflow_train(variant: str, batch: int, size: int) -> Run:
    """See `peers.tensorflow_runs`."""
    from peers import tensorflow_runs

    return tensorflow_runs(variant, batch, size)[0]


def tensorflow_infer(variant: str, batch: int, size: int) -> Run:
    """See `peers.tensorflow_runs`."""
    from peers import tensorflow_runs

    return tensorflow_runs(variant, batch, size)[1]


def product(side: int, dtype: str = "float32") -> Run:
    """A product of two square matrices, 2 · side³ operations: the limit of arithmetic."""
    from flax_alexnet.utils.host_memory import keep_for_reuse

    keep_for_reuse()
    import jax
    import jax.numpy as jnp

    a = jnp.asarray(np.random.default_rng(0).standard_normal((side, side)), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: a @ a)
    return lambda: multiply(a).block_until_ready()


def copy(shape: tuple[int, ...], dtype: str, times: int) -> Run:
    """So many copies of arrays that are too large for a cache: the limit of memory."""
    import jax

    arrays = _arrays(shape, dtype)
    flip = jax.jit(lambda x: -x)
    return lambda: jax.block_until_ready([flip(arrays[i % len(arrays)]) for i in range(times)])


def ours_lrn(shape: tuple[int, ...], dtype: str, times: int, implementation: str | None) -> Run:
    """Normalization, forward and backward."""
    from flax_alexnet.utils.host_memory import keep_for_reuse

    keep_for_reuse()
    import jax

    from flax_alexnet.ops.lrn import local_response_normalization

    normalize = functools.partial(
        local_response_normalization,
        depth_radius=RADIUS,
        bias=BIAS,
        alpha=ALPHA,
        beta=BETA,
        implementation=implementation,  # type: ignore[arg-type]
    )
    arrays = _arrays(shape, dtype)

    @jax.jit
    def both(x: jax.Array) -> Any:
        y, pullback = jax.vjp(normalize, x)
        return y, pullback(x)

    return lambda: jax.block_until_ready([both(arrays[i % len(arrays)]) for i in range(times)])


def _arrays(shape: tuple[int, ...], dtype: str) -> list[Any]:
    import jax.numpy as jnp

    draw = np.random.default_rng(0).standard_normal
    return [jnp.asarray(draw(shape, np.float32), jnp.dtype(dtype)) for _ in range(3)]


def tensorflow_lrn(shape: tuple[int, ...], times: int) -> Run:
    """The same in TensorFlow."""
    import tensorflow as tf

    x = tf.constant(np.random.default_rng(0).standard_normal(shape, np.float32))

    @tf.function
    def both(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.nn.lrn(x, RADIUS, BIAS, ALPHA, BETA)
        return y, tape.gradient(y, x, x)

    return lambda: [both(x)[1].numpy() for _ in range(times)]


def torch_lrn(shape: tuple[int, ...], times: int) -> Run:
    """The same in PyTorch, compiled."""
    import torch

    window = 2 * RADIUS + 1
    norm = torch.compile(torch.nn.LocalResponseNorm(window, ALPHA * window, BETA, BIAS))
    x = torch.tensor(np.random.default_rng(0).standard_normal(shape, np.float32))
    x = x.permute(0, 3, 1, 2).requires_grad_()

    def once() -> None:
        x.grad = None
        norm(x).backward(x.detach())

    def run() -> None:
        for _ in range(times):
            once()

    return run


def ours_batches(
    data_dir: str, name: str, size: int, batch: int, images: int, threads: int | None = None
) -> Run:
    """Images from the disk to uint8 batches that are ready for a device, in shuffled order."""
    from flax_alexnet.data.dataset import DecodedExamples
    from flax_alexnet.data.loader import training_batches
    from flax_alexnet.data.sources import open_dataset

    dataset = open_dataset(name, Path(data_dir), "train", None)
    examples = DecodedExamples(dataset.train, size)
    batches = training_batches(examples, batch, seed=0, threads=threads or os.cpu_count() or 1)

    def run() -> None:
        for _ in range(images // batch):
            next(batches)

    return run


def decoder(data_dir: str, images: int) -> Run:
    """The decoder alone, in as many threads, on the same bytes in memory."""
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    encoded = [path.read_bytes() for path in sorted(Path(data_dir).rglob("*.jpg"))]
    encoded = [encoded[i % len(encoded)] for i in range(images)]
    pool = ThreadPoolExecutor(os.cpu_count())
    return lambda: all(pool.map(lambda data: simplejpeg.decode_jpeg(data).size, encoded))


def tensorflow_batches(pattern: str, size: int, batch: int, images: int, resize: bool) -> Run:
    """`tf.data` from files to uint8 batches, shuffled, in as many threads as it likes.

    As ours it reads two batches a core ahead. Left to itself it reads hundreds ahead after some
    rounds, in the others' time, and is timed at handing out what it has.
    """
    import tensorflow as tf

    def decode(path: Any) -> Any:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        if resize:  # the shorter side to `size`, then the centre, as `prepare` does
            shape = tf.cast(tf.shape(image)[:2], tf.float32)
            sides = tf.cast(tf.math.ceil(shape * size / tf.reduce_min(shape)), tf.int32)
            image = tf.image.resize(image, sides)
            image = tf.image.resize_with_crop_or_pad(image, size, size)
            image = tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)
        return tf.ensure_shape(image, (size, size, 3))

    files = sorted(str(path) for path in Path(pattern).rglob("*") if path.is_file())
    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=0).repeat()
    dataset = dataset.map(decode, tf.data.AUTOTUNE).batch(batch)
    dataset = dataset.prefetch(2 * (os.cpu_count() or 1))
    batches: Iterator[Any] = iter(dataset)

    def run() -> None:
        for _ in range(images // batch):
            next(batches).numpy()

    return run


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(*json.loads(sys.argv[1]))

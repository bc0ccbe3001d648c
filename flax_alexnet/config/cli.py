"""The command line: how flags are read, and what several commands share of them."""

import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro

from flax_alexnet.utils.errors import UserError, exit_code, first_line
from flax_alexnet.utils.process import escape_output

T = TypeVar("T")

LARGEST_BATCH = 2**20  # a larger value is a typing error


@dataclasses.dataclass(frozen=True)
class UseDataConfig:
    """The dataset whose images the trained model is applied to."""

    name: str = ""
    """The embedded "shapes_and_textures", a TFDS name that has been prepared, or folder:PATH."""
    data_dir: Path | None = None
    """Folder of prepared datasets; none: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    split: str | None = None
    """Split of TFDS; for a folder train, validation, test or all; none: the split that training
    holds out, which is validation if there is one, else test."""
    image_key: str | None = None
    """TFDS feature with the images; none: as the dataset says, else image."""
    label_key: str | None = None
    """TFDS feature with the labels; none: as the dataset says, else label."""


NO_DATASET = UseDataConfig()


class Main(Protocol):
    """The `main` of a command: it maps `argv`, or the process's arguments, to an exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def command(run: Callable[[Sequence[str]], int | None]) -> Main:
    """Makes the `main` of a command from a function that takes the command's arguments.

    `main` returns the exit code: what `run` returns, else 0; 2 with one line on standard error
    after a UserError, and 128 + the signal's number after a signal.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            with _environment_explained():
                return run(sys.argv[1:] if argv is None else argv) or 0
        except (UserError, KeyboardInterrupt) as error:
            return exit_code(error)

    return main


@contextlib.contextmanager
def _environment_explained() -> Iterator[None]:
    """Raises UserError where JAX finds no device, or the working directory has been removed."""
    try:
        yield
    except FileNotFoundError:
        try:
            os.getcwd()
        except OSError:
            raise UserError("this working directory has been removed: go to another one") from None
        raise
    except (RuntimeError, AssertionError):
        if jax := sys.modules.get("jax"):
            check_device(jax.device_count)
        raise


def check_device(count: Callable[[], int]) -> int:
    """Returns `count()`, such as `jax.device_count()`. Raises UserError if JAX has no device."""
    try:
        return count()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"JAX finds no device ({first_line(error)}): see JAX_PLATFORMS") from None


def check_flag(flag: str, value: object, fits: bool, expected: str) -> None:
    """Raises UserError for the value of a flag that does not fit."""
    if not fits:
        raise UserError(f"--{flag} is {value}; expected {expected}")


def check_batch(size: int) -> None:
    """Raises UserError for a `--batch-size` that is out of its range."""
    check_flag("batch-size", size, 1 <= size <= LARGEST_BATCH, f"1 to {LARGEST_BATCH}")


def check_png(flag: str, path: Path | None) -> None:
    """Raises UserError if the path of an image to be written does not end in .png."""
    check_flag(flag, path, path is None or path.suffix == ".png", "a .png file")


def parse(schema: type[T], argv: Sequence[str], default: T | None, program: str) -> T:
    """Applies the flags of `argv` to `default`, which is None if `schema` has positional arguments.

    Every command begins here, and from here on escapes characters that the terminal cannot show.

    Raises:
      UserError: a flag is unknown, and the message suggests the nearest one; or a value is not of
        its type, or names the home of another user that does not exist.
      SystemExit: after `--help`.
    """
    escape_output()
    start: Any = tyro.MISSING_NONPROP if default is None else default
    if {"-h", "--help"} & set(argv):
        return tyro.cli(schema, args=argv, default=start, prog=program)
    flags = known_flags(schema if default is None else default)
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see python -m {program} --help"
            raise UserError(f"unknown flag {name}: {hint}")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            return _expand(tyro.cli(schema, args=argv, default=start, prog=program))
    except SystemExit:
        raise UserError(_first_paragraph(output.getvalue())) from None


def _expand(config: Any) -> Any:
    """Replaces "~" in paths by the home, which a shell does not do in `--flag=~/path`."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _expand(value)
        elif isinstance(value, Path):
            changes[field.name] = _expand_path(value)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(
                _expand_path(part) if isinstance(part, Path) else part for part in value
            )
    return dataclasses.replace(config, **changes)


def _expand_path(path: Path) -> Path:
    try:
        path = path.expanduser()
        os.stat(path)
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # later calls would raise it, some of them late
            shown = f"{str(path)[:40]}…"
            raise UserError(f"the path {shown} is too long for this system: shorten it") from None
    return path


def known_flags(default: Any, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass or its type, nested ones with their prefix, in tyro's spelling."""
    flags = []
    for field in dataclasses.fields(default):
        name, value = field.name.replace("_", "-"), getattr(default, field.name, None)
        if dataclasses.is_dataclass(value):
            flags += known_flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            flags += [f"{prefix}{name}", f"{prefix}no-{name}"]
        else:
            flags.append(prefix + name)
    return flags


def value_of(flag: str, argv: Sequence[str], default: str) -> str:
    """The value that `argv` gives a flag, before it is parsed as a whole."""
    for index, word in reversed(list(enumerate(argv))):  # the last one counts, as in tyro
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:  # as tyro reads it
            if equals:
                return value
            if index + 1 < len(argv):
                return argv[index + 1]
    return default


def _first_paragraph(box: str) -> str:
    """The first paragraph of tyro's text box, which has a title and paragraphs between rulers."""
    text = re.sub(r"^╭.*╮$", "title\n---", box.strip(), flags=re.MULTILINE)
    lines = [line.strip(" │|") for line in text.splitlines()]
    paragraphs = "\n".join(line if re.search(r"\w", line) else "---" for line in lines).split("---")
    texts = [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
    return texts[1] if len(texts) > 1 else "the command line could not be read; see --help"

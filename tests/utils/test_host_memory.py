"""Memory that a process frees is there for its next use, without the system."""

import platform
import subprocess
import sys

import pytest

NEW = 128  # faults of 256 MiB never touched before, at the least: in pages of 2 MiB

CODE = """
import resource, statistics, sys
import jax
from flax_alexnet.utils.host_memory import keep_for_reuse
kept = keep_for_reuse() if sys.argv[1] == "keep" else False
import jax.numpy as jnp
x = jnp.ones((64, 2**20))  # 256 MiB
program = jax.jit(lambda x: x * 2)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
# The heap finds its shape in the first calls: what stands between two free blocks is in the way.
print(kept, statistics.median_low(faults() for _ in range(15)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is for glibc")
@pytest.mark.slow
def test_what_was_freed_is_used_again():
    kept, faults = run("keep")
    _, faults_else = run("leave")
    assert kept == "True"
    assert faults < NEW / 2
    assert faults_else >= NEW


def run(how):
    command = [sys.executable, "-c", CODE, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept, int(faults)

"""Checks that the kernels are bitwise reproducible under TensorFlow's op determinism.

    python -m tests.ops.determinism

Prints hashes of the results, which must be the same in every process.
"""

from __future__ import annotations

import hashlib

import keras
import numpy as np
import tensorflow as tf

from tests.ops.op_cases import Case, draw
from tests.ops.tf_harness import runner


def hashes(size: int = 32, repetitions: int = 10) -> dict[str, set[str]]:
    """Hashes of outputs and gradients by problem and mode. A reproducible problem has exactly one."""
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    found = {}
    for groups in (64, 1):
        case = Case("", batch=8, image=(size, size), channels=64, filters=64, groups=groups, padding="same")
        tensors = draw(case, np.random.default_rng(0))
        shift = np.arange(size)[:, None, None] / 2
        tensors["offsets"][:] = np.round(tensors["offsets"] - shift)  # many samples coincide
        for mode in ("eager", "xla"):
            compute = runner(case, mode, implementation="native")
            found[f"{groups} {mode}"] = {_hash(*compute(tensors)) for _ in range(repetitions)}
    return found


def _hash(outputs, gradients) -> str:
    arrays = [outputs, *(gradients[name] for name in sorted(gradients))]
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()


if __name__ == "__main__":
    for problem, bits in hashes().items():
        print(problem, *sorted(bits))

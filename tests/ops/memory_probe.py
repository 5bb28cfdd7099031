"""Measures the peak memory of one forward pass, or of one forward and backward pass.

    python -m tests.ops.memory_probe IMPLEMENTATION MODE,KERNEL_SIDE,forward|both,MULTIPLIER ...

Runs as a separate process, so that nothing else affects the peak. Prints one line of JSON with an entry for
each measurement, in bytes.
"""

import ctypes
import gc
import json
import sys

import numpy as np
import tensorflow as tf

from tests.ops.op_cases import Case, call
from tests.ops.tf_harness import MODES, value_and_gradients


def resident(field):
    """VmRSS or VmHWM of this process in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_above_rest(function):
    """The increase of the resident memory while `function` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # resets the peak
    rest = resident("VmRSS")
    function()
    return resident("VmHWM") - rest


def measure(implementation, mode, side, passes, multiplier):
    """Returns the size in bytes of the peak and each tensor, for a square kernel with `side` rows."""
    # The gate of ResNet-50's first stage: 0.2 * 256 channels at 56x56. The slow reference runs
    # on half the batch.
    case = Case(
        "",
        batch=8 if implementation == "native" else 4,
        image=(56, 56),
        channels=51,
        filters=51 * multiplier,
        groups=51,
        kernel_size=(side, side),
        padding="same",
    )
    generator = np.random.default_rng(0)
    arrays = {name: generator.normal(size=shape).astype("float32") for name, shape in case.shapes.items()}
    given = {name: tf.constant(array) for name, array in arrays.items()}
    bytes_of = {name: array.nbytes for name, array in arrays.items()}
    del arrays
    upstream = given.pop("outputs")
    options = {"case": case, "implementation": implementation}
    if passes == "forward":
        compute = MODES[mode](lambda arguments, upstream: call(arguments, **options))
    else:
        compute = MODES[mode](lambda arguments, upstream: value_and_gradients(arguments, upstream, **options))
    compute(given, upstream)  # compiles and allocates permanent memory
    return {"peak": max(peak_above_rest(lambda: compute(given, upstream)) for _ in range(3)), **bytes_of}


def main(implementation, *measurements):
    wanted = [words.split(",") for words in measurements]
    sizes = [
        measure(implementation, mode, int(side), passes, int(multiplier))
        for mode, side, passes, multiplier in wanted
    ]
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(*sys.argv[1:])

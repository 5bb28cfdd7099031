"""Compares the kernels with the oracle for many random geometries.

    python -m tests.ops.random_cases [BINDING] [--count 5000] [--seed 0]

BINDING selects how the kernels are called: TensorFlow's op ("eager", "graph"), XLA's custom calls ("xla" in
TensorFlow, "jax"), or the plain functions of a library that contains tests/csrc/c_api.cc (its path).
`sanitize.py` builds such a library.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys

import numpy as np

from tests.ops.op_cases import DTYPES, Case, assert_as_expected, draw, split_upstream


def random_case(rng):
    """A small geometry, often an edge case: one channel, one pixel, or strides larger than the kernel."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    groups, offset_groups = pick(1, 1, 2, 3), pick(1, 1, 2)
    channels = groups * offset_groups * pick(1, 1, 2, 3, 7, 17)
    filters = groups * pick(1, 2, 5)
    if rng.random() < 0.4:  # depthwise
        channels = filters = groups = offset_groups * int(rng.integers(1, 41))
    kernel_size = (pick(1, 2, 3), pick(1, 3, 3, 5))
    image = (int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    dilation_rate = (pick(1, 1, 2), pick(1, 1, 3))
    padding = pick("same", "same", "valid", tuple(tuple(map(int, rng.integers(0, 4, 2))) for _ in range(2)))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation_rate, strict=True)]
    sides = ((0, 0), (0, 0)) if padding == "valid" else padding
    if padding != "same" and any(
        n + sum(s) < e for n, s, e in zip(image, sides, extents, strict=True)
    ):  # the kernel does not fit
        padding = "same"
    return Case(
        "random",
        batch=pick(1, 2, 3),
        image=image,
        channels=channels,
        filters=filters,
        kernel_size=kernel_size,
        groups=groups,
        strides=(pick(1, 1, 2, 3), pick(1, 1, 2)),
        padding=padding,
        dilation_rate=dilation_rate,
        offset_groups=offset_groups,
        modulated=bool(rng.random() < 0.8),
        use_bias=bool(rng.random() < 0.5),
    )


def check(value_and_gradients, count, rng, dtypes=DTYPES):
    """Compares `value_and_gradients(arguments, upstream, threads=, **options)` with the oracle.

    Runs `count` random cases.
    """
    for number in range(count):
        case, dtype = random_case(rng), dtypes[number % len(dtypes)]
        tensors = draw(case, rng, dtype)
        arguments, upstream = split_upstream(tensors)
        results = value_and_gradients(arguments, upstream, threads=1 + number % 2, **case.options)
        try:
            assert_as_expected(case, tensors, dtype, *results)
        except AssertionError:
            print(f"case {number}: {case!r}", file=sys.stderr)
            raise


def function_of(binding):
    """Returns the function that `check` compares with the oracle, for a binding named on the command line."""
    if binding in ("eager", "graph", "xla"):
        from tests.ops.tf_harness import kernels_value_and_gradients

        return functools.partial(kernels_value_and_gradients, mode=binding)
    if binding == "jax":
        return _jax_value_and_gradients
    from tests.ops.plain_kernels import PlainKernels

    return PlainKernels(binding).value_and_gradients


def _jax_value_and_gradients(arguments, upstream, threads=None, **options):
    import jax

    from keras_das import ops

    def compute(arguments, upstream):
        function = functools.partial(ops.deformable_conv2d, **options, implementation="native")
        outputs, pull_back = jax.vjp(lambda given: function(**given), arguments)
        return outputs, pull_back(upstream)[0]

    outputs, gradients = jax.jit(compute)(arguments, upstream)
    return np.asarray(outputs), {name: np.asarray(gradient) for name, gradient in gradients.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "binding", nargs="?", default="eager", help="eager, graph, xla, jax or a library's path"
    )
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.binding == "jax":  # before JAX and Keras are imported
        os.environ |= {"KERAS_BACKEND": "jax", "JAX_ENABLE_X64": "1"}
    check(function_of(options.binding), options.count, np.random.default_rng(options.seed))
    print(f"{options.count} random cases agree with the oracle")


if __name__ == "__main__":
    main()

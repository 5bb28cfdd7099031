"""Tests of first- and second-order gradients: agreement with finite differences."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.ops.op_cases import Case, call, draw, split_upstream
from tests.ops.tf_harness import MODES, run, tensors_of


def test_random_directions_match_finite_differences(rng, implementation):
    """Moves all arguments at once in float64, away from discontinuities."""
    case = Case("", offset_groups=2, groups=2, padding="same", strides=2)
    tensors = draw(case, rng, "float64", generic=True)
    _, gradients = run(case, tensors, implementation=implementation)
    directions = {name: rng.uniform(-1, 1, size=gradient.shape) for name, gradient in gradients.items()}

    def loss(step):
        moved = {name: tensors[name] + step * direction for name, direction in directions.items()}
        return np.sum(tensors["outputs"] * call(moved, case, implementation=implementation).numpy())

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    wanted = sum(np.sum(gradients[name] * direction) for name, direction in directions.items())
    scale = sum(np.abs(gradients[name] * direction).sum() for name, direction in directions.items())
    assert abs(slope - wanted) <= 1e-8 * scale


SECOND = [
    Case("modulated", batch=1, image=(4, 5), kernel_size=(1, 2), groups=2, offset_groups=2, padding="same"),
    Case("plain", image=(4, 5), kernel_size=(2, 1), strides=2, modulated=False, use_bias=False),
]


def first_order(arguments, upstream, case, implementation):
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        loss = tf.reduce_sum(upstream * call(arguments, case, implementation=implementation))
    return tape.gradient(loss, arguments)


def hessian_times(arguments, upstream, directions, **how):
    """The gradients of the inner product of the first-order gradients and `directions`."""
    with tf.GradientTape() as tape:
        tape.watch((arguments, upstream))
        gradients = first_order(arguments, upstream, **how)
        product = tf.add_n([tf.reduce_sum(gradients[name] * directions[name]) for name in directions])
    return tape.gradient(product, {**arguments, "upstream": upstream}, unconnected_gradients="zero")


@pytest.mark.parametrize(
    ("case", "mode", "implementation"),
    [
        (SECOND[0], "eager", "native"),
        (SECOND[0], "eager", "reference"),
        (SECOND[1], "graph", "reference"),
        pytest.param(SECOND[0], "xla", "native", marks=pytest.mark.slow),
        pytest.param(SECOND[1], "xla", "reference", marks=pytest.mark.slow),
    ],
    ids=str,
    indirect=["implementation"],
)
def test_second_order_gradients(rng, case, mode, implementation):
    """Second-order gradients of the kernels are computed by the reference."""
    arguments, upstream = split_upstream(tensors_of(draw(case, rng, "float64", generic=True)))
    directions = {name: tf.constant(rng.uniform(-1, 1, size=a.shape)) for name, a in arguments.items()}
    how = {"case": case, "implementation": implementation}
    seconds = MODES[mode](functools.partial(hessian_times, **how))(arguments, upstream, directions)
    step = 1e-5
    moved = [{name: a + way * step * directions[name] for name, a in arguments.items()} for way in (1, -1)]
    ahead, behind = (first_order(to, upstream, **how) for to in moved)
    # The second-order gradient of `upstream` is the change of the outputs in that direction.
    ahead["upstream"], behind["upstream"] = (call(to, **how) for to in moved)
    for name, second in seconds.items():
        np.testing.assert_allclose(
            second, (ahead[name] - behind[name]) / (2 * step), rtol=1e-6, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("native", marks=pytest.mark.slow)], indirect=True
)
def test_forward_mode(rng, implementation):
    case = SECOND[0]
    arguments, _ = split_upstream(tensors_of(draw(case, rng, "float64", generic=True)))
    directions = {name: tf.constant(rng.uniform(-1, 1, size=a.shape)) for name, a in arguments.items()}
    names = list(arguments)
    with tf.autodiff.ForwardAccumulator(
        [arguments[name] for name in names], [directions[name] for name in names]
    ) as accumulator:
        outputs = call(arguments, case, implementation=implementation)
    ahead, behind = (
        call({name: a + way * 1e-5 * directions[name] for name, a in arguments.items()}, case)
        for way in (1, -1)
    )
    np.testing.assert_allclose(accumulator.jvp(outputs), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)

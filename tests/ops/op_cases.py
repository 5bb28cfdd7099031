"""Test cases of the op for all backends: geometries, random tensors, and tolerances."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from tests import oracle

# The implementations under test.
IMPLEMENTATIONS = ["reference", "native"]

DTYPES = ["float16", "bfloat16", "float32", "float64"]
DATA_FORMATS = ["channels_last", "channels_first"]
IMAGES = {"inputs", "offsets", "mask", "outputs"}  # tensors that have a data format

# Maximum error relative to the largest exact value. Half-precision ops compute in float32, so that only the
# result is rounded: one unit in the last place.
HALF_ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
VALUE_BOUND = {"float32": 1e-5, "float64": 1e-12, **HALF_ULP}
GRADIENT_BOUND = {"float32": 2e-5, "float64": 1e-12, **HALF_ULP}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int = 2
    image: tuple = (7, 6)
    channels: int = 4
    filters: int = 6
    kernel_size: tuple = (3, 3)
    groups: int = 1
    strides: int | tuple = 1
    padding: str | tuple = "valid"
    dilation_rate: int | tuple = 1
    offset_groups: int = 1
    modulated: bool = True
    use_bias: bool = True

    def __str__(self):
        return self.name

    @property
    def options(self):
        """The arguments of the op that are not tensors."""
        names = ("strides", "padding", "dilation_rate", "offset_groups")
        return {name: getattr(self, name) for name in names}

    @property
    def shapes(self):
        """The shapes of the tensors in the channels-last format."""
        inputs = (self.batch, *self.image, self.channels)
        kernel = (*self.kernel_size, self.channels // self.groups, self.filters)
        geometry = oracle.Geometry(inputs, kernel, **self.options)
        reads = self.offset_groups * geometry.taps
        shapes = {
            "inputs": inputs,
            "kernel": kernel,
            "offsets": (self.batch, *geometry.output_size, reads * 2),
            "outputs": geometry.output_shape,
        }
        if self.modulated:
            shapes["mask"] = (self.batch, *geometry.output_size, reads)
        if self.use_bias:
            shapes["bias"] = (self.filters,)
        return shapes


CASES = [
    Case("valid"),
    Case("same", padding="same"),
    Case("same_stride2", padding="SAME", strides=2),
    Case("same_stride2_even", padding="same", strides=2, image=(6, 8)),
    Case("stride_2_1", strides=(2, 1), padding="same"),
    Case("dilation2", dilation_rate=2, padding="same"),
    Case("dilation2_stride2", dilation_rate=2, strides=2, image=(9, 8)),
    Case("explicit_padding", padding=((1, 2), (0, 3)), strides=2),
    Case("groups2", groups=2, padding="same"),
    Case("depthwise", groups=4, filters=4, padding="same"),
    Case("depthwise_multiplier2", groups=4, filters=8, padding="same", offset_groups=2),
    Case("offset_groups2", offset_groups=2, padding="same"),
    Case("offset_groups_cross_groups", channels=8, groups=2, offset_groups=4),
    Case("groups_cross_offset_groups", channels=8, filters=8, groups=8, offset_groups=2, use_bias=False),
    Case("small_groups", channels=69, filters=46, groups=23),  # the kernels process 32 channels together
    Case("small_groups_cross_offset_groups", channels=24, filters=16, groups=8, offset_groups=4),
    Case("plain", modulated=False, padding="same"),
    Case("plain_no_bias", modulated=False, use_bias=False, strides=2),
    Case("kernel1x1", kernel_size=(1, 1)),
    Case("kernel2x3", kernel_size=(2, 3), padding="same", strides=2, offset_groups=2),
    Case(
        "kernel5x5",
        image=(4, 6),
        kernel_size=(5, 5),
        padding="same",
        dilation_rate=(1, 2),
        channels=2,
        filters=3,
    ),
    Case("one_pixel", image=(1, 1), padding="same"),
    Case("one_row", image=(1, 7), kernel_size=(1, 3), channels=1, filters=1, batch=3),
    Case("wide_padding", image=(2, 3), padding=((4, 4), (4, 4)), kernel_size=(2, 2)),
    Case("empty_batch", batch=0, padding="same"),
    Case("empty_image", image=(0, 4), padding=((1, 2), (0, 0)), kernel_size=(1, 2)),
]

# Cases for graphs and XLA. They have few taps, because the compilation time grows with the number of taps.
COMPILED_CASES = [
    Case("same_3x3", padding="same"),
    Case("valid", kernel_size=(1, 2)),
    Case("same_stride2", kernel_size=(2, 1), padding="same", strides=2),
    Case("dilation2_stride_2_1", kernel_size=(2, 1), dilation_rate=2, strides=(2, 1), padding="same"),
    Case("explicit_padding", kernel_size=(1, 2), padding=((1, 2), (0, 3)), modulated=False),
    Case("groups2", kernel_size=(1, 2), groups=2, offset_groups=2, use_bias=False),
    Case("depthwise", kernel_size=(2, 1), groups=4, filters=4, padding="same"),
    Case("depthwise_multiplier2", kernel_size=(1, 2), groups=4, filters=8, offset_groups=2),
    Case("kernel1x1", kernel_size=(1, 1), modulated=False, use_bias=False),
    Case("one_pixel", image=(1, 1), kernel_size=(2, 1), padding="same"),
    Case("empty_batch", batch=0, kernel_size=(1, 2)),
]


def in_turns(cases):
    """Returns (case, dtype, data format) for each case, cycling through dtypes and data formats."""
    return [(case, DTYPES[number % 4], DATA_FORMATS[number // 4 % 2]) for number, case in enumerate(cases)]


def each_once_fast(cases, dtypes):
    """Returns parameters for all pairs (case, dtype), with one fast pair per case.

    The dtypes of the fast pairs rotate. The other pairs are marked as slow.
    """
    import pytest  # not needed to run cases outside of pytest

    return [
        pytest.param(case, dtype, marks=() if turn == number % len(dtypes) else pytest.mark.slow)
        for number, case in enumerate(cases)
        for turn, dtype in enumerate(dtypes)
    ]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def draw(case, rng, dtype="float32", generic=False):
    """Returns random channels-last tensors of `dtype` for a case, with the upstream gradient as "outputs".

    Offsets extend beyond the borders and lie on a grid that float32 positions represent exactly, so that
    errors are due to the arithmetic and not to samples that rounding moves to the next cell. `generic` keeps
    them off the integers, where the gradient is discontinuous.
    """
    tensors = {name: rng.normal(size=shape) for name, shape in case.shapes.items()}
    tensors["offsets"] = (np.round(tensors["offsets"] * 2 * 512) + (0.5 if generic else 0)) / 512
    if case.modulated:
        tensors["mask"] = rng.uniform(0.0, 1.0, size=tensors["mask"].shape)
    return {name: tensor.astype(numpy_dtype(dtype)) for name, tensor in tensors.items()}


def split_upstream(tensors):
    """Returns the op's arguments and the upstream gradient."""
    arguments = dict(tensors)
    return arguments, arguments.pop("outputs")


def to_layout(name, tensor, data_format):
    """Converts a channels-last tensor to another data format."""
    if name in IMAGES and data_format == "channels_first":
        return np.ascontiguousarray(np.moveaxis(tensor, -1, 1))
    return tensor


def from_layout(name, tensor, data_format):
    """The inverse of `to_layout`, for anything that NumPy can convert."""
    tensor = np.asarray(tensor)
    if name in IMAGES and data_format == "channels_first":
        return np.moveaxis(tensor, 1, -1)
    return tensor


def expected(case, tensors):
    """Returns the oracle's outputs and gradients by name."""
    arguments, upstream = split_upstream(tensors)
    outputs = oracle.deformable_conv2d(**arguments, **case.options)
    arguments.pop("bias", None)
    gradients = oracle.deformable_conv2d_gradients(upstream, **arguments, **case.options)
    return outputs, {name: gradients[name] for name in tensors if name != "outputs"}


def relative_error(actual, wanted, scale=0.0):
    """The largest absolute error relative to the largest wanted value, or to `scale` if that is larger.

    It is infinite if NaN or infinite values differ. Below its smallest normal number, a dtype has fewer
    significant digits, so errors are relative to at least that number. For float16 it is 6e-5, which is
    within the range of gradients.
    """
    actual = np.asarray(actual)
    least = float(ml_dtypes.finfo(actual.dtype).smallest_normal)
    actual, wanted = actual.astype(np.float64), np.asarray(wanted).astype(np.float64)
    assert actual.shape == wanted.shape, f"shape {actual.shape}, wanted {wanted.shape}"
    if not actual.size:
        return 0.0
    error = np.abs(actual - wanted).max()
    if not np.isfinite(error):
        return np.inf
    return error / max(np.abs(wanted).max() or 1.0, least, scale)


def root_sums_of_squares(case, tensors):
    """Returns, by name, about how large the results are if the signs of the terms that they sum are random.

    The gradient of the offsets is left out: its terms are differences, which squares do not bound.
    """
    squares = {
        name: tensor if name == "offsets" else tensor.astype(np.float64) ** 2
        for name, tensor in tensors.items()
    }
    outputs, gradients = expected(case, squares)
    del gradients["offsets"]
    return {name: np.sqrt(sums.max(initial=0.0)) for name, sums in {"outputs": outputs, **gradients}.items()}


def assert_as_expected(case, tensors, dtype, outputs, gradients, oracles=None):
    """Compares outputs and gradients with the oracle's, which are slow to compute.

    All tensors are channels last. Gradients are given by name.
    """
    wanted_outputs, wanted_gradients = oracles or expected(case, tensors)
    assert gradients.keys() == wanted_gradients.keys()
    found, wanted = {"outputs": outputs, **gradients}, {"outputs": wanted_outputs, **wanted_gradients}
    bounds = {"outputs": VALUE_BOUND[dtype], **dict.fromkeys(gradients, GRADIENT_BOUND[dtype])}

    def too_large(scales):
        errors = {
            name: relative_error(found[name], wanted[name], scales.get(name, 0.0)) / bounds[name]
            for name in found
        }
        return {name: error for name, error in errors.items() if not error <= 1.0}

    # A result of few values can cancel to almost zero, in which case the rounding of its terms counts.
    errors = too_large({}) and too_large(root_sums_of_squares(case, tensors))
    assert not errors, f"errors in multiples of the bound, {case}, {dtype}: {errors}"


def call(arguments, case, data_format="channels_last", implementation="reference"):
    """Calls the op with tensors that are already in `data_format`."""
    from keras_das import ops  # not needed to run cases without a framework

    return ops.deformable_conv2d(
        **arguments, **case.options, data_format=data_format, implementation=implementation
    )

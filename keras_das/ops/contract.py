"""The contract of `deformable_conv2d`: which shapes and dtypes fit together, and what follows from them."""

import functools
from typing import Any, NamedTuple

import keras

from keras_das.ops.arguments import Settings
from keras_das.ops.geometry import Geometry, make_windows

Tensor = Any
Shape = tuple[Any, ...]  # integers, `None` for unknown sizes, or JAX's symbolic sizes


class Spec(NamedTuple):
    """Shape and dtype of a tensor. Sizes can be unknown."""

    shape: Shape
    dtype: str


class Plan(NamedTuple):
    """What the shapes, dtypes and settings of a call determine."""

    geometry: Geometry
    output: Spec  # in the data format of the call


def make_plan(
    settings: Settings,
    inputs: Tensor,
    kernel: Tensor,
    offsets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Plan:
    """Validates the tensors of a call, which can be symbolic.

    Returns:
        The plan.

    Raises:
        ValueError: If the tensors do not fit each other or the settings. The message names the argument.
    """
    for name, tensor in (("inputs", inputs), ("kernel", kernel), ("offsets", offsets)):
        if tensor is None:
            raise ValueError(f"`{name}` must be a tensor. Received: {name}=None")
    named = {"inputs": inputs, "kernel": kernel, "offsets": offsets, "mask": mask, "bias": bias}
    return _make_plan(settings, *(_spec_of(name, tensor) for name, tensor in named.items()))


def _spec_of(name: str, tensor: Tensor | None) -> Spec | None:
    if tensor is None:
        return None
    if getattr(tensor.shape, "rank", 0) is None:
        raise ValueError(f"`{name}` must have a known rank. Received: {name}={tensor}")
    return Spec(tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))


@functools.lru_cache(maxsize=1024)  # eager calls repeat the same shapes
def _make_plan(
    settings: Settings, inputs: Spec, kernel: Spec, offsets: Spec, mask: Spec | None, bias: Spec | None
) -> Plan:
    named = {"inputs": inputs, "kernel": kernel, "offsets": offsets, "mask": mask, "bias": bias}
    for name, spec in named.items():
        if spec is not None:
            _check_spec(name, spec)
    batch, height, width, channels = _channels_last(settings, inputs)
    groups = _count_groups(channels, kernel.shape)
    *kernel_size, depth, filters = kernel.shape
    if depth * groups % settings.offset_groups:
        raise ValueError(
            f"`offset_groups` must divide the channels of `inputs` ({channels}). "
            f"Received: offset_groups={settings.offset_groups}"
        )
    windows = make_windows(tuple(kernel_size), settings.strides, settings.dilation_rate, settings.padding)
    geometry = Geometry(*windows, groups, settings.offset_groups)
    rows, columns = (window.output_size(size) for window, size in zip(windows, (height, width), strict=True))
    if any(size is not None and size < 1 for size in (rows, columns)):
        raise ValueError(
            "`kernel` with its dilation must not be larger than the padded `inputs`. Received: "
            f"kernel.shape={kernel.shape}, dilation_rate={settings.dilation_rate}, "
            f"padding={settings.padding!r}, inputs.shape={inputs.shape}"
        )
    samples = settings.offset_groups * geometry.taps
    _check_field(settings, "offsets", offsets, (batch, rows, columns, samples * 2))
    if mask is not None:
        _check_field(settings, "mask", mask, (batch, rows, columns, samples))
    if bias is not None and bias.shape != (filters,):
        raise ValueError(
            f"`bias` must have shape (filters,) = ({filters},). Received: bias.shape={bias.shape}"
        )
    output = _from_channels_last(settings, (batch, rows, columns, filters))
    return Plan(geometry, Spec(output, _result_dtype(inputs, kernel)))


def _check_spec(name: str, spec: Spec) -> None:
    rank = 1 if name == "bias" else 4
    if len(spec.shape) != rank:
        raise ValueError(f"`{name}` must have rank {rank}. Received: {name}.shape={spec.shape}")
    if spec.dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(
            f"`{name}` must be float16, bfloat16, float32 or float64. Received: {name}.dtype={spec.dtype}"
        )


def _count_groups(channels: Any, shape: Shape) -> int:
    if channels is None or channels < 1:
        raise ValueError(
            f"`inputs` must have a known, positive number of channels. Received: {channels} channels"
        )
    if None in shape or 0 in shape:
        raise ValueError(f"`kernel` must have a known shape without zeros. Received: kernel.shape={shape}")
    _, _, depth, filters = shape
    if channels % depth or filters % (channels // depth):
        raise ValueError(
            "`kernel` must have shape (kh, kw, C / groups, filters) with groups dividing both the channels C "
            f"of `inputs` ({channels}) and the filters. Received: kernel.shape={shape}"
        )
    return channels // depth


def _check_field(settings: Settings, name: str, spec: Spec, expected: Shape) -> None:
    """Checks the shape of offsets or mask, given the expected channels-last shape."""
    found = _channels_last(settings, spec)
    if any(f is not None and e is not None and f != e for f, e in zip(found, expected, strict=True)):
        raise ValueError(
            f"`{name}` must have shape {_from_channels_last(settings, expected)} for these `inputs` and "
            f"`kernel` (data_format={settings.data_format!r}, offset_groups={settings.offset_groups}). "
            f"Received: {name}.shape={spec.shape}"
        )


def _channels_last(settings: Settings, spec: Spec) -> Shape:
    if settings.data_format == "channels_last":
        return spec.shape
    n, c, h, w = spec.shape
    return n, h, w, c


def _from_channels_last(settings: Settings, shape: Shape) -> Shape:
    n, h, w, c = shape
    return shape if settings.data_format == "channels_last" else (n, c, h, w)


def _result_dtype(inputs: Spec, kernel: Spec) -> str:
    """Returns Keras' result type, but keeps float64, which Keras lowers on JAX and torch."""
    dtypes = {inputs.dtype, kernel.dtype}
    return "float64" if "float64" in dtypes else keras.backend.result_type(*dtypes)

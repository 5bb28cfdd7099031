"""The C++ kernels without any framework, through csrc/c_api.cc: NumPy arrays in, NumPy arrays out."""

from __future__ import annotations

import ctypes

import numpy as np

from tests import oracle
from tests.ops.op_cases import numpy_dtype

DTYPES = ("float16", "bfloat16", "float32", "float64")  # in the order of `keras_das::DType`


class KernelError(ValueError):
    """What the kernels' own check of the arguments found."""


class PlainKernels:
    """A library that holds csrc/c_api.cc."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.keras_das_geometry_size.restype = ctypes.c_int64

    def geometry(self, inputs_shape, kernel_shape, strides, padding, dilation_rate, offset_groups):
        """(the C++ structure, output height, output width)"""
        same = isinstance(padding, str) and padding.lower() == "same"
        sides = ((0, 0), (0, 0)) if isinstance(padding, str) else padding
        settings = [
            *oracle.pair(strides),
            *oracle.pair(dilation_rate),
            int(same),
            *sides[0],
            *sides[1],
            offset_groups,
        ]
        geometry = ctypes.create_string_buffer(self.library.keras_das_geometry_size())
        sizes, message = (ctypes.c_int64 * 2)(), ctypes.create_string_buffer(1000)
        arrays = [(ctypes.c_int64 * len(a))(*a) for a in (inputs_shape, kernel_shape, settings)]
        if self.library.keras_das_geometry(*arrays, sizes, geometry, message, ctypes.c_int64(1000)):
            raise KernelError(message.value.decode())
        return geometry, *sizes

    def value_and_gradients(self, arguments, upstream, threads=1, **options):
        """Outputs, and gradients of sum(upstream * outputs) by argument, each in its argument's dtype."""
        dtype = str(arguments["inputs"].dtype)
        sums = np.float64 if dtype == "float64" else np.float32
        wide = {name: np.ascontiguousarray(a.astype(sums)) for name, a in arguments.items()}
        wide["inputs"] = np.ascontiguousarray(arguments["inputs"])
        kernel_shape = arguments["kernel"].shape
        geometry, height, width = self.geometry(wide["inputs"].shape, kernel_shape, **options)
        output = np.full(
            (wide["inputs"].shape[0], height, width, kernel_shape[3]), np.nan, numpy_dtype(dtype)
        )
        names = ("inputs", "kernel", "offsets", "mask", "bias")
        number, threads = DTYPES.index(dtype), ctypes.c_int64(threads)
        buffers = [wide.get(name) for name in names] + [output]
        assert not self.library.keras_das_forward(number, geometry, _pointers(buffers), threads)
        gradients = {name: np.full(wide[name].shape, np.nan, sums) for name in arguments}
        buffers = [wide.get(name) for name in names[:4]] + [np.ascontiguousarray(upstream.astype(sums))]
        buffers += [gradients.get(name) for name in names]
        assert not self.library.keras_das_backward(number, geometry, _pointers(buffers), threads)
        return output, {name: g.astype(arguments[name].dtype) for name, g in gradients.items()}


def _pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(None if a is None else a.ctypes.data for a in arrays))

"""Calls the C++ kernels on NumPy arrays without a framework, through tests/csrc/c_api.cc."""

from __future__ import annotations

import ctypes
import pathlib
import subprocess

import numpy as np

from tests import oracle
from tests.ops.op_cases import numpy_dtype

DTYPES = ("float16", "bfloat16", "float32", "float64")  # in the order of `keras_das::DType`
CSRC = pathlib.Path(__file__).parents[1] / "csrc"
# Not from the package, which would import a framework; sanitizers do not run with it.
INCLUDES = (f"-I{CSRC.parents[1] / 'keras_das' / 'csrc'}", f"-I{CSRC}")


class KernelError(ValueError):
    """Raised if the kernels reject the arguments."""


class PlainKernels:
    """The kernels of a library that contains c_api.cc."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.keras_das_geometry_size.restype = ctypes.c_int64

    def geometry(self, inputs_shape, kernel_shape, strides, padding, dilation_rate, offset_groups):
        """Returns the C++ structure, the output height, and the output width."""
        settings = _settings(strides, padding, dilation_rate, offset_groups)
        geometry = ctypes.create_string_buffer(self.library.keras_das_geometry_size())
        sizes, message = (ctypes.c_int64 * 2)(), ctypes.create_string_buffer(1000)
        arrays = [(ctypes.c_int64 * len(a))(*a) for a in (inputs_shape, kernel_shape, settings)]
        if self.library.keras_das_geometry(*arrays, sizes, geometry, message, ctypes.c_int64(1000)):
            raise KernelError(message.value.decode())
        return geometry, *sizes

    def value_and_gradients(self, arguments, upstream, threads=1, **options):
        """Returns outputs and gradients of sum(upstream * outputs) by argument.

        Each gradient has the dtype of its argument.
        """
        dtype = str(arguments["inputs"].dtype)
        sums = np.float64 if dtype == "float64" else np.float32
        wide = {name: self.place(a.astype(sums)) for name, a in arguments.items()}
        wide["inputs"] = self.place(arguments["inputs"])
        kernel_shape = arguments["kernel"].shape
        geometry, height, width = self.geometry(wide["inputs"].shape, kernel_shape, **options)
        output_shape = (wide["inputs"].shape[0], height, width, kernel_shape[3])
        output = self.place(np.full(output_shape, np.nan, numpy_dtype(dtype)))
        names = ("inputs", "kernel", "offsets", "mask", "bias")
        buffers = [wide.get(name) for name in names] + [output]
        self.run("forward", DTYPES.index(dtype), geometry, buffers, threads)
        gradients = {name: self.place(np.full(wide[name].shape, np.nan, sums)) for name in arguments}
        buffers = [wide.get(name) for name in names[:4]] + [self.place(upstream.astype(sums))]
        buffers += [gradients.get(name) for name in names]
        self.run("backward", DTYPES.index(dtype), geometry, buffers, threads)
        return output, {name: g.astype(arguments[name].dtype) for name, g in gradients.items()}

    def place(self, array):
        """Returns the array in the form that is passed to the kernels."""
        return np.ascontiguousarray(array)

    def run(self, direction, dtype, geometry, arrays, threads):
        """Calls the kernels, which write into the last of the arrays. An array may be `None`."""
        function = getattr(self.library, f"keras_das_{direction}")
        assert not function(dtype, geometry, _pointers(arrays), ctypes.c_int64(threads))


class EmulatedKernels(PlainKernels):
    """The kernels of a program that contains serve.cc, run by a command, such as an emulator's."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self):
        """Ends the program, and returns its exit status."""
        with self.process.stdin, self.process.stdout:
            self.process.stdin.close()
            return self.process.wait(60)

    def geometry(self, inputs_shape, kernel_shape, strides, padding, dilation_rate, offset_groups):
        geometry = (*inputs_shape, *kernel_shape, *_settings(strides, padding, dilation_rate, offset_groups))
        return geometry, *self._call(0, 0, geometry, [], 1)

    def run(self, direction, dtype, geometry, arrays, threads):
        self._call(("forward", "backward").index(direction) + 1, dtype, geometry, arrays, threads)

    def _call(self, function, dtype, geometry, arrays, threads):
        """Returns the height and width of the output, after all arrays are replaced by the program's."""
        sizes = [0 if array is None else array.nbytes for array in arrays]
        request = np.array([function, dtype, threads, *geometry, *sizes, *[0] * (10 - len(sizes))], np.int64)
        given = [array for array in arrays if array is not None]
        self.process.stdin.write(b"".join([request.tobytes(), *(array.tobytes() for array in given)]))
        self.process.stdin.flush()
        status, *output_size = np.frombuffer(self._read(3 * 8), np.int64).tolist()
        message = self._read(256).split(b"\0")[0].decode()
        if status:
            raise KernelError(message)
        for array in given:
            array[...] = np.frombuffer(self._read(array.nbytes), array.dtype).reshape(array.shape)
        return output_size

    def _read(self, size):
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the program ended with status {self.process.wait(60)}"
        return data


class CudaKernelsOnHost(PlainKernels):
    """CUDA kernels compiled for the host by a C++ compiler, in a library that contains c_api.cc.

    Every tensor is surrounded by NaN, which reveals reads and writes out of bounds.
    """

    GUARD = 64  # elements

    def __init__(self, path):
        super().__init__(path)
        self.deterministic = self.backwards = False
        self.workspace_bytes, self.most_blocks, self.memory = 1 << 20, 1 << 20, 1 << 40
        self.shift = 0  # offset in elements from an address that is a multiple of 64
        self.taken = {}  # bytes of working memory in the last call of each function
        self._placed = []

    def value_and_gradients(self, *arguments, **options):
        self._placed = []
        results = super().value_and_gradients(*arguments, **options)
        for whole, start, size in self._placed:
            around = np.concatenate([whole[:start], whole[start + size :]])
            assert np.isnan(around.astype(np.float32)).all(), "something was written beside a tensor"
        return results

    def place(self, array):
        size = array.itemsize
        whole = np.full(array.size + 2 * self.GUARD + 64 // size, np.nan, array.dtype)
        start = self.GUARD + (-whole[self.GUARD :].ctypes.data % 64) // size + self.shift
        self._placed.append((whole, start, array.size))
        placed = whole[start : start + array.size].reshape(array.shape)
        placed[...] = array
        return placed

    def run(self, direction, dtype, geometry, arrays, threads):
        function = getattr(self.library, f"keras_das_cuda_{direction}")
        function.restype = ctypes.c_int64
        message = ctypes.create_string_buffer(1000)
        settings = (self.deterministic, self.workspace_bytes, self.most_blocks, self.backwards, self.memory)
        self.taken[direction] = function(
            dtype,
            geometry,
            _pointers(arrays),
            (ctypes.c_int64 * 5)(*map(int, settings)),
            message,
            ctypes.c_int64(1000),
        )
        if message.value:
            raise KernelError(message.value.decode())
        assert self.taken[direction] >= 0, "something was written beyond working memory"


def _settings(strides, padding, dilation_rate, offset_groups):
    """The settings in the order of `keras_das_geometry`."""
    same = isinstance(padding, str) and padding.lower() == "same"
    sides = ((0, 0), (0, 0)) if isinstance(padding, str) else padding
    return [
        *oracle.pair(strides),
        *oracle.pair(dilation_rate),
        int(same),
        *sides[0],
        *sides[1],
        offset_groups,
    ]


def _pointers(arrays):
    """The addresses of arrays: null for `None`, and for empty ones, as frameworks may pass them."""
    addresses = (None if a is None or not a.size else a.ctypes.data for a in arrays)
    return (ctypes.c_void_p * len(arrays))(*addresses)

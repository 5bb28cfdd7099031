"""DeformConv of onnxruntime, with constant weights and tensors bound in advance."""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from problem import channels_first, channels_last

VERSIONS = ("onnxruntime", "onnx")


def prepare(problem, mode, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_model(problem), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name in ("inputs", "offsets", "mask"):
        value = onnxruntime.OrtValue.ortvalue_from_numpy(channels_first(problem.arrays[name]))
        binding.bind_ortvalue_input(name, value)
    output = channels_first(np.zeros_like(problem.arrays["grad_output"]))
    output = onnxruntime.OrtValue.ortvalue_from_numpy(output)
    binding.bind_ortvalue_output("output", output)

    def run():
        session.run_with_iobinding(binding)
        return [output]

    return run, lambda results: [channels_last(result.numpy()) for result in results]


def _model(problem):
    n, h, w, _ = problem.sizes
    channels = {"inputs": problem.channels, "offsets": 18, "mask": 9, "output": problem.filters}
    values = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [n, depth, h, w])
        for name, depth in channels.items()
    }
    kernel = numpy_helper.from_array(problem.arrays["kernel"].transpose(3, 2, 0, 1).copy(), "kernel")
    node = helper.make_node(
        "DeformConv",
        ["inputs", "kernel", "offsets", "", "mask"],
        ["output"],
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        group=problem.groups,
    )
    output = values.pop("output")
    graph = helper.make_graph([node], "deformable_conv2d", list(values.values()), [output], [kernel])
    # DeformConv with a CPU kernel that accepts a mask: operator set 22, in a file format it can read.
    opset = helper.make_opsetid("", 22)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()

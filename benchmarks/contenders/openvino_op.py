"""DeformableConvolution-8 of OpenVINO on the CPU, with constant weights."""

import numpy as np
import openvino
from openvino import opset8

from problem import channels_first, channels_last

VERSIONS = ("openvino",)


def prepare(problem, mode, threads):
    arrays = [channels_first(problem.arrays[name]) for name in ("inputs", "offsets", "mask")]
    inputs, offsets, mask = (opset8.parameter(array.shape, np.float32) for array in arrays)
    ones = [1, 1]
    output = opset8.deformable_convolution(
        inputs,
        offsets,
        opset8.constant(problem.arrays["kernel"].transpose(3, 2, 0, 1).copy()),
        strides=ones,
        pads_begin=ones,
        pads_end=ones,
        dilations=ones,
        mask=mask,
        group=problem.groups,
        bilinear_interpolation_pad=True,
    )
    model = openvino.Model([opset8.result(output)], [inputs, offsets, mask])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    for place, array in enumerate(arrays):
        request.set_input_tensor(place, openvino.Tensor(array))

    def run():
        request.infer()
        return [request.get_output_tensor(0)]

    return run, lambda results: [channels_last(result.data) for result in results]

"""Where gates sample their feature map, and which parts of it they keep.

Positions are `(y, x)` in pixels of the input image, row before column. An integer is the center of a pixel,
so an image of H rows extends from -0.5 to H - 0.5. Positions are computed exactly from the strides, paddings
and kernel sizes of the preceding layers, not from the ratio of the sizes: a pixel of a feature map is located
at the center of its receptive field, including zero padding (Araujo et al., 2019, equations 2 and 3).
Preceding gates and global means do not affect positions. Layers that resize a feature map are assumed to keep
its ends in place.

The functions that draw return a `matplotlib.figure.Figure`; `figure.savefig(path)` writes it. They require
matplotlib, which the extra `viz` installs: `pip install 'keras-das[viz]'`.

Reference:
    - [Araujo et al., 2019](https://distill.pub/2019/computing-receptive-fields)
"""

from keras_das.visualize.gates import GateStatistics, gate_inputs, gate_map, gate_statistics
from keras_das.visualize.gradcam import grad_cam
from keras_das.visualize.plots import plot_gates, plot_grad_cam, plot_history, plot_sampling_points
from keras_das.visualize.sampling import SamplingPoints, sampling_points, stacked_sampling_points
from keras_das.visualize.tensorboard import GateMonitor, TensorBoardFigures

__all__ = [
    "GateMonitor",
    "GateStatistics",
    "SamplingPoints",
    "TensorBoardFigures",
    "gate_inputs",
    "gate_map",
    "gate_statistics",
    "grad_cam",
    "plot_gates",
    "plot_grad_cam",
    "plot_history",
    "plot_sampling_points",
    "sampling_points",
    "stacked_sampling_points",
]

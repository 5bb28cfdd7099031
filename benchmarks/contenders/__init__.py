"""The contenders. To add one, add a line to `CONTENDERS` and a module, unless an existing module fits.

A module contains `VERSIONS`, the names of the distributions whose versions are reported, and

    prepare(problem, mode, threads, **options) -> (run, collect)

`run()` computes once and returns when the result is there; it alone is timed. `collect(run())` gives the
result as NumPy arrays in keras_das' layout: the output and, for mode "forward_backward", then the gradients
for `problem.differentiated`. Layouts are changed ahead of `run` or in `collect`, never in `run`. With `calls`
among the options, `run()` computes that many times. A module for TensorFlow or JAX also has
`copy(elements)`, which returns a function that copies a tensor: the GPU's bandwidth is measured by it.
"""

from dataclasses import dataclass, field

from problem import MODES, OPERATIONS


@dataclass(frozen=True)
class Contender:
    """How to run a contender."""

    module: str
    description: str
    # The environment: "" is that of the benchmark; the others are those of environments.sh.
    environment: str = ""
    modes: tuple[str, ...] = MODES
    operations: tuple[str, ...] = OPERATIONS
    options: dict = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether it is one of the fused kernels."""
        return self.options.get("implementation") == "native"

    def can(self, operation: str, mode: str) -> bool:
        """Whether it supports the problem."""
        return operation in self.operations and mode in self.modes


def _ours(implementation: str, how: str, **options) -> Contender:
    options |= {"implementation": implementation, "how": how}
    return Contender("keras_das_op", f"keras_das, {implementation}, {how}", options=options)


def _gather(how: str, taps_at_once: bool) -> Contender:
    form = "all taps at once" if taps_at_once else "tap by tap"
    options = {"how": how, "taps_at_once": taps_at_once}
    return Contender("tensorflow_gather", f"tf.gather, {form}, {how}", options=options)


FORWARD = ("forward",)
# Those that run on a GPU. The environments of the peers then need a build of torch for CUDA.
ON_GPU = (
    "native-eager",
    "native-graph",
    "native-xla",
    "native-xla-loop",
    "reference-graph",
    "reference-xla",
    "gather-taps-xla",
    "torchvision",
    "deformops",
    "tvdcn",
    "dcnv4",
)
# Not measured unless they are asked for.
ON_REQUEST = (
    "native-xla-loop",
    "native-jax",
    "reference-eager",
    "reference-xla-loop",
    "deformops",
    "tvdcn",
    "dcnv4",
)
_LOOP = {"how": "xla", "calls": 16}

CONTENDERS = {
    "native-eager": _ours("native", "eager"),
    "native-graph": _ours("native", "graph"),
    "native-xla": _ours("native", "xla"),
    "native-xla-loop": _ours("native", **_LOOP),
    "native-jax": Contender("keras_das_jax", "keras_das, native, JAX", options={"implementation": "native"}),
    "reference-eager": _ours("reference", "eager"),
    "reference-graph": _ours("reference", "graph"),
    "reference-xla": _ours("reference", "xla"),
    "reference-xla-loop": _ours("reference", **_LOOP),
    "gather-graph": _gather("graph", taps_at_once=True),
    "gather-xla": _gather("xla", taps_at_once=True),
    "gather-taps-xla": _gather("xla", taps_at_once=False),
    "tfa": Contender("addons", "tensorflow-addons' resampler, graph", environment="tfa"),
    "torchvision": Contender("torchvision_op", "torchvision, deform_conv2d", environment="torchvision"),
    "deformops": Contender("deformops_op", "deformops, registry.conv", environment="deformops"),
    "tvdcn": Contender("tvdcn_op", "tvdcn, deform_conv2d", environment="tvdcn"),
    "dcnv4": Contender("dcnv4_op", "DCNv4's operation", "dcnv4", operations=("aggregation",)),
    "onnxruntime": Contender("onnxruntime_op", "onnxruntime, DeformConv", "onnxruntime", FORWARD),
    "openvino": Contender("openvino_op", "OpenVINO, DeformableConvolution", "openvino", FORWARD),
}

"""Small models for attaching gates, and helpers for their outputs and gates."""

import keras
import numpy as np

from keras_das import DASLayer
from keras_das._keras_internals import node_of
from keras_das.models.graph import sort_nodes

# With one tap instead of nine, TensorFlow traces a gate much faster.
SMALL_GATE = {"kernel_size": 1}


def hub_resnet(**kwargs):
    keras_hub = _import("keras_hub")
    arguments = {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 16, 16, 16],
        "stackwise_num_blocks": [1, 1, 1, 1],
        "stackwise_num_strides": [1, 2, 2, 2],
        "block_type": "basic_block",
    }
    return keras_hub.models.ResNetBackbone(**{**arguments, **kwargs})


def cv_resnet(**kwargs):
    keras_cv = _import("keras_cv")
    arguments = {
        "stackwise_filters": [8, 8, 16, 16],
        "stackwise_blocks": [1, 1, 1, 1],
        "stackwise_strides": [1, 2, 2, 2],
        "block_type": "block",
        "include_rescaling": True,
    }
    return keras_cv.models.ResNetBackbone(**{**arguments, **kwargs})


def mobilenet(**kwargs):
    arguments = {"input_shape": (64, 64, 3), "alpha": 0.35, "weights": None, "classes": 5}
    return keras.applications.MobileNetV2(**{**arguments, **kwargs})


def plain_cnn(data_format="channels_last", size=32, dtype=None, convolution=keras.layers.Conv2D):
    """A residual network with two stages, at 1/4 and 1/8 of the image size."""
    common = {"padding": "same", "data_format": data_format, "dtype": dtype}
    shape = (size, size, 3) if data_format == "channels_last" else (3, size, size)
    image = keras.Input(shape, name="image")
    x = convolution(8, 3, strides=4, name="stem", **common)(image)
    for i, strides in enumerate((1, 2)):
        shortcut = convolution(8, 1, strides=strides, name=f"shortcut_{i}", **common)(x)
        x = convolution(8, 3, strides=strides, name=f"conv_{i}", **common)(x)
        x = keras.layers.Add(name=f"add_{i}", dtype=dtype)([x, shortcut])
        x = keras.layers.ReLU(name=f"relu_{i}", dtype=dtype)(x)
    x = keras.layers.GlobalAveragePooling2D(data_format=data_format, dtype=dtype, name="pool")(x)
    return keras.Model(image, keras.layers.Dense(3, name="classes")(x), name="plain")


def _import(library):
    import pytest

    return pytest.importorskip(library)


def images(rng, size=64, count=2):
    return rng.uniform(0, 255, (count, size, size, 3)).astype("float32")


def gates(model):
    return [layer.name for layer in model.layers if isinstance(layer, DASLayer)]


def randomize(model, rng):
    """Moves all weights away from their initial values, as in a pretrained model."""
    for weight in model.weights:
        noise = rng.normal(0, 0.1, weight.shape)
        # Variances must remain positive.
        positive = "variance" in weight.path
        weight.assign(weight + keras.ops.cast(np.abs(noise) if positive else noise, weight.dtype))


def assert_no_way_around_gates(tensors):
    """Checks that the output of a gated layer is used only by its gate, and is not one of `tensors`.

    Keras' `clone_model` and the model libraries reconnect the layers of a gated model. They must not bypass a
    gate, although the gated layer is still in the model under its name.
    """
    nodes = sort_nodes(tensors)
    gates = {node.parent_nodes[0]: node for node in nodes if isinstance(node.operation, DASLayer)}
    assert gates
    for node in nodes:
        for parent in node.parent_nodes:
            assert gates.get(parent, node) is node, f"{node.operation.name} reads {parent.operation.name}"
    assert not {node_of(tensor) for tensor in tensors} & set(gates)


def open_gates(layers, rng):
    """Moves gates away from the identity, as training would."""
    for layer in layers:
        if isinstance(layer, DASLayer):
            layer.layer_norm.gamma.assign(rng.normal(0, 1, layer.layer_norm.gamma.shape))


def assert_same(a, b):
    """Checks that two nested outputs are bitwise equal."""
    keras.tree.assert_same_structure(a, b)
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        assert x.dtype == y.dtype
        x, y = (value.numpy() if hasattr(value, "numpy") else value for value in (x, y))
        np.testing.assert_array_equal(x, y)


def weights_of(model):
    return [variable.numpy().copy() for variable in model.variables]

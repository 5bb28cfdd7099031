"""Tests of the ONNX exporter: node types, numerical agreement with Keras, and errors."""

import contextlib
import logging
import sys

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from tf2onnx.optimizer.transpose_optimizer import TransposeOptimizer

import keras_das
from keras_das.exporters import onnx_conversion
from tests import oracle
from tests.exporters.conftest import assert_close, many_convolutions


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path)
    assert {value.name for value in session.get_inputs()} == set(inputs)
    (output,) = session.run(["output_0"], inputs)
    return output


def run_only(path, images):
    """Runs a model with a single input of any name."""
    (name,) = (value.name for value in onnx.load(path).graph.input)
    return run(path, **{name: images})


@pytest.fixture(scope="module")
def exported_operation(tmp_path_factory):
    """A model that consists of one operation, its ONNX file, and the shapes of its inputs."""
    rng = np.random.default_rng(4)
    shapes = {"x": (1, 6, 7, 4), "offsets": (1, 6, 7, 18), "mask": (1, 6, 7, 9)}
    x, offsets, mask = (keras.Input(shape[1:], name=name) for name, shape in shapes.items())
    kernel = rng.normal(size=(3, 3, 4, 2)).astype("float32")
    outputs = keras_das.ops.deformable_conv2d(x, kernel, offsets, mask, padding="same")
    model, path = keras.Model([x, offsets, mask], outputs), tmp_path_factory.mktemp("onnx") / "model.onnx"
    keras_das.export(model, path, format="onnx")
    return model, path, shapes


@pytest.fixture
def operation(exported_operation, rng):
    """The model, its ONNX file, and input values."""
    model, path, shapes = exported_operation
    return model, path, {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["1-image", "a.b"])
def test_input_names_that_python_does_not_accept(name, tmp_path, rng):
    inputs = keras.Input((8, 6, 3), name=name)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    images = rng.normal(size=(2, 8, 6, 3)).astype("float32")
    assert_close(run(tmp_path / "model.onnx", **{name: images}), model(images))


def deform_convs(path):
    """Returns the `DeformConv` nodes.

    Checks that the file contains only standard ONNX operations and no loops over taps.
    """
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Loop", "Scan", "GatherND"})
    return [node for node in model.graph.node if node.op_type == "DeformConv"]


@pytest.mark.slow
def test_residual_network_with_four_gates(residual_network, expected, tmp_path):
    path = tmp_path / "model.onnx"
    keras_das.export(residual_network, path, format="onnx")
    assert len(deform_convs(path)) == 4
    for images, outputs in expected:
        assert_close(run(path, image=images), outputs)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_gate_needs_no_transposes_of_the_feature_map(order, tmp_path, rng, monkeypatch):
    """Only the input, the output, and the predicted offsets and mask are transposed."""
    if order == "shuffled":  # tf2onnx sorts by sets of strings
        shuffled = np.random.default_rng(0).permutation
        nodes = property(lambda optimizer: list(shuffled(optimizer._g.get_nodes())))
        monkeypatch.setattr(TransposeOptimizer, "nodes", nodes)
    gate = keras_das.DASLayer(reduction=0.5, offset_initializer="random_normal")
    layers = [keras.layers.Conv2D(24, 4), gate, keras.layers.Conv2D(5, 4)]
    model = keras.Sequential([keras.Input((16, 16, 3), name="image"), *layers])
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    images = rng.normal(size=(2, 16, 16, 3)).astype("float32")
    assert_close(run(path, image=images), model(images).numpy())
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    transposed = [shapes[node.output[0]] for node in inferred.node if node.op_type == "Transpose"]
    assert [0, 3, 16, 16] in transposed  # the input
    assert all({12, 24}.isdisjoint(shape[1:]) for shape in transposed), transposed


def test_offsets_are_predicted_by_one_dilated_convolution(tmp_path):
    gate = keras_das.DASLayer(dilation_rate=2)
    model = keras.Sequential([keras.Input((None, None, 8), name="image"), gate])
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    nodes = onnx.load(path).graph.node
    assert {"SpaceToDepth", "DepthToSpace"}.isdisjoint(node.op_type for node in nodes)
    convolutions = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in nodes
        if node.op_type == "Conv"
    ]
    (dilated,) = [found for found in convolutions if found.get("dilations") == [2, 2]]
    assert dilated["pads"] == [2, 2, 2, 2]


def test_every_kind_of_convolution(tmp_path, rng):
    model, count = many_convolutions()
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    assert len(deform_convs(path)) == count
    for shape in [(2, 32, 32, 3), (1, 37, 45, 3)]:
        images = rng.normal(size=shape).astype("float32")
        assert_close(run(path, image=images), model(images).numpy())


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_borders(data_format, tmp_path, rng):
    """Compares with the oracle for samples between pixels, at pixels, on the border, and out of bounds."""
    shapes = {"x": (2, 6, 7, 4), "offsets": (2, 6, 7, 36), "mask": (2, 6, 7, 18)}
    values = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    values["offsets"] *= 4
    values["offsets"][:, :3] = np.round(values["offsets"][:, :3])
    kernel = rng.normal(size=(3, 3, 2, 6)).astype("float32")
    first = data_format == "channels_first"
    given = {name: np.moveaxis(x, 3, 1) if first else x for name, x in values.items()}
    x, offsets, mask = (keras.Input(given[name].shape[1:], name=name) for name in shapes)
    arguments = {"padding": "same", "offset_groups": 2, "data_format": data_format}
    outputs = keras_das.ops.deformable_conv2d(x, kernel, offsets, mask, **arguments)
    path = tmp_path / "model.onnx"
    keras_das.export(keras.Model([x, offsets, mask], outputs), path, format="onnx")
    assert len(deform_convs(path)) == 1
    found = run(path, **given)
    wanted = oracle.deformable_conv2d(
        values["x"], kernel, values["offsets"], values["mask"], padding="same", offset_groups=2
    )
    assert_close(np.moveaxis(found, 1, 3) if first else found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "mask"])
def test_bad_values_stay_where_they_are_read(name, bad, operation):
    model, path, values = operation
    values[name][0, 2, 3, 1] = bad
    found, wanted = run(path, **values), model(list(values.values())).numpy()
    finite = np.isfinite(wanted)
    assert not finite.all()
    np.testing.assert_array_equal(np.isfinite(found), finite)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=1e-4, atol=1e-4)
    if not np.isinf(values["mask"]).any():
        # With an infinite mask, the result depends on the order of multiplication: mask times sample is
        # infinite, but mask times a corner that is 0 is NaN.
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))


def test_infinite_offsets_read_zero_and_nan_ones_are_lost(operation):
    """onnxruntime ignores NaN offsets, as documented in `keras_das.export`."""
    model, path, values = operation
    values["offsets"][0, 1, 1, 0] = np.inf
    values["offsets"][0, 4, 4, 1] = -np.inf
    wanted = model(list(values.values())).numpy()
    np.testing.assert_allclose(run(path, **values), wanted, rtol=1e-4, atol=1e-4)
    values["offsets"][0, 1, 1, 0] = np.nan
    assert np.isnan(model(list(values.values())).numpy()[0, 1, 1]).all()
    np.testing.assert_allclose(run(path, **values), wanted, rtol=1e-4, atol=1e-4)


def test_nan_pixels_are_seen_through_a_layer(tmp_path, rng):
    """NaN pixels cause NaN masks as well as NaN offsets."""
    model = keras.Sequential([keras.Input((9, 8, 3)), keras_das.DeformableConv2D(4, 3, padding="same")])
    path = tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    images = rng.normal(size=(2, 9, 8, 3)).astype("float32")
    images[0, 4, 3, 1] = np.nan
    wanted = model(images).numpy()
    assert 9 <= np.isnan(wanted).sum() < wanted.size / 2
    np.testing.assert_allclose(run_only(path, images), wanted, rtol=1e-4, atol=1e-5)


def test_what_onnx_does_not_have(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(keras.ops.erfinv)])
    with pytest.raises(
        ValueError,
        match="cannot be written as ONNX: it contains operations that ONNX does not support: Erfinv",
    ):
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "tf2onnx"])
def test_missing_packages(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ImportError, match=rf"requires {package}: pip install 'keras-das\[export\]'"):
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


class Scaled(keras.layers.Layer):
    """A layer with a constant tensor that is not a variable."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def call(self, inputs):
        return inputs * self.scale


def adapted():
    layer = keras.layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3, 2, (20, 4, 4, 3)))
    return layer


def closure():
    scale = keras.ops.convert_to_tensor([1.0, 3.0, -2.0])
    return keras.layers.Lambda(lambda x: x * scale)


def test_constant_tensors_are_no_inputs(tmp_path, rng):
    scale = [1.0, 3.0, -2.0]
    layers = [
        adapted(),
        keras.layers.Normalization(mean=scale, variance=[4.0, 5.0, 6.0]),
        Scaled(tf.constant(scale)),
        Scaled(keras.ops.convert_to_tensor(scale)),
        closure(),
        keras_das.DeformableConv2D(2, 1),
    ]
    model, path = keras.Sequential([keras.Input((4, 4, 3), name="image"), *layers]), tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    assert [value.name for value in onnx.load(path).graph.input] == ["image"]
    images = rng.normal(size=(2, 4, 4, 3)).astype("float32")
    assert_close(run(path, image=images), model(images).numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("EfficientNetB0", "block3b_add"),
        ("EfficientNetV2B0", "block3b_add"),
        ("ConvNeXtTiny", "convnext_tiny_stage_1_block_0_identity"),
    ],
)
def test_first_stages_of_an_application(name, last, tmp_path, rng):
    """Covers constants in built-in normalization layers, and ConvNeXt's grouped convolutions."""
    whole = getattr(keras.applications, name)(weights=None, include_top=False, input_shape=(64, 64, 3))
    model = keras.Model(whole.input, whole.get_layer(last).output)
    model, path = keras_das.attach_das(model, identity_init=False), tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    images = rng.uniform(0, 255, (2, 64, 64, 3)).astype("float32")
    assert_close(run_only(path, images), model.predict(images, verbose=0))


@pytest.mark.parametrize(("kind", "name"), [("input", "2271:0"), ("output", "output_1")])
def test_a_graph_of_other_inputs_or_outputs_is_not_written(kind, name, tmp_path, monkeypatch):
    convert = onnx_conversion.convert

    def with_one_more(*arguments):
        proto, inputs, outputs = convert(*arguments)
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 3])
        if kind == "input":
            proto.graph.input.append(value)
        else:
            proto.graph.output.append(value)
            proto.graph.node.append(onnx.helper.make_node("Identity", ["image"], [name]))
        return proto, inputs, outputs

    monkeypatch.setattr(onnx_conversion, "convert", with_one_more)
    model = keras.Sequential([keras.Input((3,), name="image"), keras.layers.Rescaling(2.0)])
    with pytest.raises(
        ValueError, match=rf"the graph has the {kind}s .*, '{name}' \(float32\), and the model"
    ):
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []


def images_and_depth(outputs):
    """A model with two inputs that are not in alphabetical order."""
    rgb, depth = keras.Input((6, 6, 3), name="rgb"), keras.Input((6, 6, 1), name="depth")
    features = keras.layers.Concatenate()([keras.layers.Rescaling(2.0)(rgb), depth])
    return keras.Model([rgb, depth], outputs(keras_das.DeformableConv2D(2, 1)(features)))


ORDERS = {
    "twelve outputs": (lambda x: [x * n for n in range(12)], [f"output_{n}" for n in range(12)]),
    "one output": (lambda x: x, ["output_0"]),
    "named outputs": (
        lambda x: {"output_2": x, "output_10": 2 * x, "a": 3 * x},
        ["a", "output_10", "output_2"],
    ),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_inputs_and_outputs_have_keras_order(kind, tmp_path, rng):
    outputs, names = ORDERS[kind]
    model, path = images_and_depth(outputs), tmp_path / "model.onnx"
    keras_das.export(model, path, format="onnx")
    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_inputs()] == ["rgb", "depth"]
    assert [value.name for value in session.get_outputs()] == names
    values = [rng.normal(size=(2, 6, 6, channels)).astype("float32") for channels in (3, 1)]
    found = session.run(None, dict(zip(["rgb", "depth"], values, strict=True)))
    for one, wanted in zip(found, keras.tree.flatten(model(values)), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-4, atol=1e-4)


class TwoImages(keras.Model):
    """A subclassed model with a dictionary as input. TensorFlow names its inputs."""

    def call(self, inputs):
        return [inputs["small"] * 2, inputs["large"] + 1]


def test_a_subclassed_model_has_keras_order(tmp_path, rng):
    model, path = TwoImages(), tmp_path / "model.onnx"
    values = {
        name: rng.normal(size=(2, 4, 4, n)).astype("float32") for name, n in (("small", 1), ("large", 2))
    }
    wanted = model(values)
    keras_das.export(model, path, format="onnx")
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]  # in the order of the sorted keys
    found = session.run(None, dict(zip(names, [values["large"], values["small"]], strict=True)))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_in_a_strategy_s_scope(tmp_path, rng):
    """Covers models built inside and outside the scope, with and without mirrored variables."""
    images = rng.normal(size=(2, 4, 4, 3)).astype("float32")

    def build():
        layers = [
            keras.layers.Conv2D(4, 1),
            keras.layers.BatchNormalization(),
            keras_das.DeformableConv2D(2, 1),
        ]
        return keras.Sequential([keras.Input((4, 4, 3), name="image"), *layers])

    outside = build()
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        inside = build()
        for model in (outside, inside):
            keras_das.export(model, tmp_path / "model.onnx", format="onnx")
            assert_close(run(tmp_path / "model.onnx", image=images), model(images).numpy())
    keras_das.export(inside, tmp_path / "model.onnx", format="onnx")
    assert_close(run(tmp_path / "model.onnx", image=images), inside(images).numpy())


class Compiled(keras.layers.Layer):
    """A layer with an XLA-compiled `call` that contains a deformable convolution."""

    def __init__(self):
        super().__init__()
        self.convolution = keras_das.DeformableConv2D(4, 1)

    def build(self, shape):
        self.convolution.build(shape)

    @tf.function(jit_compile=True)
    def call(self, inputs):
        return 2 * self.convolution(inputs)


def test_what_xla_compiles(tmp_path, rng):
    """Keras compiles grouped convolutions with XLA, because without it they are available only on GPUs."""
    depthwise = keras.layers.Conv2D(8, 3, groups=8, padding="same")
    layers = [
        keras.layers.Conv2D(8, 1),
        keras.layers.Conv2D(4, 3, 2, groups=4),
        keras.layers.Conv2D(8, 1),
        depthwise,
        Compiled(),
    ]
    model = keras.Sequential([keras.Input((6, 6, 3), name="image"), *layers])
    keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    images = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    assert_close(run(tmp_path / "model.onnx", image=images), model(images).numpy())


@pytest.mark.parametrize("succeeds", [True, False])
def test_tf2onnx_keeps_quiet(succeeds, tmp_path, caplog, capfd):
    """tf2onnx warns about each deformable convolution and logs tracebacks before our own errors."""
    layer = keras_das.DeformableConv2D(2, 1) if succeeds else keras.layers.Lambda(keras.ops.erfinv)
    model = keras.Sequential([keras.Input((4, 4, 3)), layer])
    expected = contextlib.nullcontext() if succeeds else pytest.raises(ValueError, match="Erfinv")
    with expected:
        keras_das.export(model, tmp_path / "model.onnx", format="onnx")
    assert [record for record in caplog.records if record.name.startswith(("tf2onnx", "tensorflow"))] == []
    assert "tf2onnx" not in capfd.readouterr().err
    logging.getLogger("tf2onnx.tfonnx").warning("is heard again")
    assert caplog.messages[-1] == "is heard again"

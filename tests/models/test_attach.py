"""Tests of `attach_das` with functional and sequential models: copying and errors."""

import keras
import numpy as np
import pytest

import keras_das
from keras_das.models import attach_das
from tests.models.backbones import (
    SMALL_GATE,
    assert_no_way_around_gates,
    assert_same,
    gates,
    images,
    mobilenet,
    open_gates,
    plain_cnn,
    randomize,
    weights_of,
)


def predictions(model, inputs):
    """Returns the outputs of an eager call and of a graph."""
    return model(inputs), model.predict(inputs, verbose=0)


def test_identity_in_a_graph(rng):
    base = plain_cnn()
    gated = attach_das(base, **SMALL_GATE)
    assert_no_way_around_gates(gated.outputs)
    x = images(rng, 32)
    assert_same(predictions(gated, x), predictions(base, x))


@pytest.mark.slow
def test_identity_under_xla(rng):
    """Outputs agree except for rounding, because XLA may fuse the layers next to a gate differently."""
    base = plain_cnn()
    gated = attach_das(base, **SMALL_GATE)
    for model in (base, gated):
        model.compile(jit_compile=True)
    x = images(rng, 32)
    np.testing.assert_allclose(gated.predict(x, verbose=0), base.predict(x, verbose=0), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_resnet50_of_full_size(rng):
    base = keras.applications.ResNet50(weights=None)
    gated = attach_das(base)
    assert gates(gated) == ["das_p2", "das_p3", "das_p4", "das_p5"]
    assert gated.get_layer("das_p4").output.shape == (None, 14, 14, 1024)
    x = images(rng, 224, 1)
    assert_same(gated(x), base(x))


def test_the_papers_gate_changes_the_outputs(rng):
    base = plain_cnn()
    gated = attach_das(base, identity_init=False, **SMALL_GATE)
    x = images(rng, 32)
    assert not np.array_equal(gated(x).numpy(), base(x).numpy())


def test_gates_of_an_application(rng):
    """Gates do not change the outputs initially. Afterwards, each of them affects the outputs."""
    base, x = mobilenet(), images(rng)
    randomize(base, rng)
    expected = base(x).numpy()
    gated = attach_das(base, **SMALL_GATE)
    assert gates(gated) == ["das_p2", "das_p3", "das_p4", "das_p5"]
    assert_no_way_around_gates(gated.outputs)
    np.testing.assert_array_equal(gated(x).numpy(), expected)
    for name in gates(gated):
        gate = gated.get_layer(name)
        closed = gate.get_weights()
        open_gates([gate], rng)
        assert not np.array_equal(gated(x).numpy(), expected)
        gate.set_weights(closed)


def test_training_leaves_the_base_as_it_is(rng):
    base = plain_cnn()
    nodes = {layer.name: (len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in base.layers}
    before = weights_of(base)
    gated = attach_das(base, **SMALL_GATE)
    assert not {id(layer) for layer in base.layers} & {id(layer) for layer in gated.layers}
    assert nodes == {
        layer.name: (len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in base.layers
    }
    start = weights_of(gated)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    gated.compile("sgd", loss, run_eagerly=True)
    gated.fit(images(rng, 32, 4) / 255, np.array([0, 1, 2, 0]), epochs=2, verbose=0)
    assert_same(weights_of(base), before)
    moved = {
        variable.path
        for variable, old in zip(gated.variables, start, strict=True)
        if not np.array_equal(variable.numpy(), old)
    }
    # The first step updates only the norm's scale. From then on, all weights of the gate have gradients.
    for path in (
        "das_p2/layer_norm/gamma",
        "das_p3/layer_norm/gamma",
        "conv_0/kernel",
        "das_p2/expand/kernel",
    ):
        assert path in moved


def test_trainable_flags_and_gates_of_a_frozen_model():
    base = plain_cnn()
    base.trainable = False
    gated = attach_das(base, **SMALL_GATE)
    assert {weight.path.split("/")[0] for weight in gated.trainable_weights} == set(gates(gated))

    base.trainable = True
    base.get_layer("stem").trainable = False
    base.get_layer("conv_1").trainable = False
    gated = attach_das(base, **SMALL_GATE)
    assert {layer.name for layer in gated.layers if not layer.trainable} == {"stem", "conv_1"}
    reloaded = keras.Model.from_config(gated.get_config())
    assert {layer.name for layer in reloaded.layers if not layer.trainable} == {"stem", "conv_1"}


def test_state_that_is_derived_from_weights(rng):
    """`Normalization` updates its derived state when weights are loaded, but not when they are assigned."""
    image = keras.Input((32, 32, 3))
    normalization = keras.layers.Normalization()
    normalization.adapt(images(rng, 32, 4))
    x = normalization(image)
    for name in ("a", "b"):
        x = keras.layers.Conv2D(4, 3, strides=2, padding="same", name=name)(x)
    base = keras.Model(image, x)
    inputs = images(rng, 32)
    assert_same(attach_das(base, **SMALL_GATE)(inputs), base(inputs))


def test_structure_is_kept(rng):
    """Covers dicts of inputs and outputs, a shared layer, a nested model, `training=False`, and an op."""
    left, right = keras.Input((32, 32, 3), name="left"), keras.Input((32, 32, 3), name="right")
    encoder = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 3)], name="encoder"
    )
    shared = keras.layers.Conv2D(4, 3, strides=2, padding="same", name="shared")
    a, b = shared(encoder(left)), shared(encoder(right))
    x = keras.layers.BatchNormalization(name="norm")(keras.ops.add(a, b), training=False)
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same", name="merged")(keras.ops.relu(x))
    base = keras.Model({"left": left, "right": right}, {"merged": x, "sum": [a + b]})
    randomize(base, rng)
    gated = attach_das(base, at=["merged", "norm"], **SMALL_GATE)
    assert sorted(gates(gated)) == ["das_merged", "das_norm"]
    assert_no_way_around_gates(gated.outputs)
    inputs = {"left": images(rng, 32), "right": images(rng, 32)}
    for training in (False, True):
        assert_same(gated(inputs, training=training), base(inputs, training=training))
    with pytest.raises(ValueError, match="'shared' is called more than once"):
        attach_das(base, at="shared")


def test_nested_model_and_plain_operation_can_be_gated(rng):
    image = keras.Input((32, 32, 3))
    encoder = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Conv2D(4, 3, 4)], name="encoder")
    x = keras.ops.relu(encoder(image))
    operation = x._keras_history.operation.name
    base = keras.Model(image, x)
    gated = attach_das(base, at=["encoder", operation], **SMALL_GATE)
    assert gates(gated) == ["das_encoder", f"das_{operation}"]
    inputs = images(rng, 32)
    assert_same(gated(inputs), base(inputs))


class Doubled(keras.layers.Layer):
    """A layer that is not registered with Keras: it can be copied in memory, but not loaded from a file."""

    def call(self, inputs):
        return 2 * inputs


def test_unregistered_layers(rng):
    image = keras.Input((32, 32, 3))
    inner = keras.Sequential([keras.Input((32, 32, 3)), Doubled(), keras.layers.Conv2D(3, 3, 2)])
    base = keras.Model(image, keras.layers.Conv2D(4, 3, 2)(Doubled()(inner(image))))
    inputs = images(rng, 32)
    assert_same(attach_das(base, **SMALL_GATE)(inputs), base(inputs))


def test_lambdas_keep_their_function(rng):
    factor = 3  # in a closure, which cannot be saved to a file
    image = keras.Input((32, 32, 3))
    inner = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Lambda(lambda x: keras.ops.abs(x) * factor)]
    )
    x = keras.layers.Conv2D(4, 3, 4)(keras.layers.Lambda(lambda x: x / factor)(inner(image)))
    base = keras.Model(image, x)
    inputs = images(rng, 32)
    assert_same(attach_das(base, **SMALL_GATE)(inputs), base(inputs))


def test_layer_that_cannot_be_copied():
    class Nameless(keras.layers.Layer):
        def __init__(self, units):
            super().__init__(name="nameless")

        def get_config(self):
            return {}

        def call(self, inputs):
            return inputs

    image = keras.Input((32, 32, 3))
    base = keras.Model(image, keras.layers.Conv2D(4, 3, 4)(Nameless(3)(image)))
    with pytest.raises(ValueError, match="'nameless' cannot be copied"):
        attach_das(base)


def test_sequential(rng):
    layers = [
        keras.layers.Conv2D(4, 3, 4, padding="same", name="a"),
        keras.layers.Conv2D(4, 3, 2, padding="same", name="b"),
        keras.layers.GlobalAveragePooling2D(),
    ]
    with pytest.raises(ValueError, match="Build the sequential model"):
        attach_das(keras.Sequential(layers))
    base = keras.Sequential([keras.Input((32, 32, 3)), *layers])
    gated = attach_das(base, **SMALL_GATE)
    assert gates(gated) == ["das_p2", "das_p3"]
    inputs = images(rng, 32)
    assert_same(gated(inputs), base(inputs))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_precision(precision, rng):
    base = plain_cnn(dtype=precision)
    gated = attach_das(base, at=["P2", "conv_1"], **SMALL_GATE)
    assert gated.get_layer("das_p2").dtype_policy.name == precision
    x = images(rng, 32)
    assert_same(gated(x), base(x))
    assert attach_das(base, at="P2", dtype="float32").get_layer("das_p2").dtype_policy.name == "float32"


def test_precision_after_a_layer_that_has_none():
    image = keras.Input((32, 32, 3))
    half = keras.layers.Conv2D(4, 3, 4, dtype="mixed_float16")(image)
    x = keras.ops.relu(half)
    gated = attach_das(keras.Model(image, x), at=x._keras_history.operation.name)
    assert gated.layers[-1].dtype_policy.name == "mixed_float16"


def test_channels_first():
    base = plain_cnn(data_format="channels_first")
    gated = attach_das(base, **SMALL_GATE)
    gate = gated.get_layer("das_p3")
    assert gate.data_format == "channels_first"
    assert gate.output.shape == (None, 8, 4, 4)


def test_arguments_reach_the_gates():
    gated = attach_das(plain_cnn(), at=("P2", "conv_1"), reduction=0.5, kernel_size=1, modulated=False)
    for name in ("das_p2", "das_conv_1"):
        gate = gated.get_layer(name)
        assert (gate.reduction, gate.kernel_size, gate.modulated) == (0.5, (1, 1), False)
        assert gate.identity_init
        assert (gate.dilation_rate, gate.offset_scale) == ((2, 2), 0.1)
    gate = attach_das(plain_cnn(), at="P2", dilation_rate=1, offset_scale=1).get_layer("das_p2")
    assert (gate.dilation_rate, gate.offset_scale) == ((1, 1), 1)
    with pytest.raises(ValueError, match="reduction"):
        attach_das(plain_cnn(), reduction=-1)
    with pytest.raises(ValueError, match="each gate is named after the layer"):
        attach_das(plain_cnn(), name="gate")


def test_file(tmp_path, rng):
    gated = attach_das(plain_cnn(), **SMALL_GATE)
    randomize(gated, rng)
    gated.save(tmp_path / "gated.keras")
    loaded = keras.saving.load_model(tmp_path / "gated.keras")
    assert gates(loaded) == gates(gated)
    x = images(rng, 32)
    assert_same(loaded(x), gated(x))


def test_summary_names_the_gates():
    lines = []
    attach_das(plain_cnn()).summary(print_fn=lines.append)
    text = "\n".join(lines)
    for name in ("das_p2", "das_p3", "DASLayer"):
        assert name in text


def test_gates_are_attached_once():
    gated = attach_das(plain_cnn(), **SMALL_GATE)
    for at in (None, "P2", "das_p2", "relu_0"):
        with pytest.raises(ValueError, match="gated already, by 'das_p2'"):
            attach_das(gated, at=at)
    more = attach_das(gated, at="conv_1", **SMALL_GATE)
    assert sorted(gates(more)) == ["das_conv_1", "das_p2", "das_p3"]


def test_a_level_and_a_layer_of_its_name():
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, 4, padding="same")(inputs)
    model = keras.Model(inputs, keras.layers.Add(name="sum")([x, keras.layers.Conv2D(8, 1, name="p2")(x)]))
    with pytest.raises(ValueError, match="whose gates would both be 'das_p2'"):
        attach_das(model, at=["P2", "p2"])


def test_layers_with_weights_that_were_added_later():
    gated = attach_das(plain_cnn(), at="relu_0")
    gated.get_layer("das_relu_0").expand.enable_lora(1)
    with pytest.raises(ValueError, match="The layer 'das_relu_0' cannot be copied: it has 12 weights"):
        attach_das(gated, at="relu_1")


def test_gate_name_that_is_taken():
    image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3, 4, name="stem")(image)
    base = keras.Model(image, keras.layers.ReLU(name="das_stem")(x))
    with pytest.raises(ValueError, match="already has a layer 'das_stem'"):
        attach_das(base, at="stem")


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("conv_2", r"no layer or level named \['conv_2'\]. Close to 'conv_2': \['conv_1', 'conv_0'\]"),
        (["P2", "P4", "nothing"], r"no layer or level named \['P4', 'nothing'\]"),
        ([], r"Received: at=\[\]"),
        (["P2", "relu_0"], "names the layer 'relu_0' twice"),
        (["conv_1", "conv_1"], "names the layer 'conv_1' twice"),
        ("image", "'image' is an input"),
        ("classes", r"does not output a feature map: its output has the shape \(None, 3\)"),
    ],
)
def test_bad_at(at, message):
    with pytest.raises(ValueError, match=message):
        attach_das(plain_cnn(), at=at)


def test_layer_inside_a_nested_model():
    image = keras.Input((32, 32, 3))
    base = keras.Model(image, keras.layers.ReLU()(plain_cnn()(image)))
    with pytest.raises(ValueError, match="'conv_1' is inside the nested model 'plain'"):
        attach_das(base, at="conv_1")


def test_layer_with_several_outputs():
    class Halves(keras.layers.Layer):
        def call(self, inputs):
            return inputs[..., :2], inputs[..., 2:]

    image = keras.Input((32, 32, 4))
    base = keras.Model(image, keras.layers.Add()(Halves(name="halves")(image)))
    with pytest.raises(ValueError, match="'halves' has several outputs"):
        attach_das(base, at="halves")


def test_models_without_a_graph_of_their_own():
    class Subclassed(keras.Model):
        pass

    class WithMethods(keras.Model):
        def __init__(self):
            image = keras.Input((32, 32, 3))
            super().__init__(image, keras.layers.Conv2D(4, 3, 4)(image))

    with pytest.raises(ValueError, match="a subclassed model has none"):
        attach_das(Subclassed())
    with pytest.raises(ValueError, match="a subclassed model has none"):
        attach_das(keras.layers.Conv2D(4, 3))
    with pytest.raises(ValueError, match="would lose what WithMethods adds"):
        attach_das(WithMethods())


def test_public_name():
    assert keras_das.attach_das is attach_das

"""Tests of the callbacks of `visualize` in trainings, and of models that cannot be observed."""

import concurrent.futures

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_das
from keras_das import visualize
from tests.models.backbones import SMALL_GATE, plain_cnn


def small(name="network", size=(16, 16, 3)):
    inputs = keras.Input(size)
    network = keras.Model(inputs, keras.layers.Conv2D(4, 3, 4, padding="same")(inputs), name=name)
    return keras_das.attach_das(network, **SMALL_GATE)


def head(x):
    return keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))


@pytest.fixture
def images(rng):
    return rng.uniform(0, 1, (2, 16, 16, 3)).astype("float32")


def fit(model, images, *callbacks, epochs=1):
    model.compile("sgd", "mse")
    model.fit(images, np.zeros((2, 2)), epochs=epochs, verbose=0, callbacks=list(callbacks))


def test_models_that_the_first_step_builds(tmp_path, images):
    """Sequential models without an `Input` are built after training has begun."""
    layers = [keras.layers.Conv2D(4, 3, 4), keras_das.DASLayer(kernel_size=1, name="gate")]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])
    monitor = visualize.GateMonitor(images)
    fit(model, images, monitor, visualize.TensorBoardFigures(tmp_path, images))
    assert len(monitor.history["gate"]) == 1
    assert list(tmp_path.glob("events*"))
    bare = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
    for callback in (visualize.TensorBoardFigures(tmp_path, images), visualize.GateMonitor(images)):
        with pytest.raises(ValueError, match="`model` must have gates"):
            fit(bare, images, callback)


def test_gates_of_the_same_name(images, capsys):
    """Gates of two backbones in one model are measured separately."""
    inputs = keras.Input((16, 16, 3))
    towers = [small("a"), small("b")]
    model = keras.Model(inputs, head(keras.layers.Add()([tower(inputs) for tower in towers])))
    gates = [tower.get_layer("das_p2") for tower in towers]
    monitor = visualize.GateMonitor(images)
    monitor.set_model(model)
    monitor.on_train_begin()
    for number, gate in enumerate(gates):
        gate.gate = lambda x, value=number: keras.ops.ones_like(x) * value
    for epoch in range(2):
        monitor.on_epoch_end(epoch)
    monitor.on_train_end()
    means = {name: [gate.mean for gate in measured] for name, measured in monitor.history.items()}
    assert means == {"das_p2": [0, 0], "das_p2_1": [1, 1]}
    assert "Gates within 2% of 1: das_p2_1." in capsys.readouterr().out


def test_shared_backbones_fail_before_training(images):
    backbone = small()
    pair = [keras.Input((16, 16, 3)), keras.Input((16, 16, 3))]
    model = keras.Model(pair, head(keras.layers.Subtract()([backbone(inputs) for inputs in pair])))
    before = [np.array(weight) for weight in model.weights]
    with pytest.raises(ValueError, match=r"must be called once.*'das_p2', which is called 2 times"):
        fit(model, [images, images], visualize.GateMonitor([images, images]))
    for old, new in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, new)


def test_models_whose_call_is_a_function_of_tensorflow(images):
    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="traced")
            self.body = small()

        @tf.function
        def call(self, x):
            return tf.reduce_mean(self.body(x), (1, 2))

    model = Model()
    model(images)
    with pytest.raises(ValueError, match=r"`call` of model 'traced' is a `tf.function`"):
        visualize.gate_statistics(model, images)
    with pytest.raises(ValueError, match=r"`call` of model 'traced' is a `tf.function`"):
        visualize.sampling_points(model, images[0], "das_p2", (3, 3))


def test_a_call_that_the_user_has_replaced_stays(images):
    model = small()
    gate = model.get_layer("das_p2")
    gate.call = lambda x: 0 * x
    visualize.gate_statistics(model, images)
    assert np.abs(model(images)).max() == 0
    del gate.call
    visualize.gate_statistics(model, images)
    assert "call" not in vars(gate)
    assert np.abs(model(images)).max() > 0


def test_threads(images):
    """Calls in several threads do not see each other's."""
    model = small()
    expected = visualize.gate_statistics(model, images)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: visualize.gate_statistics(model, images), range(12))
    assert list(found) == [expected] * 12


def test_arguments_of_figures(tmp_path, images):
    model = small()
    gate = model.get_layer("das_p2")
    for layers in ("das_p2", gate, [gate]):
        assert len(visualize.plot_gates(model, images, layers).axes) == 5  # with a color bar
        assert visualize.stacked_sampling_points(model, images[0], layers, (3, 3)).points.shape == (1, 1, 2)
    for layers in ([], ["das_p2", "das_p2"]):
        with pytest.raises(ValueError, match="`layers` must be a layer or name, or a sequence of different"):
            visualize.plot_gates(model, images, layers)
    visualize.plot_gates(model, images, pictures=[images[0].tolist(), tf.constant(images[1])])
    classifier = keras.Model(model.input, head(model.output))
    with pytest.raises(ValueError, match="`class_index` must be an integer from 0 to 1"):
        visualize.grad_cam(classifier, images[0], "das_p2", 1.0)
    with pytest.raises(ValueError, match="`models` must be a dict"):
        visualize.plot_grad_cam([("a", (classifier, "das_p2"))], images[0])
    (tmp_path / "text.csv").write_text("epoch,loss\nfirst,2\n")
    with pytest.raises(ValueError, match=r"numbers in the column 'epoch'.*text\.csv"):
        visualize.plot_history({"a": tmp_path / "text.csv"})


def test_freezing_by_something_else_than_a_flag():
    with pytest.raises(ValueError, match=r"`freeze` must be True or False. Received: freeze='no'"):
        keras_das.freeze_trunk(keras_das.attach_das(plain_cnn(), **SMALL_GATE), "no")

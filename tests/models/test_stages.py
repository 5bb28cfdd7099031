"""Tests of the stages that `attach_das` detects in models without named stages."""

import functools

import keras
import pytest

from keras_das._keras_internals import node_of
from keras_das.models.stages import find_stages
from tests.models.backbones import plain_cnn

# These names do not depend on the models built before, unlike automatic names such as "add_17".
APPLICATIONS = {
    "ResNet50": "conv2_block3_out conv3_block4_out conv4_block6_out conv5_block3_out",
    "ResNet50V2": "conv2_block2_out conv3_block3_out conv4_block5_out post_relu",
    "MobileNet": "conv_pw_3_relu conv_pw_5_relu conv_pw_11_relu conv_pw_13_relu",
    "MobileNetV2": "block_3_expand_relu block_6_expand_relu block_13_expand_relu out_relu",
    "EfficientNetB0": "block3a_expand_activation block4a_expand_activation block6a_expand_activation "
    "top_activation",
    "EfficientNetV2B0": "block2b_add block4a_expand_activation block6a_expand_activation top_activation",
    "VGG16": "block3_conv3 block4_conv3 block5_conv3 block5_pool",
    "DenseNet121": "pool2_relu pool3_relu pool4_relu relu",
}


def stages_of(application):
    return dict(zip(["P2", "P3", "P4", "P5"], APPLICATIONS[application].split(), strict=True))


def names(stages):
    return {level: node_of(tensor).operation.name for level, tensor in stages.items()}


# Inverted residual blocks, activations before the sums, and no sums.
QUICK = ("MobileNetV2", "ResNet50V2", "VGG16")


@pytest.mark.parametrize(
    "application",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in APPLICATIONS],
)
def test_applications_of_any_size(application):
    model = getattr(keras.applications, application)(weights=None, include_top=False)
    assert names(find_stages(model)) == stages_of(application)


@pytest.mark.slow
@pytest.mark.parametrize("application", ["MobileNetV2", "EfficientNetB0"])
def test_applications_with_their_heads(application):
    model = getattr(keras.applications, application)(weights=None)
    assert names(find_stages(model)) == stages_of(application)


@pytest.mark.slow
def test_shapes_of_stages_whose_names_are_automatic():
    """Covers squeeze-and-excitation, whose 1x1 map is not a level, and ConvNeXt's stem, a nested model."""
    for model, channels in [
        (keras.applications.MobileNetV3Large(weights=None), [72, 240, 672, 960]),
        (keras.applications.ConvNeXtTiny(weights=None), [96, 192, 384, 768]),
        (keras.applications.InceptionV3(weights=None, include_top=False), [192, 288, 768, 2048]),
    ]:
        assert [tensor.shape[-1] for tensor in find_stages(model).values()] == channels


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("size", [32, None])
def test_plain(data_format, size):
    assert names(find_stages(plain_cnn(data_format, size))) == {"P2": "relu_0", "P3": "relu_1"}


def test_a_product_does_not_end_a_stage():
    """Covers the product of squeeze-and-excitation after the last residual sum."""
    convolution = functools.partial(keras.layers.Conv2D, 4, 3, padding="same")
    image = keras.Input((64, 64, 3))
    x = convolution(strides=4)(image)
    x = keras.layers.Add(name="sum")([x, convolution()(x)])
    scale = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = convolution(strides=2, name="deeper")(keras.layers.Multiply()([x, scale]))
    assert names(find_stages(keras.Model(image, x))) == {"P2": "sum", "P3": "deeper"}


def test_several_outputs_and_a_second_input():
    """Covers stage ends that are outputs, and a branch from another input that joins after them."""
    image, age = keras.Input((64, 64, 3)), keras.Input((4,))
    p2 = keras.layers.Conv2D(4, 3, strides=4, padding="same", name="p2")(image)
    p3 = keras.layers.Conv2D(4, 3, strides=2, padding="same", name="p3")(p2)
    bias = keras.layers.Reshape((1, 1, 4))(keras.layers.Dense(4)(age))
    joined = keras.layers.Add(name="joined")([p3, bias])
    model = keras.Model([image, age], [p2, joined, keras.layers.GlobalAveragePooling2D()(joined)])
    assert names(find_stages(model)) == {"P2": "p2", "P3": "joined"}


def test_no_level():
    image = keras.Input((32, 32, 3))
    with pytest.raises(ValueError, match="no feature map of 1/4 to 1/32"):
        find_stages(keras.Model(image, keras.layers.Conv2D(2, 3)(image)))


def test_no_image():
    vector = keras.Input((32,))
    with pytest.raises(ValueError, match="exactly one image input"):
        find_stages(keras.Model(vector, keras.layers.Dense(2)(vector)))


def test_two_images():
    left, right = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    with pytest.raises(ValueError, match="exactly one image input"):
        find_stages(keras.Model([left, right], keras.layers.Add()([left, right])))


def test_every_layer_bypassed():
    """With two branches from the image on, no layer depends on all of the stage."""
    image = keras.Input((32, 32, 3))
    branches = [keras.layers.Conv2D(2, 3, strides=4)(image) for _ in range(2)]
    pooled = [keras.layers.GlobalAveragePooling2D()(x) for x in branches]
    with pytest.raises(ValueError, match=r"No single layer .* ends its level P2"):
        find_stages(keras.Model(image, keras.layers.Concatenate()(pooled)))


def test_stages_inside_a_nested_model():
    image = keras.Input((32, 32, 3))
    nested = keras.Sequential(
        [keras.Input((32, 32, 3)), *[keras.layers.Conv2D(2, 3, 2, padding="same") for _ in range(4)]],
        name="encoder",
    )
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(nested(image)))
    with pytest.raises(ValueError, match=r"inside the nested model 'encoder'.*get_layer\('encoder'\)"):
        find_stages(model)


def sequence(size, *preprocessing, nested=False):
    """Preprocessing followed by five convolutions with stride 2."""
    convolutions = [keras.layers.Conv2D(2, 3, 2, padding="same", name=f"conv_{i}") for i in range(1, 6)]
    image = keras.Input((size, size, 3))
    if nested:
        preprocessing = [keras.Sequential([keras.Input((size, size, 3)), *preprocessing])]
    x = image
    for layer in [*preprocessing, *convolutions]:
        x = layer(x)
    return keras.Model(image, x, name="sequence")


def space_to_depth(x):
    _, rows, columns, channels = x.shape
    x = keras.ops.reshape(x, (-1, rows // 2, 2, columns // 2, 2, channels))
    x = keras.ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return keras.ops.reshape(x, (-1, rows // 2, columns // 2, 4 * channels))


PREPROCESSING = {
    "resizing": (None, lambda: [keras.layers.Resizing(64, 64), keras.layers.Rescaling(1 / 255)]),
    "resizing up": (16, lambda: [keras.layers.Resizing(64, 64)]),
    "center crop": (300, lambda: [keras.layers.CenterCrop(64, 64)]),
    "random crop": (256, lambda: [keras.layers.RandomCrop(64, 64), keras.layers.RandomFlip()]),
    "average pooling": (256, lambda: [keras.layers.AveragePooling2D(4)]),
    "space to depth": (128, lambda: [space_to_depth]),
    "statistics": (
        None,
        lambda: [keras.layers.Resizing(64, 64), keras.layers.Normalization(mean=1, variance=1)],
    ),
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_levels_are_counted_from_what_the_network_sees(name):
    size, layers = PREPROCESSING[name]
    expected = {f"P{level}": f"conv_{level}" for level in (2, 3, 4, 5)}
    assert names(find_stages(sequence(size, *layers()))) == expected
    if name != "space to depth":
        assert names(find_stages(sequence(size, *layers(), nested=True))) == expected


def test_padding_belongs_to_the_first_convolution():
    """Padding 64 pixels to 128 and halving them returns to the image size, which is level 0."""
    model = sequence(64, keras.layers.Rescaling(1 / 255), keras.layers.ZeroPadding2D(32))
    assert names(find_stages(model)) == {"P2": "conv_3", "P3": "conv_4", "P4": "conv_5"}


def test_adapted_statistics_are_no_network(rng):
    layer = keras.layers.Normalization()
    layer.adapt(rng.normal(size=(2, 8, 8, 3)))
    found = names(find_stages(sequence(None, keras.layers.Resizing(64, 64), layer)))
    assert found == {f"P{level}": f"conv_{level}" for level in (2, 3, 4, 5)}


def test_two_scales_of_one_image():
    """Pooling in one branch is not preprocessing, since the other branch uses the original image."""
    image = keras.Input((64, 64, 3))
    fine = keras.layers.Conv2D(2, 3, 4, padding="same", name="fine")(image)
    coarse = keras.layers.Conv2D(2, 3, padding="same", name="coarse")(keras.layers.AveragePooling2D(4)(image))
    x = keras.layers.Add(name="both")([fine, coarse])
    assert names(find_stages(keras.Model(image, x))) == {"P2": "both"}


def test_stages_that_are_left_out_are_said():
    model = sequence(256)
    x = model.output
    for i in range(2):
        x = keras.layers.Conv2D(2, 3, 2, padding="same", name=f"deep_{i}")(x)
    with pytest.warns(UserWarning, match="smaller than 1/32 of the image, from layer 'deep_0' on"):
        assert list(find_stages(keras.Model(model.input, x))) == ["P2", "P3", "P4", "P5"]


def test_pooled_branches_are_not_left_out():
    """A pyramid of pooled maps that are upsampled again, as in PSPNet, belongs to its stage."""
    model = sequence(256)
    pooled = keras.layers.Conv2D(2, 1)(keras.layers.AveragePooling2D(4)(model.output))
    x = keras.layers.Concatenate()([model.output, keras.layers.UpSampling2D(4)(pooled)])
    assert list(find_stages(keras.Model(model.input, x))) == ["P2", "P3", "P4", "P5"]

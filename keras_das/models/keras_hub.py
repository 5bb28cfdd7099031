"""KerasHub backbones with gates. Imported only where KerasHub is in use."""

from collections.abc import Mapping
from typing import Any

import keras
import keras_hub

from keras_das.models.graph import Tensor, deserialize_network, serialize_network, serialize_policy


def taps(model: keras.Model) -> dict[str, Tensor]:
    """The feature pyramid's levels, which KerasHub keeps as tensors."""
    return dict(getattr(model, "pyramid_outputs", {}))


def backbone_from(network: keras.Model, base: keras.Model) -> "DASHubBackbone":
    """The gated network as a backbone that otherwise resembles `base`."""
    data_format = getattr(base, "data_format", None)
    return DASHubBackbone(network, data_format=data_format, dtype=base.dtype_policy, name=base.name)


@keras.saving.register_keras_serializable("keras_das")
class DASHubBackbone(keras_hub.models.FeaturePyramidBackbone):
    """A KerasHub backbone with gates, as `keras_das.attach_das` makes it.

    It saves the graph of its layers, so that it loads with its gates and without the class that it was made
    from. Like all KerasHub backbones it is loaded from presets in the precision and for the image shape that
    `from_preset(preset, dtype=..., image_shape=...)` asks for.

    Args:
        network: Functional model with the outputs `{"output": ..., "taps": {level: ...}}`. The backbone is
            made of its layers.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras' default.
        dtype: Precision, for the heads built on the backbone; the layers have theirs already.
        **kwargs: `name`, `trainable`.
    """

    def __init__(
        self, network: keras.Model, data_format: str | None = None, dtype: Any = None, **kwargs: Any
    ):
        """Makes a backbone of the network's layers."""
        outputs = network.output
        super().__init__(inputs=network.input, outputs=outputs["output"], dtype=dtype, **kwargs)
        self.pyramid_outputs = dict(outputs["taps"])
        self.image_shape = tuple(self.inputs[0].shape[1:])
        self.data_format = data_format or keras.config.image_data_format()

    def get_config(self) -> dict[str, Any]:
        """The graph of the layers, and what to rebuild it for."""
        # Not KerasHub's configuration: it holds a map of the quantized layers' precisions, which `network`
        # has already, and writing the map changes the policies of these layers.
        dtype = serialize_policy(self.dtype_policy)
        return {
            "name": self.name,
            "trainable": self.trainable,
            "network": serialize_network(self, self.pyramid_outputs),
            "dtype": dtype,
            "network_dtype": dtype,
            "image_shape": self.image_shape,
            "data_format": self.data_format,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DASHubBackbone":
        """Rebuilds a backbone, for another precision or image shape if `dtype` or `image_shape` differ."""
        config = dict(config)
        saved = keras.dtype_policies.get(config.pop("network_dtype"))
        dtype = keras.dtype_policies.get(config.pop("dtype", None))  # `None`: Keras' current policy
        network = deserialize_network(config.pop("network"), config.pop("image_shape"), (saved, dtype))
        return cls(network, dtype=dtype, **config)


class _AnyImageClassifier(type(keras_hub.models.ImageClassifier)):  # type: ignore[misc]
    """Counts every image classifier as a subclass of a class.

    KerasHub reads a preset of a task only if its class is a subclass of the one that goes with the backbone.
    A preset of a gated backbone is of whatever image classifier was built on it.
    """

    def __subclasscheck__(cls, subclass: type) -> bool:
        return keras_hub.models.ImageClassifier in subclass.__mro__


@keras.saving.register_keras_serializable("keras_das")
class DASImageClassifier(keras_hub.models.ImageClassifier, metaclass=_AnyImageClassifier):
    """KerasHub's `ImageClassifier` for gated backbones.

    It lets `keras_hub.models.ImageClassifier.from_preset(folder)` find a classifier for a folder that holds
    a gated backbone, or a classifier with its head on one.
    """

    backbone_cls = DASHubBackbone

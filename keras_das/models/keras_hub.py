"""KerasHub backbones with gates. Imported only if KerasHub is used."""

from collections.abc import Mapping
from typing import Any

import keras
import keras_hub

from keras_das._keras_internals import Tensor
from keras_das.models.serialization import deserialize_network, serialize_network, serialize_policy


def taps(model: keras.Model) -> dict[str, Tensor]:
    """Returns the levels of the feature pyramid, which KerasHub stores as tensors."""
    return dict(getattr(model, "pyramid_outputs", {}))


def backbone_from(network: keras.Model, base: keras.Model) -> "DASHubBackbone":
    """Returns the gated network as a backbone with the settings of `base`."""
    data_format = getattr(base, "data_format", None)
    return DASHubBackbone(network, data_format=data_format, dtype=base.dtype_policy, name=base.name)


@keras.saving.register_keras_serializable("keras_das")
class DASHubBackbone(keras_hub.models.FeaturePyramidBackbone):
    """A KerasHub backbone with gates, created by `keras_das.attach_das`.

    Its configuration contains the graph of its layers, so it loads with its gates and without the original
    class. As for all KerasHub backbones, `from_preset(preset, dtype=..., image_shape=...)` selects the
    precision and the image shape.

    Args:
        network: Functional model with the outputs `{"output": ..., "taps": {level: ...}}`, whose layers form
            the backbone.
        data_format: String. `"channels_last"` or `"channels_first"`. Defaults to `None`, which selects
            `keras.config.image_data_format()`.
        dtype: String or `keras.DTypePolicy`. The policy for heads on the backbone; its layers have their own.
            Defaults to `None`, which selects `keras.config.dtype_policy()`.
        **kwargs: Arguments of every Keras model: `name`, `trainable`.
    """

    def __init__(
        self, network: keras.Model, data_format: str | None = None, dtype: Any = None, **kwargs: Any
    ):
        """Creates a backbone from the layers of the network."""
        outputs = network.output
        super().__init__(inputs=network.input, outputs=outputs["output"], dtype=dtype, **kwargs)
        self.pyramid_outputs = dict(outputs["taps"])
        self.image_shape = tuple(self.inputs[0].shape[1:])
        self.data_format = data_format or keras.config.image_data_format()

    def get_config(self) -> dict[str, Any]:
        """Returns the graph of the layers, and the settings to rebuild it with."""
        # KerasHub's configuration is not used. It includes a map of the policies of quantized layers, which
        # `network` contains already, and serializing the map changes these policies.
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
        """Rebuilds a backbone, with another precision or image shape if `dtype` or `image_shape` differs."""
        config = dict(config)
        saved = keras.dtype_policies.get(config.pop("network_dtype"))
        dtype = keras.dtype_policies.get(config.pop("dtype", None))  # `None` selects Keras' current policy
        network = deserialize_network(config.pop("network"), config.pop("image_shape"), (saved, dtype))
        return cls(network, dtype=dtype, **config)


class _AnyImageClassifier(type(keras_hub.models.ImageClassifier)):  # type: ignore[misc]
    """Metaclass of a class that counts every image classifier as its subclass.

    KerasHub loads the preset of a task only if the class of the task is a subclass of the one registered for
    the backbone. The preset of a gated backbone can be of any image classifier.
    """

    def __subclasscheck__(cls, subclass: type) -> bool:
        return keras_hub.models.ImageClassifier in subclass.__mro__


@keras.saving.register_keras_serializable("keras_das")
class DASImageClassifier(keras_hub.models.ImageClassifier, metaclass=_AnyImageClassifier):
    """KerasHub's `ImageClassifier` for gated backbones.

    With this class, `keras_hub.models.ImageClassifier.from_preset(folder)` finds a classifier for a folder
    that contains a gated backbone, or a classifier with such a backbone.
    """

    backbone_cls = DASHubBackbone

"""KerasCV backbones with gates. Imported only if KerasCV is used."""

from collections.abc import Mapping
from typing import Any

import keras
import keras_cv

from keras_das._keras_internals import Tensor, node_of
from keras_das.models.serialization import deserialize_network, serialize_network


def taps(model: keras.Model) -> dict[str, Tensor]:
    """Returns the levels of the feature pyramid, which KerasCV stores as layer names."""
    levels = getattr(model, "pyramid_level_inputs", {})
    return {level: model.get_layer(name).output for level, name in levels.items()}


def backbone_from(network: keras.Model, base: keras.Model) -> "DASCVBackbone":
    """Returns the gated network as a backbone."""
    return DASCVBackbone(network, name=base.name)


@keras.saving.register_keras_serializable("keras_das")
class DASCVBackbone(keras_cv.models.Backbone):
    """A KerasCV backbone with gates, created by `keras_das.attach_das`.

    Its configuration contains the graph of its layers, so it loads with its gates and without the original
    class. Layers that cannot be deserialized, such as the lambdas in KerasCV's `CSPDarkNetBackbone`, cannot
    be loaded here either. `from_preset(preset, input_shape=...)` loads the backbone for another image shape.

    Args:
        network: Functional model with the outputs `{"output": ..., "taps": {level: ...}}`, whose layers form
            the backbone.
        **kwargs: Arguments of every Keras model: `name`, `trainable`.
    """

    def __init__(self, network: keras.Model, **kwargs: Any):
        """Creates a backbone from the layers of the network."""
        outputs = network.output
        super().__init__(inputs=network.input, outputs=outputs["output"], **kwargs)
        self.pyramid_level_inputs = {
            level: node_of(tensor).operation.name for level, tensor in outputs["taps"].items()
        }

    def get_config(self) -> dict[str, Any]:
        """Returns the graph of the layers, and the settings to rebuild it with."""
        return {
            **super().get_config(),
            "network": serialize_network(self, taps(self)),
            "input_shape": self.input_shape[1:],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DASCVBackbone":
        """Rebuilds a backbone, for another image shape if `input_shape` differs."""
        config = dict(config)
        network = deserialize_network(config.pop("network"), config.pop("input_shape"))
        return cls(network, **config)

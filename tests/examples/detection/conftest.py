"""Settings for the tests of detection."""

import pytest
import tensorflow as tf


@pytest.fixture(autouse=True, scope="module")
def _without_grappler():
    """Disables TensorFlow's graph optimizer, whose work takes longer than these short trainings."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})

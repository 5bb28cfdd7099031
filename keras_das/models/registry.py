"""Lazy entries in Keras' registry, for classes whose library is imported only to load a saved model."""

import importlib
from typing import Any

import keras


def register_lazily(module: str, name: str, library: str) -> None:
    """Registers the class `name` of `module` for saved models before `module` has been imported.

    Args:
        module: String. Full name of the module, which registers the class under the package `"keras_das"`.
        name: String. Name of the class.
        library: String. Name of the package that `module` requires, as for pip.
    """
    # `setdefault` keeps the class if its module has been imported already.
    keras.saving.get_custom_objects().setdefault(f"keras_das>{name}", _LazyClass(module, name, library))


class _LazyClass:
    """Placeholder for a class in Keras' registry, which imports the class when it is first used.

    Importing the module replaces the placeholder in the registry. Earlier references to the placeholder stay
    valid: they support attributes, `issubclass` (which reads `__bases__`) and comparison with the class.
    """

    def __init__(self, module: str, name: str, library: str):
        self.__module__ = module
        self.__name__ = name
        self._library = library

    def _load(self) -> type:
        try:
            module = importlib.import_module(self.__module__)
        except ImportError as error:
            raise ImportError(
                f"The saved model contains a `{self.__module__}.{self.__name__}`, which requires "
                f"{self._library}: pip install {self._library}"
            ) from error
        return getattr(module, self.__name__)

    @property
    def __bases__(self) -> tuple[type]:
        return (self._load(),)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # `copy` and others look these up, which need not import a library
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def __eq__(self, other: object) -> bool:
        # Registry lookups compare with any object; only classes can be equal.
        return self is other or (isinstance(other, type) and other is self._load())

    def __hash__(self) -> int:
        return hash((self.__module__, self.__name__))

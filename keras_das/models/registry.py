"""Names in Keras' registry for classes whose library is imported only when a saved model asks for them."""

import importlib
from typing import Any

import keras


def register_lazily(module: str, name: str, library: str) -> None:
    """Lets Keras find the class `name` of `module` in saved models before `module` has been imported.

    Args:
        module: Full name of the module, which registers the class under the package `"keras_das"`.
        name: The class's name.
        library: The package that `module` needs, as pip knows it.
    """
    # `setdefault`: once the module has been imported, the class itself is registered.
    keras.saving.get_custom_objects().setdefault(f"keras_das>{name}", _LazyClass(module, name, library))


class _LazyClass:
    """Stands for a class in Keras' registry, and imports it at the first use.

    The class replaces its stand-in there when its module is imported. Whoever got the stand-in before can
    still read its attributes, ask `issubclass` about it (which reads `__bases__`), and compare it with the
    class.
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
                f"The saved model holds a `{self.__module__}.{self.__name__}`, which needs {self._library}: "
                f"pip install {self._library}"
            ) from error
        return getattr(module, self.__name__)

    @property
    def __bases__(self) -> tuple[type]:
        return (self._load(),)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # `copy` and the like ask for these: no reason to import a library
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def __eq__(self, other: object) -> bool:
        # A look into the registry compares with anything; only a class can be the one meant.
        return self is other or (isinstance(other, type) and other is self._load())

    def __hash__(self) -> int:
        return hash((self.__module__, self.__name__))

"""Command lines from a dataclass: each field is an argument with the field's default."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from examples.common import UserError

MINIMA = {"image_size": 8, "epochs": 1, "batch_size": 1, "seed": 0, "learning_rate": 1e-12}
"""The smallest values of numeric arguments."""


@dataclasses.dataclass(frozen=True)
class Interface:
    """The description of a command line."""

    program: str
    description: str
    config: Any
    """The dataclass. Its field `das`, a dictionary, is set by the repeatable `--das KEY=VALUE`."""
    help: Mapping[str, str]
    choices: Mapping[str, Collection[str]]
    recipes: Mapping[str, Mapping[str, Any]]

    def parse(self, arguments: list[str] | None = None) -> tuple[Any, bool]:
        """Returns the configuration, including recipe and defaults, and whether `--debug` is set."""
        parser = argparse.ArgumentParser(self.program, description=self.description)
        parser.add_argument(
            "--recipe",
            choices=sorted(self.recipes),
            help="use common settings for a data set of the paper as defaults",
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.add_argument(
            "--das",
            metavar="KEY=VALUE",
            action="append",
            type=_key_value,
            default=[],
            help="argument of DASLayer, repeatable: --das reduction=0.1",
        )
        for field in dataclasses.fields(self.config):
            if field.name != "das":
                self._add_argument(parser, field)
        given = vars(parser.parse_args(arguments))
        recipe, debug, das = given.pop("recipe"), given.pop("debug"), dict(given.pop("das"))
        defaults = dict(self.recipes.get(recipe, {}))
        return self.config(**{**defaults, **given, "das": {**defaults.get("das", {}), **das}}), debug

    def _add_argument(self, parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        # No argparse default, so that arguments that are not given do not override the recipe.
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": self.help.get(field.name, "")}
        default = field.default
        if default not in (None, False):
            options["help"] += f" (default: {default})"
        if isinstance(default, bool):
            options["action"] = "store_true"
        elif field.name in self.choices:
            options["choices"] = self.choices[field.name]
        else:
            options["type"] = type(default) if default is not None else str
        parser.add_argument(flag(field.name), **options)

    def check(self, config: Any) -> None:
        """Reject values that argparse would reject, for configurations created in Python."""
        for name, choices in self.choices.items():
            if getattr(config, name) not in choices:
                raise UserError(
                    f"{flag(name)} must be one of {', '.join(choices)}, not {getattr(config, name)!r}"
                )
        for name, low in MINIMA.items():
            if getattr(config, name) < low:
                raise UserError(f"{flag(name)} must be at least {low}, not {getattr(config, name)}")
        if config.export:
            _check_export(Path(config.export))


def _check_export(path: Path) -> None:
    """Reject paths before training that `keras_das.export` would reject after it."""
    if path.suffix in (".onnx", ".tflite"):
        raise UserError(f"--export: {path} must be the path of a folder, because a SavedModel is written")
    free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    if not free and not (path / "saved_model.pb").is_file():
        raise UserError(f"--export: {path} exists and is not a SavedModel")


def flag(name: str) -> str:
    """The argument for a field."""
    return "--" + name.replace("_", "-")


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    for parse in (json.loads, ast.literal_eval):
        try:
            return key, parse(value)
        except (ValueError, SyntaxError):  # not a value of JSON or Python
            continue
    return key, value

"""Show in a browser where the gates of a trained model sample.

    python examples/explore.py runs/demo/model.keras
    python examples/explore.py runs/demo/model.keras --compare runs/demo-none/model.keras
    python examples/explore.py --help

Select or upload a picture and click a point. The page shows where each gate samples for that point and how
much of the feature map it keeps. All numbers and drawings come from `keras_das.visualize`. Models receive
pixels of 0..255, as those of `classify.py` do.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

if not __package__:  # run as a script: make `examples` and an uninstalled keras_das importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    import examples

    examples.require("explore", "matplotlib", "PIL")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from examples import common, options
from examples.common import UserError
from examples.exploring import pictures, views


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("explore", description="Show where the gates of a model sample.")
    add = parser.add_argument
    add("model", metavar="MODEL.keras", help="a model with gates, for example from classify.py")
    add("--compare", metavar="OTHER.keras", help="a second model, with or without gates")
    add("--images", metavar="FOLDER", help="pictures to choose from (default: test data of MODEL)")
    add(
        "--labels",
        metavar="A,B,...",
        help="names of the classes (default: from results.json next to a model)",
    )
    add(
        "--image-size",
        type=int,
        default=views.OPEN_SIZE,
        help="for models of any image size (default: %(default)s)",
    )
    add("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    add("--port", type=int, default=7860, help="0: any free port (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(arguments)


def explore(given: argparse.Namespace) -> None:
    """Load the models and serve the page."""
    page = _import_page()
    if given.image_size < options.MINIMA["image_size"]:
        raise UserError(
            f"--image-size must be at least {options.MINIMA['image_size']}, not {given.image_size}"
        )
    labels = given.labels.split(",") if given.labels else None
    shown = views.load_views(given.model, given.compare, labels, given.image_size)
    if given.images:
        offered = pictures.read_folder(given.images)
    else:
        offered = pictures.training_pictures(Path(given.model), max(shown[0].shape[:2]))
    with page.listen(given.host, given.port) as server, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads are deleted when the page ends
        page.serve(page.build_page(shown, offered), server)


def _import_page() -> ModuleType:
    try:
        from examples.exploring import page
    except ImportError as error:
        raise UserError(
            f"pip install 'keras-das[explore]' installs the page's requirements: {error}"
        ) from error
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = parse_arguments(arguments)
    return common.run("explore", lambda: explore(given), given.debug)


if __name__ == "__main__":
    sys.exit(main())

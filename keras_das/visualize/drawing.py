"""Parts of the figures: an image, a feature map over it, and sampling points."""

from typing import Any

import keras
import numpy as np

from keras_das._requirements import import_extra
from keras_das.visualize.fields import Axis, Field
from keras_das.visualize.lookup import image_format, image_size
from keras_das.visualize.sampling import SamplingPoints

_DPI = 120


def new_figure(width: float, height: float) -> Any:
    """Creates an empty figure, with its size in inches, that is not shown in a window."""
    return import_extra("matplotlib.figure", "viz").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained"
    )


def to_pixels(figure: Any) -> np.ndarray:
    """Returns the figure as uint8 `(h, w, 4)`."""
    canvas = import_extra("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def standardize_picture(model: keras.Model, pixels: np.ndarray, picture: np.ndarray | None) -> np.ndarray:
    """Returns the picture to draw for an image: float32 in 0..1, `(H, W)` or `(H, W, 3)`."""
    size = image_size(pixels.shape, image_format(model))
    if picture is None:
        pixels = pixels if image_format(model) == "channels_last" else np.moveaxis(pixels, 0, -1)
        picture = pixels if pixels.shape[2] == 3 else pixels.mean(axis=2)
    picture = np.asarray(picture)
    if picture.shape not in (size, (*size, 3)):
        raise ValueError(
            f"`picture` must have the shape {size} or {(*size, 3)}. Received: picture.shape={picture.shape}"
        )
    values = picture.astype("float32")
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255:
        is_bytes = high > 1 or np.issubdtype(picture.dtype, np.integer)
        return values / 255 if is_bytes else values
    return (values - low) / ((high - low) or 1)


def show_picture(axes: Any, picture: np.ndarray, gray: bool = False) -> None:
    """Draws an image without ticks."""
    if gray and picture.ndim == 3:
        picture = picture.mean(axis=2)
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def show_map(axes: Any, values: np.ndarray, field: Field, **style: Any) -> Any:
    """Draws a feature map over the picture, interpolated between pixel centers and constant beyond them."""
    columns, rows = (round(max(ends) + 0.5) for ends in (axes.get_xlim(), axes.get_ylim()))
    spread = _interpolate(_interpolate(values, field[0], rows).T, field[1], columns).T
    return axes.imshow(spread, alpha=0.65, **style)


def _interpolate(values: np.ndarray, axis: Axis, size: int) -> np.ndarray:
    """Interpolates `(axis.size, n)` values at each of `size` pixels of the image, along the first axis."""
    middles = axis.locate(np.arange(axis.size))
    return np.stack([np.interp(np.arange(size), middles, line) for line in values.T], axis=-1)


def scatter_colored(axes: Any, found: SamplingPoints) -> Any:
    """Draws the points, colored by their masks."""
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = np.moveaxis(found.points.reshape(-1, 2), -1, 0)  # drawn as x, y
    inside, mask = found.inside.ravel(), found.mask.ravel()
    axes.scatter(x[~inside], y[~inside], s=25, c="lightgray", marker="x")
    drawn = axes.scatter(
        x[inside], y[inside], s=40, c=mask[inside], cmap="viridis", vmin=0, vmax=1, edgecolors="white"
    )
    axes.plot(found.center[1], found.center[0], "r+", markersize=12, markeredgewidth=2)
    axes.set(xlim=limits[0], ylim=limits[1])
    return drawn


def scatter_sized(axes: Any, found: SamplingPoints) -> None:
    """Draws the points, sized by their masks."""
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = np.moveaxis(found.points[found.inside], -1, 0)
    axes.scatter(x, y, s=40 * found.mask[found.inside], c="white", edgecolors="red", linewidths=0.8)
    axes.set(xlim=limits[0], ylim=limits[1])

"""The tf.data batches of detection: square images, and boxes that are transformed with them.

They do not use Keras' preprocessing layers. In Keras 3.15.1, RandomCrop swaps x and y when it shifts boxes,
all layers turn padding rows into boxes, and none drops boxes of which little remains. RandomZoom also
resamples images that have already been resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from examples.data import pipeline
from examples.detection import splits
from examples.detection.splits import Split, Truth

ZOOM = (0.75, 4 / 3)
"""The range of the scale factor of augmentation, uniform on a logarithmic scale."""
MIN_KEPT = 1 / 3
"""A box cut by the border counts if this share of its area is inside."""
MIN_SIDE = 1.0
"""The smallest side of a box after augmentation, in pixels of the square."""


def resize_scale(truth_height: int, truth_width: int, image_size: int) -> float:
    """The factor from pixels of the original image to pixels of the square."""
    return image_size / max(truth_height, truth_width)


def training_batches(
    split: Split,
    image_size: int,
    batch_size: int,
    clock: pipeline.EpochClock,
    augment: bool,
) -> tf.data.Dataset:
    """Shuffled batches of one epoch, whose order and augmentation depend only on `clock.key`.

    Each image is scaled so that its longer side fills the square of `image_size`, and placed in the upper
    left corner. `augment` flips it, scales it further by `ZOOM`, and places or crops it at random. The rest
    of the square is 0. An incomplete last batch is dropped unless it is the only one.

    Args:
        split: The images.
        image_size: The side of the square, in pixels.
        batch_size: The number of images per batch.
        clock: Provides the seed and the epoch.
        augment: Whether to augment.

    Returns:
        Pairs of images, float32 `(N, image_size, image_size, 3)` of 0..255, and `{"boxes": ..., "classes":
        ...}`, float32 `(N, M, 4)` and `(N, M)`: `(x1, y1, x2, y2)` in pixels of the square, and labels. M is
        the largest number of boxes in an image, or 1. Both are -1 in the padding rows of images with fewer.
    """
    chosen = _without_crowds(split.truths)
    slots = max(1, *(len(indices) for indices in chosen))
    boxes, labels, starts, scales = _as_tensors(split.truths, chosen, image_size)

    def read(position: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        image, scale = split.image(index), scales[index]
        own = slice(starts[index], starts[index + 1])
        if augment:
            seed = tf.stack([pipeline.mix(clock.key), position])
            image, moved, keep = _augment(image, boxes[own], scale, image_size, seed)
            targets = tf.boolean_mask(moved, keep), tf.boolean_mask(labels[own], keep)
        else:
            image = _place(image, scale, tf.zeros(2), image_size)
            targets = boxes[own] * scale, labels[own]
        return image, {"boxes": _fill_up(targets[0], slots), "classes": _fill_up(targets[1], slots)}

    count = len(split.truths)
    images = pipeline.indices(count, clock.key).enumerate().map(read, num_parallel_calls=tf.data.AUTOTUNE)
    batches = images.batch(batch_size, drop_remainder=count >= batch_size)
    return pipeline.counted(batches, count // batch_size or 1)


def evaluation_batches(split: Split, image_size: int, batch_size: int) -> tf.data.Dataset:
    """All images in order, scaled and placed as for training without augmentation.

    Returns:
        Pairs of images, float32 `(N, image_size, image_size, 3)` of 0..255, and their indices in
        `split.truths`, int64 `(N,)`. The last batch may be smaller.
    """
    scales = _scales(split.truths, image_size)

    def read(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return _place(split.image(index), scales[index], tf.zeros(2), image_size), index

    count = len(split.truths)
    images = pipeline.indices(count, None).map(read, num_parallel_calls=tf.data.AUTOTUNE)
    return pipeline.counted(images.batch(batch_size), math.ceil(count / batch_size))


def scored_batches(split: Split, image_size: int, batch_size: int) -> tf.data.Dataset:
    """`evaluation_batches` with the targets of `training_batches` instead of indices."""
    chosen = _without_crowds(split.truths)
    slots = max(1, *(len(indices) for indices in chosen))
    boxes = np.full((len(chosen), slots, 4), -1, "float32")
    labels = np.full((len(chosen), slots), -1, "float32")
    for number, (truth, indices) in enumerate(zip(split.truths, chosen, strict=True)):
        scale = resize_scale(truth.height, truth.width, image_size)
        boxes[number, : len(indices)] = truth.boxes[indices] * scale
        labels[number, : len(indices)] = truth.labels[indices]
    all_boxes, all_labels = splits.on_cpu(boxes), splits.on_cpu(labels)

    def with_targets(images: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        return images, {"boxes": tf.gather(all_boxes, index), "classes": tf.gather(all_labels, index)}

    return evaluation_batches(split, image_size, batch_size).map(with_targets)


# The boxes


def _without_crowds(truths: Sequence[Truth]) -> list[np.ndarray]:
    """The indices of the boxes of each image that are trained on."""
    return [np.flatnonzero(~truth.crowd) for truth in truths]


def _as_tensors(
    truths: Sequence[Truth], chosen: Sequence[np.ndarray], image_size: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """All boxes and labels, the index of the first box of each image, and the scales of the images."""
    boxes = [truth.boxes[indices] for truth, indices in zip(truths, chosen, strict=True)]
    labels = [truth.labels[indices] for truth, indices in zip(truths, chosen, strict=True)]
    starts = np.cumsum([0, *(len(indices) for indices in chosen)])
    return (
        splits.on_cpu(np.concatenate(boxes).astype("float32")),
        splits.on_cpu(np.concatenate(labels).astype("float32")),
        splits.on_cpu(starts),
        _scales(truths, image_size),
    )


def _scales(truths: Sequence[Truth], image_size: int) -> tf.Tensor:
    scales = [resize_scale(truth.height, truth.width, image_size) for truth in truths]
    return splits.on_cpu(np.array(scales, "float32"))


def _fill_up(rows: tf.Tensor, count: int) -> tf.Tensor:
    """Float32 `rows`, padded with -1 to `count` rows."""
    missing = [[0, count - tf.shape(rows)[0]]] + [[0, 0]] * (len(rows.shape) - 1)
    return tf.ensure_shape(tf.pad(rows, missing, constant_values=-1), (count, *rows.shape[1:]))


# The pixels


def _augment(
    image: tf.Tensor, boxes: tf.Tensor, scale: tf.Tensor, size: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The augmented square of an image for `seed`, its boxes, and which of them to keep."""
    flip, zoom, *place = tf.unstack(tf.random.stateless_uniform([4], seed))
    low, high = np.log(ZOOM)
    scale *= tf.exp(low + (high - low) * zoom)
    sides = tf.cast(tf.shape(image)[:2], tf.float32)  # height and width
    # Negative if the image is larger than the square, which crops it.
    shift = tf.stack(place) * (size - scale * sides)
    image, boxes = tf.cond(flip < 0.5, lambda: _mirror(image, boxes), lambda: (image, boxes))
    return _place(image, scale, shift, size), *_move(boxes, scale, shift, size)


def _move(boxes: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """`boxes` transformed like the pixels by `_place`, clipped to the square, and which of them to keep."""
    moved = boxes * scale + tf.stack([shift[1], shift[0]] * 2)
    cut = tf.clip_by_value(moved, 0, size)
    large = tf.reduce_all(cut[:, 2:] - cut[:, :2] >= MIN_SIDE, axis=1)
    return cut, large & (_area(cut) >= MIN_KEPT * _area(moved))


def _mirror(image: tf.Tensor, boxes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    x1, y1, x2, y2 = tf.unstack(boxes, axis=1)
    width = tf.cast(tf.shape(image)[1], tf.float32)
    return tf.reverse(image, [1]), tf.stack([width - x2, y1, width - x1, y2], 1)


def _area(boxes: tf.Tensor) -> tf.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _place(image: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor, size: int) -> tf.Tensor:
    """The square that shows image position `p` at `p * scale + shift`, and 0 elsewhere.

    `shift` is `(y, x)`.

    Uses antialiased bilinear interpolation. `tf.image.resize` would round the scaled size to whole pixels,
    and boxes would be off by up to half a pixel.
    """
    square = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=[size, size],
        scale=tf.stack([scale, scale]),
        translation=shift,
        kernel_type="triangle",
        antialias=True,
    )
    return tf.ensure_shape(square[0], (size, size, 3))

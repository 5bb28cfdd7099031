"""Tests of the explore page without a browser: images, visualizations, and the command line."""

import math
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from examples import explore
from examples.common import UserError
from examples.data import pipeline
from examples.exploring import page, pictures, views
from examples.exploring.views import MIDDLE, Place, View, clicked
from keras_das import visualize
from tests.examples import toys

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def gated():
    keras.utils.set_random_seed(0)
    return View(toys.toy(), "gated", NAMES)


@pytest.fixture(scope="module")
def plain():
    keras.utils.set_random_seed(0)
    return View(toys.toy((40, 40, 3), gates=0), "plain", NAMES)


@pytest.fixture
def picture():
    return toys.photograph()


# Clicks


def test_a_click_is_x_before_y_and_a_place_y_before_x():
    assert clicked([100, 30], (400, 300)) == Place(y=0.1, x=0.25)


def test_places_are_pixels_of_the_models_image():
    """Places range from one edge of the image to the other. The center of 24x96 is between two pixels."""
    view = View(toys.toy((24, 96, 3)), "wide")
    assert view.point(Place(0, 0)) == (-0.5, -0.5)
    assert view.point(Place(1, 1)) == (23.5, 95.5)
    assert view.point(MIDDLE) == (11.5, 47.5)
    scale = view.drawn_size[1] / 24
    assert view.drawn_size == (96 * scale, 24 * scale)
    # The center of the square drawn for row 5, column 70.
    assert view.point(clicked([70.5 * scale, 5.5 * scale], view.drawn_size)) == (5, 70)


def center_of_red(drawing):
    """The position of the red cross, (y, x) in pixels of the drawing."""
    red, green, blue = np.moveaxis(np.asarray(drawing.image).astype(int), -1, 0)
    return np.argwhere((red > 240) & (green < 30) & (blue < 30)).mean(axis=0) + 0.5


@pytest.mark.parametrize("shape", [(40, 72, 3), (72, 40, 1)])
def test_the_drawn_cross_is_where_it_was_clicked(shape, picture):
    view = View(toys.toy(shape), "view")
    place = clicked([view.drawn_size[0] * 0.7, view.drawn_size[1] * 0.2], view.drawn_size)
    drawing = view.points(Image.new("RGB", picture.size), 0, False, place)
    assert drawing.image.size == view.drawn_size
    image = np.zeros(shape, "float32")
    found = visualize.sampling_points(view.model, image, "das_1", view.point(place))
    assert np.abs(found.center - view.point(place)).max() <= 1  # half a stride
    np.testing.assert_allclose(center_of_red(drawing), (found.center + 0.5) * view.scale, atol=1)


def test_each_pixel_is_drawn_as_a_square(plain, picture):
    drawn = np.asarray(plain.plain(picture, Place(0, 0)).image)
    middles = drawn[plain.scale // 2 :: plain.scale, plain.scale // 2 :: plain.scale]
    # Excludes the ring at the corner.
    np.testing.assert_array_equal(middles[4:], plain.fit(picture)[4:])


# Preprocessing


def test_pictures_are_cut_in_the_middle(plain):
    """Cropping removes the outer thirds of a wide image. The filter mixes neighboring pixels at the edges."""
    thirds = [Image.new("RGB", (50, 50), color) for color in (toys.RED, toys.GREEN, toys.BLUE)]
    wide = Image.new("RGB", (150, 50))
    for number, third in enumerate(thirds):
        wide.paste(third, (50 * number, 0))
    for turned in (wide, wide.rotate(90, expand=True)):
        assert (plain.fit(turned)[2:-2, 2:-2] == toys.GREEN).all()


@pytest.mark.parametrize("size", [(90, 70), (30, 45), (200, 160)])
def test_pictures_are_what_training_makes_of_them(plain, size):
    picture = toys.photograph(*size)
    trained_on = pipeline.fit_square(np.asarray(picture), 40).numpy().astype(int)
    assert np.abs(plain.fit(picture) - trained_on).mean() < 2  # out of 255; the libraries' filters differ


def test_one_channel(picture):
    view = View(toys.toy((32, 32, 1), gates=1), "gray", NAMES)
    assert view.fit(picture).shape == (32, 32)
    assert sum(view.predict(picture).values()) == pytest.approx(1, abs=1e-5)
    assert view.gate(picture, 0).image.size == view.drawn_size


# Visualizations


def test_probabilities(gated, picture):
    expected = np.asarray(gated.model([gated.fit(picture)[None].astype("float32")]))[0]
    assert gated.predict(picture) == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)))


def test_scores_get_a_softmax(picture):
    view = View(toys.toy(classes=3, activation=None), "scores")
    scores = np.asarray(view.model([view.fit(picture)[None].astype("float32")]))[0]
    expected = np.exp(scores) / np.exp(scores).sum()
    names = ["class 0", "class 1", "class 2"]
    assert view.predict(picture) == pytest.approx(dict(zip(names, expected.tolist(), strict=True)), rel=1e-4)


def test_points(gated, picture):
    first, second = (gated.points(picture, number, False, MIDDLE) for number in (0, 1))
    found = visualize.sampling_points(
        gated.model, gated.fit(picture).astype("float32"), "das_2", gated.point(MIDDLE)
    )
    row, column = found.position
    count = int(found.inside.sum())
    assert second.caption == f"das_2: row {row}, column {column}: {count} of 9 points on the map"
    assert first.caption.startswith("das_1: ")
    assert not same(first, second)
    assert not same(second, gated.points(picture, 1, False, Place(0.2, 0.8)))


def test_points_beyond_the_picture(gated, picture):
    """At a corner, some points are off the map, and others are on the map but off the image."""
    found = visualize.sampling_points(
        gated.model, gated.fit(picture).astype("float32"), "das_2", gated.point(Place(0, 0))
    )
    beyond = int(((found.points[0] < -0.5) | (found.points[0] > 63.5)).any(axis=-1).sum())
    assert beyond >= 3
    caption = gated.points(picture, 1, False, Place(0, 0)).caption
    assert caption.endswith(f" of 9 points on the map, {beyond} beyond the picture's edge")


def test_stacked_points(gated, picture):
    stacked = gated.points(picture, 1, True, MIDDLE)
    assert stacked.caption.startswith("das_1, das_2: ")
    assert "of 81 points" in stacked.caption
    first = gated.points(picture, 0, True, MIDDLE)
    assert same(first, gated.points(picture, 0, False, MIDDLE))
    assert first.caption.endswith("; no gate comes before it")


def same(a, b):
    return np.array_equal(np.asarray(a.image), np.asarray(b.image))


def test_gates(gated, picture):
    drawing = gated.gate(picture, 1)
    values = visualize.gate_map(gated.model, gated.fit(picture).astype("float32"), "das_2")
    assert drawing.caption == f"das_2, 16x16: {values.mean():.2f} ± {values.std():.2f} of the map's magnitude"
    assert not same(drawing, gated.gate(picture, 0))
    assert not same(drawing, gated.gate(toys.photograph(seed=1), 1))


def test_a_model_of_fewer_gates_shows_its_last(picture):
    view = View(toys.toy(gates=1), "one")
    assert view.gate(picture, 3).caption.startswith("das_1, ")


def test_grad_cam_of_gates(gated, picture):
    best = max(gated.predict(picture).items(), key=lambda item: item[1])[0]
    assert gated.grad_cam(picture, 1, 0.9).caption == f"das_2: for {best}"


@pytest.mark.parametrize(("number", "layer"), [(0, "stage1"), (1, "stage2")])
def test_grad_cam_without_gates(gated, plain, picture, number, layer):
    """The map covers the same share of the image, although the image sizes differ."""
    drawing = plain.grad_cam(picture, number, gated.share(number))
    assert drawing.caption.startswith(f"{layer}: for ")
    assert drawing.image.size == plain.drawn_size


def test_grad_cam_reaches_into_models_of_any_size(picture):
    inner = toys.toy((None, None, 3), gates=0)
    inner = keras.Model(inner.input, inner.get_layer("stage2").output)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, "softmax")]
    view = View(keras.Sequential([keras.Input((None, None, 3)), inner, *head]), "nested", NAMES, open_size=48)
    assert view.shape == (48, 48, 3)
    assert view.grad_cam(picture, 0, 0.5).caption.startswith("stage2: for ")


# Files


def write(path: Path, make) -> Path:
    make(path)
    return path


def cut(path, kind):
    toys.photograph(300, 300).save(path, kind)
    path.write_bytes(path.read_bytes()[:2000])


def video(path):
    path.write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(500))


def no_image(path):
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")


BAD = {
    "text.png": (lambda path: path.write_text("no picture"), "is not an image: BMP, GIF, JPEG"),
    "empty.png": (lambda path: path.write_bytes(b""), "is not an image"),
    "video.mp4": (video, "is not an image"),
    "drawing.svg": (no_image, "is not an image"),
    "page.eps": (lambda path: toys.photograph().save(path, "EPS"), "is not an image"),
    "cut.png": (lambda path: cut(path, "PNG"), "is damaged or incomplete: "),
    "cut.jpg": (lambda path: cut(path, "JPEG"), "is damaged or incomplete: "),
    "heavy.bmp": (lambda path: path.write_bytes(bytes(21 * 2**20)), "has 21 MB; at most 20 MB are supported"),
    "wide.png": (
        lambda path: Image.new("1", (100_000, 510)).save(path),
        "has 100000x510 pixels: at most 50 m",
    ),
    "bomb.png": (
        lambda path: Image.new("1", (100_000, 4000)).save(path),
        "has too many pixels: at most 50 m",
    ),
    "deep.png": (lambda path: Image.new("I;16", (9, 9)).save(path), "has more than 8 bits per channel"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    make, message = BAD[name]
    path = write(tmp_path / name, make)
    with pytest.raises(UserError, match=f"^{name} {message}") as error:
        pictures.read_picture(path)
    assert "\n" not in str(error.value)
    picture, said = page.take_upload(str(path))
    assert picture is None
    assert "role='alert'" in said
    assert message in said


def test_file_names_are_no_markup(tmp_path):
    _, said = page.take_upload(str(write(tmp_path / "<b>x<b>.png", no_image)))
    assert "&lt;b&gt;x&lt;b&gt;.png is not an image" in said


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".webp", ".tiff"])
def test_good_files(suffix, tmp_path):
    source = toys.photograph()
    path = write(tmp_path / f"good{suffix}", source.save)
    picture, said = page.take_upload(str(path))
    assert said == f"<p class='caption'>good{suffix}</p>"
    assert (picture.image.mode, picture.image.size) == ("RGB", source.size)
    difference = np.asarray(picture.image).astype(int) - np.asarray(source)
    assert np.abs(difference).mean() < 12  # a GIF has 256 colors


def test_transparent_is_white(tmp_path):
    path = tmp_path / "half.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(path)
    assert pictures.read_picture(path).image.getpixel((0, 0)) == (255, 255, 255)


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    source = Image.new("RGB", (40, 20))
    source.paste(toys.RED, (0, 0, 20, 20))
    source.save(tmp_path / "turned.png", exif=exif)
    upright = pictures.read_picture(tmp_path / "turned.png").image
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == toys.RED


def test_folders_by_turns(image_folder):
    root = image_folder({"red": 20, "green": 3})
    found = pictures.read_folder(root)
    assert len(found) == pictures.COUNT
    reds = [np.argmax(np.asarray(picture.image).mean(axis=(0, 1))) == 0 for picture in found]
    assert sorted(reds[:6]) == [False] * 3 + [True] * 3
    assert found[0].caption == "000.png"


def test_folders_without_pictures(tmp_path):
    with pytest.raises(UserError, match=r"--images: no such folder: .*/missing"):
        pictures.read_folder(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"--images: .* contains no images \(.bmp, .gif"):
        pictures.read_folder(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"a.png is not an image"):
        pictures.read_folder(tmp_path)


def test_pictures_of_the_test_data(image_folder, gated, tmp_path):
    model = toys.save(gated.model, tmp_path / "run", ["green", "red"], f"folder:{image_folder()}")
    found = pictures.training_pictures(model, 64)
    assert {picture.image.size for picture in found} == {(64, 64)}
    assert len(found) == pictures.COUNT
    for picture in found:
        brightest = np.argmax(np.asarray(picture.image).mean(axis=(0, 1)))
        assert picture.caption == ["label: red", "label: green"][brightest]


def test_without_test_data(gated, tmp_path):
    model = toys.save(gated.model, tmp_path / "run")
    with pytest.raises(UserError, match=r"no results.json beside .*pass a folder with --images"):
        pictures.training_pictures(model, 64)
    model = toys.save(gated.model, tmp_path / "run", NAMES, "folder:/nowhere")
    with pytest.raises(UserError, match=r"data folder not found: /nowhere; pass a folder .*--images"):
        pictures.training_pictures(model, 64)
    model.with_name("results.json").write_text("{")
    with pytest.raises(UserError, match=r"results.json was not written by classify.py"):
        pictures.training_pictures(model, 64)


# Loading


def test_labels_and_names(gated, tmp_path):
    path = toys.save(gated.model, tmp_path / "demo", NAMES)
    view = views.load_view(path)
    assert (view.name, view.class_names) == ("demo", NAMES)
    assert [gate.name for gate in view.gates] == ["das_1", "das_2"]
    assert view.map_sizes == [(32, 32), (16, 16)]
    assert views.load_view(path, ["tree", "other"]).class_names == ["tree", "other"]
    with pytest.raises(UserError, match="demo has 2 classes, and the labels are one: give --labels"):
        views.load_view(path, ["one"])
    with pytest.raises(UserError, match="demo has 2 classes, and the labels are one, one: give --labels"):
        views.load_view(path, ["one", "one"])
    named = path.rename(path.with_name("best.keras"))
    assert views.load_view(named).name == "best"


def test_models_to_compare(gated, plain, tmp_path):
    paths = [
        toys.save(view.model, tmp_path / name, NAMES)
        for view, name in ((gated, "a"), (plain, "b"), (plain, "c"))
    ]
    assert [view.name for view in views.load_views(*map(str, paths[1::-1]))] == ["b", "a"]
    with pytest.raises(UserError, match=r"no gates \(DASLayer\) in .*/b/model.keras or .*/c/model.keras$"):
        views.load_views(*map(str, paths[1:]))
    backbone = keras.Model(plain.model.input, plain.model.get_layer("stage2").output)
    features = toys.save(backbone, tmp_path / "features")
    with pytest.raises(UserError, match="features has neither gates nor class scores"):
        views.load_views(str(paths[0]), str(features))


def test_models_that_take_no_images(tmp_path):
    path = tmp_path / "vector.keras"
    keras.Sequential([keras.Input((7,)), keras.layers.Dense(2)]).save(path)
    with pytest.raises(UserError, match=r"vector expects \(None, 7\); images"):
        views.load_view(path)
    a, b = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    with pytest.raises(UserError, match="two must be a functional or sequential model with one input"):
        View(keras.Model([a, b], keras.layers.Add()([a, b])), "two")


# The command line


def fails(capsys, *arguments):
    """Returns the error message, which must be a single line on stderr."""
    assert explore.main(list(map(str, arguments))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("explore: error: ")
    return err


def test_errors_are_one_line(capsys, plain, tmp_path):
    missing = fails(capsys, tmp_path / "missing.keras")
    assert "no such file: " in missing
    assert "make demo" in missing
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes(b"no model")
    assert "damaged.keras cannot be loaded as a Keras model: " in fails(capsys, damaged)
    model = toys.save(plain.model, tmp_path / "plain")
    assert "no gates (DASLayer) in " in (said := fails(capsys, model))
    assert "name one that has with --compare" in said
    assert "--image-size must be at least 8, not 0" in fails(capsys, model, "--image-size", 0)
    assert "no such file" in fails(capsys, model, "--compare", tmp_path / "missing.keras")


def test_gradio_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "examples.exploring.page")
    monkeypatch.delattr("examples.exploring.page")
    assert "pip install 'keras-das[explore]'" in fails(capsys, tmp_path / "model.keras")


def test_ports():
    with page.listen("127.0.0.1", 0) as server:
        host, port = server.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1, port {port}: Address already in"):
            page.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--port must be from 0 to 65535, not 70000"):
        page.listen("127.0.0.1", 70_000)


def test_loopback_is_the_default():
    given = explore.parse_arguments(["model.keras"])
    assert (given.host, given.port) == ("127.0.0.1", 7860)


def test_drawings_are_larger_than_the_page_shows_them(gated, plain):
    """Gradio reports clicks in pixels of the drawing."""
    for view in (gated, plain):
        assert view.scale == math.ceil(views.SIDE / max(view.shape[:2]))
        assert max(view.drawn_size) >= views.SIDE

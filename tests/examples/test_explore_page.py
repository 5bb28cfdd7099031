"""Tests of the explore page in a headless Chromium. The script runs in a subprocess as the server."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import pytest

from tests.examples import toys

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000
"""The timeout of each wait in milliseconds."""

# Runs the script like a user would, and logs the addresses that it binds, connects to, or resolves.
SERVER = """
    import sys
    log = open(sys.argv.pop(1), "a", buffering=1)
    def watch(event, arguments):
        if event in ("socket.bind", "socket.connect") and isinstance(arguments[1], tuple):
            log.write(f"{event} {arguments[1][0]}\\n")
        elif event == "socket.getaddrinfo":
            log.write(f"{event} {arguments[0]}\\n")
    sys.addaudithook(watch)
    from examples import explore
    sys.exit(explore.main())
"""


def find_chromium(driver) -> str | None:
    """Returns the path of Chromium: `$CHROMIUM`, the system's, or Playwright's."""
    named = os.environ.get("CHROMIUM")
    found = [named] if named else [path for name in BROWSERS if (path := shutil.which(name))]
    own = driver.chromium.executable_path
    return next(iter(found), own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        path = find_chromium(driver)
        if path is None:
            pytest.skip(
                "no Chromium: install the distribution's package `chromium`, run `python -m playwright "
                "install chromium`, or name one in the environment variable CHROMIUM"
            )
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, images for the gallery, and files to upload."""
    root = tmp_path_factory.mktemp("explore")
    keras.utils.set_random_seed(0)
    toys.save(toys.toy(), root / "gated", ["cat", "dog"])
    toys.save(toys.toy((40, 40, 3), gates=0), root / "plain", ["cat", "dog"])
    (root / "images").mkdir()
    for seed in range(3):
        toys.photograph(seed=seed).save(root / "images" / f"{seed}.png")
    toys.photograph(200, 80, seed=9).save(root / "good.jpg")
    (root / "bad.png").write_text("no picture")
    return root


class Server:
    """A server of the page, its address, and a log of its socket events."""

    def __init__(self, folder, name, *arguments):
        self.log, self.temporary = folder / f"{name}.txt", folder / name
        self.temporary.mkdir()
        code = ["-c", textwrap.dedent(SERVER), str(self.log)]
        options = ["--images", "images", "--port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, *code, *arguments, *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"explore: (http://127\.0\.0\.1:\d+/) \(Ctrl\+C ends it\)\n", line)
        assert found, f"the server said {line!r}"
        self.address = found[1]

    def network(self):
        """The addresses that the server has bound, connected to, or resolved."""
        return set(self.log.read_text().splitlines())

    def stop(self):
        """Stops the server and returns its exit code."""
        self.process.terminate()
        with self.process.stdout:
            return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(folder):
    running = Server(folder, "one", "gated/model.keras")
    yield running
    assert running.stop() == 0
    assert not list(running.temporary.rglob("*.png"))  # images are deleted


@pytest.fixture(scope="module")
def comparing(folder, server):
    """Starts after the other server, because starting both at once is slow on machines with few cores."""
    running = Server(folder, "two", "gated/model.keras", "--compare", "plain/model.keras")
    yield running
    assert running.stop() == 0


@pytest.fixture
def open_page(chromium):
    """Opens a server's page. The test fails if the page sends requests to other hosts or logs an error."""
    pages, asked, errors = [], set(), []

    def open_it(server):
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.address)
        page.locator("#first-points img").wait_for()
        pages.append((page, server.address))
        return page

    yield open_it
    for page, address in pages:
        page.close()
        elsewhere = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
        assert not elsewhere
    assert not errors


def source(page, name):
    return page.locator(f"#{name} img").get_attribute("src")


def caption(page, name="first-points"):
    return page.locator(f"#{name}-caption").inner_text()


def wait_for_change(page, name, before):
    page.wait_for_function(
        "([name, before]) => document.querySelector(`#${name} img`).getAttribute('src') !== before",
        arg=[name, before],
    )


def wait_for_text(page, name, text):
    page.locator(f"#{name}", has_text=text).wait_for()


def wait_until_loaded(page, name):
    """Waits until an image is loaded. Before, Gradio does not know its size and ignores clicks."""
    page.wait_for_function("name => document.querySelector(`#${name} img`).complete", arg=name)


def click(page, name, y, x):
    """Clicks at fractions of a drawing's height and width, and waits until the points have moved."""
    points, text = source(page, "first-points"), caption(page)
    wait_until_loaded(page, name)
    box = page.locator(f"#{name} img").bounding_box()
    position = {"x": x * box["width"], "y": y * box["height"]}
    page.locator(f"#{name} img").click(position=position)
    wait_for_change(page, "first-points", points)
    page.locator("#first-points-caption", has_not_text=text).wait_for()


def test_the_page_loads(server, open_page):
    page = open_page(server)
    assert page.locator("h1").inner_text() == "Where the gates look"
    assert page.locator("#first-scores h2").inner_text() == "gated"
    scores = page.locator("#first-scores .score").all_inner_texts()
    assert sorted(text.split()[0] for text in scores) == ["cat", "dog"]
    assert page.locator("#stage label").all_inner_texts() == ["1: das_1, 32x32", "2: das_2, 16x16"]
    assert page.locator("#gallery button").count() == 3
    assert page.locator("#second-points").count() == page.locator("#first-cam").count() == 0


@pytest.mark.parametrize(("y", "x"), [(0.3, 0.8), (0.9, 0.1)])
def test_a_click_moves_the_points(server, open_page, y, x):
    page = open_page(server)
    click(page, "first-points", y, x)
    row, column = map(int, re.match(r"das_1: row (\d+), column (\d+):", caption(page)).groups())
    # The convolution has stride 2 and pads at the end, so index i is at pixel 2 * i + 1.
    expected = [(64 * share - 0.5 - 1) / 2 for share in (y, x)]
    assert [row, column] == pytest.approx(expected, abs=0.6)  # the nearest, to within a screen pixel


def test_a_click_on_the_heat_map(server, open_page):
    page = open_page(server)
    gate = source(page, "first-gate")
    click(page, "first-gate", 0.75, 0.25)
    assert re.match(r"das_1: row 23, column 7:", caption(page))
    assert source(page, "first-gate") == gate


def test_the_stages(server, open_page):
    page = open_page(server)
    points, gate = source(page, "first-points"), source(page, "first-gate")
    page.locator("#stage label").nth(1).click()
    wait_for_change(page, "first-points", points)
    wait_for_change(page, "first-gate", gate)
    wait_for_text(page, "first-gate-caption", "das_2, 16x16")
    assert caption(page).startswith("das_2: ")
    assert "of 9 points" in caption(page)
    page.locator("#stacked label").nth(1).click()
    wait_for_text(page, "first-points-caption", "of 81 points")


def test_pictures_to_pick(server, open_page):
    page = open_page(server)
    points, gate = source(page, "first-points"), source(page, "first-gate")
    assert page.locator("#message").inner_text() == "0.png"
    page.locator("#gallery button").nth(2).click()
    wait_for_text(page, "message", "2.png")
    wait_for_change(page, "first-points", points)
    wait_for_change(page, "first-gate", gate)


def test_uploads(server, open_page, folder):
    page = open_page(server)
    points = source(page, "first-points")
    chooser = page.locator("input[type=file]")
    chooser.set_input_files(folder / "bad.png")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").inner_text().startswith("bad.png is not an image: ")
    assert source(page, "first-points") == points
    chooser.set_input_files(folder / "good.jpg")
    wait_for_text(page, "message", "good.jpg")
    wait_for_change(page, "first-points", points)
    assert page.get_by_role("alert").count() == 0
    # A click then refers to the uploaded image.
    click(page, "first-points", 0.5, 0.25)
    assert re.match(r"das_1: row 15, column 7:", caption(page))


def test_two_models(comparing, open_page):
    page = open_page(comparing)
    assert page.locator("#second-scores h2").inner_text() == "plain"
    assert page.get_by_text("This model has no gates.").is_visible()
    assert page.locator("#second-gate").count() == 0
    assert caption(page, "first-cam").startswith("das_1: for ")
    assert caption(page, "second-cam").startswith("stage1: for ")
    # A click on one image moves the place in the other, which has a different size.
    second = source(page, "second-points")
    click(page, "first-points", 0.25, 0.75)
    wait_for_change(page, "second-points", second)
    click(page, "second-cam", 0.75, 0.25)
    assert re.match(r"das_1: row 23, column 7:", caption(page))
    cams = source(page, "first-cam"), source(page, "second-cam")
    page.locator("#stage label").nth(1).click()
    wait_for_change(page, "first-cam", cams[0])
    wait_for_change(page, "second-cam", cams[1])
    wait_for_text(page, "second-cam-caption", "stage2: for ")


def test_nobody_else_is_asked(server, open_page):
    """Gradio's telemetry and its check for updates are disabled."""
    open_page(server)
    # On import, urllib3 binds an IPv6 address to check whether IPv6 is available.
    assert server.network() - {"socket.bind ::1"} == {"socket.bind 127.0.0.1"}

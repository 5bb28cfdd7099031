"""The layout and the events of the page."""

from __future__ import annotations

import contextlib
import html
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

# Gradio reads this variable when it is imported. No analytics are sent.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import fastapi
import gradio as gr
import uvicorn
from PIL import Image, ImageOps

from examples.common import UserError
from examples.exploring import style
from examples.exploring.pictures import MAX_BYTES, Picture, read_picture
from examples.exploring.views import MIDDLE, Drawing, Place, View, clicked

UPLOAD_LIMIT = 4 * MAX_BYTES
"""The largest upload that the server accepts; below this limit, the page explains errors itself."""
MOST_SCORES = 3


def build_page(views: Sequence[View], pictures: Sequence[Picture]) -> gr.Blocks:
    """Builds the page for one model, or for two to compare; it starts with the first of `pictures`."""
    with gr.Blocks(title="Where the gates look") as page:
        gr.HTML(style.HEADING, padding=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=270):
                controls = Controls(views, pictures)
            with gr.Column(scale=4):
                panels = [
                    Panel(view, other, name, pictures[0])
                    for view, other, name in zip(views, _others(views), ("first", "second"), strict=False)
                ]
        _connect(controls, panels)
    return page


def _others(views: Sequence[View]) -> list[View | None]:
    """The model that each model is compared with."""
    return [None] if len(views) == 1 else [views[1], views[0]]


class Controls:
    """The left column of the page: picture, stage and options."""

    def __init__(self, views: Sequence[View], pictures: Sequence[Picture]) -> None:
        """Adds the components to the page."""
        most = max(views, key=lambda view: len(view.gates))
        self.pictures = pictures
        self.picture, self.place = gr.State(pictures[0]), gr.State(MIDDLE)
        self.gallery = gr.Gallery(
            [_thumbnail(picture.image) for picture in pictures],
            label="Picture",
            show_label=False,
            columns=4,
            height="auto",
            allow_preview=False,
            buttons=[],
            interactive=False,
            elem_id="gallery",
        )
        self.message = gr.HTML(_say_which(pictures[0]), padding=False, elem_id="message")
        self.upload = gr.UploadButton("Upload a picture", size="sm", elem_id="upload")
        self.stage = gr.Radio(
            _stages(most), value=0, label="Stage: its gate, size of the map", elem_id="stage"
        )
        self.stacked = gr.Radio(
            [("this gate alone", False), ("this gate through the one before it", True)],
            value=False,
            label="Points sampled by",
            visible=len(most.gates) > 1,
            elem_id="stacked",
        )
        gr.HTML(style.LEGEND, padding=False)

    @property
    def settings(self) -> list[Any]:
        """The inputs that, with the picture, determine the panels."""
        return [self.stage, self.stacked, self.place]


def _stages(view: View) -> list[tuple[str, int]]:
    sizes = (f"{rows}x{columns}" for rows, columns in view.map_sizes)
    return [
        (f"{number + 1}: {gate.name}, {size}", number)
        for number, (gate, size) in enumerate(zip(view.gates, sizes, strict=True))
    ]


def _thumbnail(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (160, 160), Image.Resampling.NEAREST)


def _say_which(picture: Picture) -> str:
    return f"<p class='caption'>{html.escape(picture.caption)}</p>"


def take_upload(path: str) -> tuple[Picture | None, str]:
    """The picture of an uploaded file, if valid, and the message on the page."""
    try:
        picture = read_picture(path)
    except UserError as error:
        return None, f"<div class='message' role='alert'>{html.escape(str(error))}</div>"
    return picture, _say_which(picture)


class Slot:
    """A drawing and its caption."""

    def __init__(self, title: str, about: str, drawing: Drawing, name: str) -> None:
        """Adds the components to the page."""
        with gr.Column(min_width=200, elem_classes="slot"):
            gr.HTML(f"<h3>{title}</h3> <span class='about'>{about}</span>", padding=False)
            self.image = gr.Image(
                drawing.image,
                format="png",
                show_label=False,
                container=False,
                buttons=[],
                interactive=False,
                elem_id=name,
                elem_classes="drawing",
                alt_text=title,
            )
            self.caption = gr.HTML(_caption(drawing), padding=False, elem_id=f"{name}-caption")

    @property
    def components(self) -> list[Any]:
        """The components that change, in the order of `_contents`."""
        return [self.image, self.caption]


def _contents(drawing: Drawing) -> list[Any]:
    return [drawing.image, _caption(drawing)]


def _caption(drawing: Drawing) -> str:
    return f"<p class='caption'>{html.escape(drawing.caption)}</p>"


class Panel:
    """One model's part of the page.

    Args:
        view: The model.
        other: The model it is compared with, or `None`.
        name: Prefix of the names of its components.
        picture: The initial picture.
    """

    def __init__(self, view: View, other: View | None, name: str, picture: Picture) -> None:
        """Adds the panel to the page."""
        self.view, self.other = view, other
        places, *more = self._draw(picture, 0, False, MIDDLE)
        self.scores = gr.HTML(self._write_scores(picture), padding=False, elem_id=f"{name}-scores")
        with gr.Row():
            self.slots = [
                Slot("Sampled positions" if view.gates else "Picture", style.CLICK, places, f"{name}-points")
            ]
            if view.gates:
                self.slots.append(Slot("Gate", style.KEPT, more.pop(0), f"{name}-gate"))
            else:
                with gr.Column(min_width=200, elem_classes="slot"):
                    gr.HTML(style.NO_GATES, padding=False)
            if more:
                self.slots.append(Slot("Grad-CAM", style.CAM, more.pop(0), f"{name}-cam"))

    @property
    def components(self) -> list[Any]:
        """All components that change, in the order of `fill`."""
        return [self.scores, *(part for slot in self.slots for part in slot.components)]

    def fill(self, picture: Picture, number: int, stacked: bool, place: Place) -> list[Any]:
        """The contents of `components` for the gate of this number."""
        drawings = self._draw(picture, number, stacked, place)
        return [self._write_scores(picture), *(part for drawing in drawings for part in _contents(drawing))]

    def move(self, picture: Picture, number: int, stacked: bool, place: Place) -> list[Any]:
        """The contents of the first slot, the only one that depends on the point."""
        return _contents(self._draw_places(picture, number, stacked, place))

    def _draw(self, picture: Picture, number: int, stacked: bool, place: Place) -> list[Drawing]:
        view, drawings = self.view, [self._draw_places(picture, number, stacked, place)]
        if view.gates:
            drawings.append(view.gate(picture.image, number))
        if self.other and view.class_names:
            share = (view if view.gates else self.other).share(number)
            drawings.append(view.grad_cam(picture.image, number, share))
        return drawings

    def _draw_places(self, picture: Picture, number: int, stacked: bool, place: Place) -> Drawing:
        if not self.view.gates:
            return self.view.plain(picture.image, place)
        return self.view.points(picture.image, number, stacked, place)

    def _write_scores(self, picture: Picture) -> str:
        title = f"<h2>{html.escape(self.view.name)}</h2>"
        if not self.view.class_names:
            return title
        scores = self.view.predict(picture.image)
        best = sorted(scores, key=lambda name: -scores[name])[:MOST_SCORES]
        rows = "".join(style.SCORE.format(name=html.escape(of), percent=100 * scores[of]) for of in best)
        return f"{title}<div class='scores'>{rows}</div>"


def _connect(controls: Controls, panels: Sequence[Panel]) -> None:
    """Connects the events of the page to the panels."""
    everything = [part for panel in panels for part in panel.components]
    # One event at a time, because `visualize` intercepts the layers of the models.
    how: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}

    def fill(picture: Picture, *settings: Any) -> list[Any]:
        return [part for panel in panels for part in panel.fill(picture, *settings)]

    def pick(number: int, stacked: bool, place: Place, event: gr.SelectData) -> list[Any]:
        picture = controls.pictures[event.index]
        return [picture, _say_which(picture), *fill(picture, number, stacked, place)]

    def take(path: str, *settings: Any) -> list[Any]:
        picture, message = take_upload(path)
        if picture is None:
            return [gr.skip(), message, *(gr.skip() for _ in everything)]
        return [picture, message, *fill(picture, *settings)]

    outputs = [controls.picture, controls.message, *everything]
    controls.gallery.select(pick, controls.settings, outputs, show_progress="minimal", **how)
    controls.upload.upload(
        take, [controls.upload, *controls.settings], outputs, show_progress="minimal", **how
    )
    inputs = [controls.picture, *controls.settings]
    changes = [controls.stage.change, controls.stacked.change]
    gr.on(changes, fill, inputs, everything, show_progress="minimal", **how)
    for panel in panels:
        _connect_clicks(panel, controls, panels, how)


def _connect_clicks(panel: Panel, controls: Controls, panels: Sequence[Panel], how: dict[str, Any]) -> None:
    """Makes clicks on the drawings of a panel move the point in all panels."""

    def move(picture: Picture, number: int, stacked: bool, event: gr.SelectData) -> list[Any]:
        place = clicked(event.index, panel.view.drawn_size)
        return [place, *(part for of in panels for part in of.move(picture, number, stacked, place))]

    inputs = [controls.picture, controls.stage, controls.stacked]
    outputs = [controls.place, *(part for of in panels for part in of.slots[0].components)]
    for slot in panel.slots:
        slot.image.select(move, inputs, outputs, trigger_mode="always_last", show_progress="hidden", **how)


# The server


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 selects any free port."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be from 0 to {2**16 - 1}, not {port}")
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host}, port {port}: {reason} (see --host and --port)") from error


def serve(page: gr.Blocks, server: socket.socket) -> None:
    """Serve the page until an interrupt or SIGTERM.

    Does not use Gradio's `launch`, which selects ports and accesses the network.
    """
    host, port = server.getsockname()[:2]
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        max_file_size=UPLOAD_LIMIT,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Default(
            primary_hue="teal",
            neutral_hue="slate",
            # System fonts: the fonts of the themes come from a network.
            font=["system-ui", "sans-serif"],
            font_mono=["monospace"],
        ),
        css=style.CSS,
    )
    # Does not wait for the connections of open pages.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    print(f"explore: http://{host}:{port}/ (Ctrl+C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[server])

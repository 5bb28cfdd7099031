"""Aerial photographs with boxes of tree crowns, from the PyPI wheel of deepforest 2.1.0 (MIT license)."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import filelock
import numpy as np
import platformdirs
from PIL import Image

from examples.common import UserError
from examples.data import voc

REQUIREMENT = "deepforest==2.1.0"
WHEEL = "deepforest-2.1.0-py3-none-any.whl"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
NAMES = (
    "2019_YELL_2_528000_4978000_image_crop2",
    "2019_YELL_2_541000_4977000_image_crop",
    "OSBS_029",
    "SOAP_061",
)


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One annotated photograph: `pixels` is uint8 of shape `(height, width, 3)`."""

    name: str
    pixels: np.ndarray
    annotation: voc.Annotation


def load() -> list[Photograph]:
    """The four photographs; the wheel is downloaded on first use."""
    with zipfile.ZipFile(fetch_wheel(cache_folder())) as wheel:
        return [_read(wheel, name) for name in NAMES]


def cache_folder() -> Path:
    """The folder that keeps downloads between runs."""
    return Path(platformdirs.user_cache_dir("keras_das"))


def fetch_wheel(folder: Path) -> Path:
    """The path of the verified wheel in `folder`, downloaded with pip unless a valid copy exists."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WHEEL
    with filelock.FileLock(folder / f"{WHEEL}.lock"):
        if not path.exists() or _digest(path) != SHA256:
            _download(path)
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(path: Path) -> None:
    print(f"downloading {REQUIREMENT} (20 MB) from PyPI", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--no-cache-dir", "--quiet", "--dest", folder, REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True)
        wheel = Path(folder) / WHEEL
        if result.returncode or not wheel.exists():
            reason = (result.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
            raise UserError(f"cannot download {REQUIREMENT} from PyPI: {reason}")
        digest = _digest(wheel)
        if digest != SHA256:
            raise UserError(f"{WHEEL} from the package index has sha256 {digest}, expected {SHA256}")
        os.replace(wheel, path)


def _read(wheel: zipfile.ZipFile, name: str) -> Photograph:
    path = f"deepforest/data/{name}"
    with Image.open(io.BytesIO(wheel.read(f"{path}.png"))) as image:
        pixels = np.asarray(image.convert("RGB"))
    return Photograph(name, pixels, voc.parse(wheel.read(f"{path}.xml"), f"{path}.xml"))

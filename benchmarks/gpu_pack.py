"""Packs the files that gpu_report.py needs on a GPU machine without a network.

    python benchmarks/gpu_pack.py build/gpu_pack --data woof:FOLDER [--arch sm_90] [--python 3.12]

The pack contains kernel libraries with CUDA, the packages of the alternatives, and training images. nvcc
compiles the libraries on this machine for the installed versions of TensorFlow and JAX, so the GPU machine
must have the same versions. The pack is written to folders OUTPUT/part0, part1, ... of at most 60 MiB each.
The commands for the GPU machine are printed and written to OUTPUT/COMMANDS. That machine must have this
repository, TensorFlow or JAX, and torch.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from gpu_report import data_folder

PEERS = ("deformops==3.0.1", "tvdcn==1.1.0")
PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_28_x86_64", "manylinux2014_x86_64")
THERE = "/tmp/keras_das_pack"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("output", type=pathlib.Path, help="output folder; it must not exist")
    add("--data", help="woof:FOLDER or dogs:FOLDER, with train/ and test/")
    add("--arch", default="sm_90", help="architecture of the GPU (default: sm_90)")
    add("--python", default="3.12", help="Python version of the GPU machine (default: 3.12)")
    add("--libraries", type=pathlib.Path, help="folder of libraries that are built already")
    add("--mib", type=int, default=60, help="largest size of a part in MiB (default: 60)")
    options = parser.parse_args()
    data = data_folder(parser, options.data)
    options.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        libraries = options.libraries or build_libraries(folder / "libraries", options.arch)
        site = download_peers(folder, options.python)
        contents = {"libraries": libraries, "site": site}
        task = ""
        if data:
            task, _, images = data.partition(":")
            contents["data"] = pathlib.Path(images)
        parts = write_parts(contents, options.output, options.mib << 20)
    text = "\n".join(commands(parts, task)) + "\n"
    (options.output / "COMMANDS").write_text(text)
    print(text, end="")


def build_libraries(folder: pathlib.Path, arch: str) -> pathlib.Path:
    """Builds the kernel libraries of the installed frameworks with CUDA kernels."""
    build = [sys.executable, "-m", "keras_das", "build", "--framework", "all", "--cuda", "--arch", arch]
    subprocess.run([*build, "--output", str(folder)], check=True)
    return folder


def download_peers(folder: pathlib.Path, python: str) -> pathlib.Path:
    """Downloads and unpacks the wheels of the alternatives into a folder for PYTHONPATH."""
    wheels, site = folder / "wheels", folder / "site"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(wheels)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, *PEERS], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def write_parts(contents: dict[str, pathlib.Path], output: pathlib.Path, size: int) -> list[pathlib.Path]:
    """Writes one archive in files of at most `size` bytes, each in its own folder."""
    parts = []
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for name, folder in contents.items():
                tar.add(folder, name)
        archive.seek(0)
        while piece := archive.read(size):
            part = output / f"part{len(parts)}" / f"pack.{len(parts):03}"
            part.parent.mkdir()
            part.write_bytes(piece)
            parts.append(part)
    return parts


def commands(parts: list[pathlib.Path], task: str) -> list[str]:
    """The commands for the GPU machine, in the folder of the repository."""
    report = ["python3", "benchmarks/gpu_report.py", "--budget", "540", "--output", "runs/gpu"]
    if task:
        report += ["--data", f"{task}:{THERE}/data"]
    return [
        f"# After the transfer of each of {len(parts)} parts:",
        f"mkdir -p {THERE} && cp PART/pack.* {THERE}/",
        "# After all transfers:",
        f"cat {THERE}/pack.* | tar -xz -C {THERE}",
        f"export KERAS_DAS_CACHE={THERE}/libraries PYTHONPATH={THERE}/site:$PYTHONPATH",
        shlex.join(report),
        "# To resume the report, or to run one phase of it (--phases right), repeat the last command.",
    ]


if __name__ == "__main__":
    main()

import errno
import resource
from pathlib import Path

import pytest

from examples import common
from examples.common import RunError, UserError


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for content in ("first", "second"):
        with common.replacing(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    with pytest.raises(ValueError, match="half way"), common.replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("sec")
        raise ValueError("half way")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    full = Path("/dev/full")
    with (
        pytest.raises(RunError, match=r"disk full while writing .*/a.txt; nothing was written"),
        common.replacing(path),
    ):
        full.write_text("x" * 100_000)
    path.write_text("first")
    with (
        pytest.raises(RunError, match=r"disk full while writing .*/a.txt; the previous one is kept"),
        common.replacing(path),
    ):
        full.write_text("x" * 100_000)
    assert path.read_text() == "first"


def test_a_write_cut_off_by_the_system(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match="disk full"), common.replacing(path) as temporary:
            temporary.write_text("x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError("Can't write data (file write failed: errno = 28, 'No space left on device')"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (ValueError("space"), False),
    ],
)
def test_which_errors_mean_a_full_disk(error: Exception, full: bool) -> None:
    assert common.is_disk_full(error) is full


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong"), 2, "p: error: wrong\n"),
        (RunError("broken"), 1, "p: error: broken\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "p: error: disk full: [Errno 28] No space"),
        (ValueError("\n odd \n more"), 1, "p: error: ValueError: odd (run again with --debug"),
        (KeyboardInterrupt(), 130, "p: interrupted\n"),
    ],
)
def test_errors_become_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    assert common.run("p", main, debug=False) == code
    written = capsys.readouterr().err
    assert written.startswith(line)
    assert written.count("\n") == 1


def test_debug_shows_the_traceback() -> None:
    def main() -> None:
        raise UserError("wrong")

    with pytest.raises(UserError):
        common.run("p", main, debug=True)


def test_room_is_made_sure_of(tmp_path: Path) -> None:
    common.reserve(tmp_path, 1000)
    with pytest.raises(OSError, match=r"No space left|File too large|Invalid argument"):
        common.reserve(tmp_path, 2**60)
    assert list(tmp_path.iterdir()) == []

"""Training scripts, one per task. Run them (`python examples/classify.py --help`) or import them."""

import importlib.util
import sys
from pathlib import Path


def require(extra: str, *packages: str) -> None:
    """Exit with one line that names the extra if one of its packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        program = Path(sys.argv[0]).stem
        sys.exit(f"{program}: error: {', '.join(missing)} not installed: pip install 'keras-das[{extra}]'")

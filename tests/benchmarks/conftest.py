import pathlib
import sys

# The benchmarks are scripts that import each other from their own folder and `examples` from its parent.
ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

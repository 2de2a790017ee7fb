"""Put the repository on sys.path, so that scripts import its modules from any folder."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parse_first(get_args_parser):
    """Parse the flags early if the module runs as a script, so that --help and mistakes do not wait for imports."""
    if get_args_parser.__module__ == '__main__':
        get_args_parser().parse_args()
    return get_args_parser

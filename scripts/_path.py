"""Put the repository on sys.path, so that scripts import its modules from any folder."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

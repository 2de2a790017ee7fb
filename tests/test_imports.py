"""Who may import whom (docs/architecture.md): no circle, no arrow upwards."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    'errors': '', 'cmt': '', 'losses': '', 'samplers': '', 'optim': '', 'launch': '', 'precision': '', 'sources': '',
    'mindspore': '', 'reports': 'system', 'system': '',
    'options': 'launch', 'processes': 'launch system', 'transforms': '', 'fast_transforms': 'sources',
    'utils': 'processes launch system', 'loader': 'samplers system', 'datasets': 'published sources system',
    'published': 'sources',
    'engine': 'utils processes precision', 'checkpoints': 'system', 'weights': 'cmt mindspore checkpoints',
    'evaluation': 'engine processes reports samplers sources system transforms utils weights',
    'run': 'checkpoints weights utils processes system', 'hubconf': 'cmt',
}
MODULES = {path.stem for path in ROOT.glob('*.py')}


def imports_of(path: Path) -> set[str]:
    """Names of the project's modules that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split('.')[0])
    return names & (MODULES - {'_path'} | {script.stem for script in ROOT.glob('scripts/[!_]*.py')})


@pytest.mark.parametrize('module', sorted(MODULES))
def test_modules_import_what_the_architecture_allows(module):
    allowed = MODULES if module == 'train' else set(MAY_IMPORT[module].split())
    if module != 'cmt':
        allowed = allowed | {'errors'}
    assert imports_of(ROOT / f'{module}.py') <= allowed


@pytest.mark.parametrize('script', sorted(ROOT.glob('scripts/*.py')), ids=lambda path: path.stem)
def test_scripts_import_neither_train_nor_each_other(script):
    assert imports_of(script) <= MODULES - {'train'}

"""docs/finetune.ipynb, run by nbclient. `pytest -m soak` needs nbclient, ipykernel and the packages of the export."""
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.soak
@pytest.mark.parametrize('own', [False, True], ids=['sample', 'own photos'])
def test_the_notebook_runs(tmp_path, own):
    nbformat = pytest.importorskip('nbformat')
    nbclient = pytest.importorskip('nbclient')
    pytest.importorskip('ipykernel')
    pytest.importorskip('onnxruntime')
    shutil.copytree(ROOT, tmp_path / 'cmt', ignore=shutil.ignore_patterns('.*', 'output', 'photos', '__pycache__'))
    if own:  # a messy folder
        shutil.unpack_archive(ROOT / 'docs/assets/photos.zip', tmp_path / 'cmt')
        folder = tmp_path / 'cmt' / 'photos'
        (folder / 'cat').rename(folder / "my cat's")
        (folder / 'frog' / 'notes.txt').write_text('no photo')
        (folder / 'frog' / '0000.jpg').write_bytes(b'\xff\xd8 damaged')
        shutil.rmtree(folder / 'horse')
    notebook = nbformat.read(tmp_path / 'cmt/docs/finetune.ipynb', 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('EPOCHS = 20', 'EPOCHS = 2')
    nbclient.NotebookClient(notebook, kernel_name='python3', resources={'metadata': {
        'path': str(tmp_path / 'cmt/docs')}}).execute(
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYDEVD_DISABLE_FILE_VALIDATION': '1'})

    text = [''.join(output.get('text', '') for output in cell.get('outputs', ())) for cell in notebook.cells]
    both = re.search(r'torch: (.*?)   ONNX Runtime: (.*)\n', ''.join(text))
    assert both[1] == both[2] in ("my cat's" if own else 'cat', 'airplane', 'automobile', 'frog', 'horse')
    pictures = [output for cell in notebook.cells for output in cell.get('outputs', ())
                if any(kind.startswith('image/') for kind in output.get('data', ()))]
    assert len(pictures) == 5

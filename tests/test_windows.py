"""Commands on a simulated Windows (tests/windows/sitecustomize.py), which is not Windows itself."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nano

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**nano.ENVIRONMENT, 'PYTHONPATH': os.pathsep.join(map(str, (
    ROOT / 'tests' / 'windows', ROOT, ROOT / 'scripts', ROOT / 'tests'))), 'PYTHONIOENCODING': 'cp1252'}
NAMES = 'Bär', 'Öl', 'ß'
COMMANDS = '''
import sys

import nano
import convert_checkpoint, export, predict, prepare_data, train

if __name__ == '__main__':
    file, data, out = sys.argv[1:]
    assert train.cli(['--eval', '--resume', file, '--report', f'{out}/report']) == 0
    predict.main([file, f'{data}/val', '--json'])
    convert_checkpoint.main([file, f'{out}/converted'])
    export.main([file, f'{out}/model.ts'])
    assert prepare_data.cli([data, f'{out}/tars', '--num-workers', '1']) == 0
    flags = [*map(str, nano.FLAGS), '--epochs', '1', '--data-path', f'{out}/tars', '--output-dir', f'{out}/run']
    assert train.cli(flags) == 0
'''


def start(*argv, **options):
    return subprocess.Popen([sys.executable, *map(str, argv)], env={**ENVIRONMENT, **options}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def run(*argv):
    process = start(*argv)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode('cp1252')[-3000:]
    return out.decode('utf-8', 'replace')


@pytest.fixture(scope='module')
def umlauts(images, tmp_path_factory):
    """A data set with umlauts in its class names, and a run on it."""
    folder = tmp_path_factory.mktemp('umlauts')
    for split in ('train', 'val'):
        (folder / 'data' / split).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            shutil.copytree(images / split / f'class_{i}', folder / 'data' / split / name)
    flags = [*nano.FLAGS, '--epochs', 1, '--num-workers', 1, '--data-path', folder / 'data', '--output-dir',
             folder / 'run']
    run(nano.__file__, *flags)
    return folder


@pytest.mark.soak
def test_umlauts_survive_every_command_on_windows(umlauts, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(COMMANDS, 'utf-8')
    out = run(script, umlauts / 'run' / 'checkpoint_best.pth', umlauts / 'data', tmp_path)
    out, answers = out.split('\n[\n')
    assert 'Acc@1' in out
    answers = json.JSONDecoder().raw_decode('[' + answers)[0]
    assert {answer['label']['class'] for answer in answers} == set(NAMES)
    rows = list(csv.DictReader((tmp_path / 'report' / 'per_class.csv').open(encoding='utf-8-sig')))
    assert [row['class'] for row in rows] == list(NAMES)
    assert json.loads((tmp_path / 'converted' / 'config.json').read_text('utf-8'))['label_names'] == list(NAMES)
    assert (tmp_path / 'model.ts').stat().st_size > 10_000
    assert nano.read(tmp_path / 'run')['classes'] == list(NAMES)


def test_a_reader_does_not_stop_the_saves_on_windows(umlauts, tmp_path):
    """A checkpoint that another program has open cannot be replaced there."""
    flags = [*nano.FLAGS, '--data-path', umlauts / 'data', '--output-dir', tmp_path / 'run']
    process = start(nano.__file__, *flags, NANO_PAUSE='0.1')
    file = tmp_path / 'run' / 'checkpoint_last.pth'
    nano.wait_for(file.exists)
    with open(file, 'rb'):
        nano.wait_for(lambda: len(nano.epochs(tmp_path / 'run')) > 1)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err.decode('cp1252')
    assert nano.epochs(tmp_path / 'run') == [0, 1, 2]

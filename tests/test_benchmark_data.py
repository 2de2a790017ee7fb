"""scripts/benchmark_data.py on images that it makes."""
import json
import sys

import pytest
from PIL import Image

import benchmark_data
import nano  # noqa: F401


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['benchmark_data.py', *map(str, argv)])
    benchmark_data.main()


def test_both_loaders_by_stage_and_workers(monkeypatch, tmp_path, capsys):
    run(monkeypatch, '--images', 6, '--batch-size', 2, '--sizes', 64, 32, '--workers', 0, 2, '--repeats', 2, '--stages',
        '--rates', 1000, '--json', tmp_path / 'a.json')
    report = json.loads((tmp_path / 'a.json').read_text())
    records = report['records']
    assert [(r['size'], r['workers'], r['loader']) for r in records] == [
        (size, workers, loader) for size in (64, 32) for workers in (0, 2) for loader in ('reference', 'fast')]
    for r in records:
        assert r['images_per_s'] > 0 and r['images_per_s_per_core'] > 0 and r['repeats'] == 2
        assert (r['ratio'] == 1) == (r['loader'] == 'reference')
        if r['workers']:
            assert r['stages_ms'] is None
        else:  # both are of the same process, on the same images
            assert set(r['stages_ms']) == set(benchmark_data.STAGES) and all(v > 0 for v in r['stages_ms'].values())
            assert sum(r['stages_ms'].values()) < 5 * 1000 / r['images_per_s_per_core']
    assert {'torch', 'Pillow', 'simplejpeg'} <= set(report['versions'])
    said = capsys.readouterr().out
    assert '1000 images/s: ' in said and 'cores with the fast loader at 64 px' in said


def test_made_images_are_of_imagenets_size(tmp_path):
    files = list(benchmark_data.make_images(tmp_path, 8).rglob('*.jpg'))
    assert len(files) == 8 and all(Image.open(file).size == (500, 375) for file in files)
    assert 95_000 < sum(file.stat().st_size for file in files) / 8 < 115_000


def test_compare_draws_three_rows(monkeypatch, tmp_path, capsys):
    run(monkeypatch, '--images', 8, '--sizes', 64, '--compare', tmp_path / 'grid.png')
    assert Image.open(tmp_path / 'grid.png').size == (8 * 64, 3 * 64)
    assert float(capsys.readouterr().out.split()[3]) < 20


def test_folders_of_classes(monkeypatch, images):
    for path in (images, images / 'train'):
        run(monkeypatch, '--data-path', path, '--sizes', 32, '--repeats', 1, '--loaders', 'fast')


def test_cores_that_a_model_needs(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, 'training_rate', lambda *args: 1000.)
    run(monkeypatch, '--images', 2, '--sizes', 32, '--repeats', 1, '--loaders', 'fast', '--model', 'cmt_nano')
    said = capsys.readouterr().out
    assert 'cmt_nano at 32 px, which trains at 1000 images/s here: ' in said
    assert said.endswith(' cores with the fast loader at 32 px\n')


def test_what_is_not_installed_has_no_version(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_data, 'distributions', lambda: [])
    run(monkeypatch, '--images', 2, '--sizes', 32, '--repeats', 1, '--loaders', 'reference', '--json', tmp_path / 'a')
    assert json.loads((tmp_path / 'a').read_text())['versions'] == {}


def mistake(monkeypatch, capsys, tmp_path, *argv):
    """The one line that a mistake gets."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out and sorted(tmp_path.rglob('*')) == before
    start = 'benchmark_data.py: error: '
    assert captured.err.startswith(start) and captured.err.endswith('\n') and captured.err.count('\n') == 1
    return captured.err.removeprefix(start).strip()


@pytest.mark.parametrize('argv, message', [
    (['--data-path', 'nowhere'], 'nowhere'),
    (['--sizes', '224', '0'], '--sizes: 0 is not at least 1'),
    (['--sizes', '-1'], '--sizes: -1 is not at least 1'),
    (['--images', '0'], '--images: 0 is not at least 1'),
    (['--batch-size', '0'], '--batch-size: 0 is not at least 1'),
    (['--workers', '-1'], '--workers: -1 is not at least 0'),
    (['--repeats', '0'], '--repeats: 0 is not at least 1'),
    (['--rates', 'nan'], '--rates: nan is not above 0'),
    (['--model', 'nope'], '--model nope at 224 px: unknown model nope'),
    (['--model', 'resnet18'], '--model resnet18 at 224 px: resnet18 is no CMT'),
    (['--model', 'cmt_nano', '--sizes', '48'], '--model cmt_nano at 48 px: '),
    (['--json', 'nodir/x.json'], "'nodir/x.json' cannot be written (No such file or directory)"),
    (['--compare', 'nodir/x.png'], "'nodir/x.png' cannot be written (No such file or directory)"),
    (['--compare', 'x.foo'], '--compare x.foo: give the name of a .png file'),
])
def test_mistakes_get_one_line(argv, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_data, 'make_images', None)  # seconds
    assert message in mistake(monkeypatch, capsys, tmp_path, *argv)


def test_a_model_that_cannot_train_gets_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark_data, 'measure', None)
    said = mistake(
        monkeypatch, capsys, tmp_path, '--images', 2, '--sizes', 32, '--batch-size', 1, '--model', 'cmt_nano')
    assert said.startswith('--model cmt_nano at 32 px, --batch-size 1: ')  # BatchNorm of one value


@pytest.mark.parametrize('argv', [[], ['--workers', 1], ['--compare', 'x.png']])
def test_images_that_cannot_be_read_get_one_line(argv, monkeypatch, tmp_path, capsys):
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    for i in range(12):
        (tmp_path / 'data' / 'a' / f'{i}.jpg').write_text('no image')
    said = mistake(monkeypatch, capsys, tmp_path, '--data-path', 'data', '--sizes', 32, '--repeats', 1, *argv)
    assert 'no image' in said if '--compare' in argv else '10 images in a row could not be read' in said

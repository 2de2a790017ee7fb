"""Run scripts/benchmark_data.py on small images."""
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
    monkeypatch.setattr(benchmark_data, 'training_rate', lambda *args: 1000.)  # takes 20 seconds
    run(monkeypatch, '--images', 6, '--batch-size', 2, '--sizes', 64, 32, '--workers', 0, 2, '--repeats', 2, '--stages',
        '--rates', 1000, '--model', 'cmt_nano', '--json', tmp_path / 'a.json')
    report = json.loads((tmp_path / 'a.json').read_text())
    records = report['records']
    assert [(r['size'], r['workers'], r['loader']) for r in records] == [
        (size, workers, loader) for size in (64, 32) for workers in (0, 2) for loader in ('reference', 'fast')]
    for r in records:
        assert r['images_per_s'] > 0 and r['images_per_s_per_core'] > 0 and r['repeats'] == 2
        assert (r['ratio'] == 1) == (r['loader'] == 'reference')
        if r['workers']:
            assert r['stages_ms'] is None
        else:
            assert set(r['stages_ms']) == set(benchmark_data.STAGES) and all(v > 0 for v in r['stages_ms'].values())
            assert sum(r['stages_ms'].values()) < 5 * 1000 / r['images_per_s_per_core']
    assert {'torch', 'Pillow', 'simplejpeg'} <= set(report['versions'])
    printed = capsys.readouterr().out
    for name in ('1000 images/s: ', 'cmt_nano at 64 px, which trains at 1000 images/s here: '):
        assert name in printed and ' cores with the fast loader at 64 px\n' in printed.split(name)[2]


def test_made_images_and_their_comparison(monkeypatch, tmp_path, capsys):
    files = list(benchmark_data.make_images(tmp_path, 8).rglob('*.jpg'))
    assert len(files) == 8 and all(Image.open(file).size == (500, 375) for file in files)
    assert 95_000 < sum(file.stat().st_size for file in files) / 8 < 115_000
    run(monkeypatch, '--data-path', tmp_path, '--sizes', 64, '--compare', tmp_path / 'grid.png')
    assert Image.open(tmp_path / 'grid.png').size == (8 * 64, 3 * 64)
    assert float(capsys.readouterr().out.split()[3]) < 20


def test_listing_counts_what_it_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark_data.py', '--listing', '1500'])
    benchmark_data.main()
    assert capsys.readouterr().out.startswith('1500 images in 1000 folders: ')


def test_a_folder_of_classes(monkeypatch, images):
    run(monkeypatch, '--data-path', images / 'train', '--sizes', 32, '--repeats', 1, '--loaders', 'fast')


@pytest.mark.parametrize('argv, message', [
    (['--data-path', 'nowhere'], 'nowhere'),
    (['--sizes', '224', '0'], '--sizes: 0 is not at least 1'),
    (['--workers', '-1'], '--workers: -1 is not at least 0'),
    (['--rates', 'nan'], '--rates: nan is not above 0'),
    (['--model', 'nope'], '--model nope at 224 px: unknown model nope'),
    (['--model', 'resnet18'], '--model resnet18 at 224 px: resnet18 is no CMT'),
    (['--model', 'cmt_nano', '--sizes', '48'], '--model cmt_nano at 48 px: '),
    (['--model', 'cmt_nano', '--sizes', '32', '--batch-size', '1'],  # BatchNorm of one value
     '--model cmt_nano at 32 px, --batch-size 1: '),
    (['--json', 'nodir/x.json'], "'nodir/x.json' cannot be written (No such file or directory)"),
    (['--compare', 'x.foo'], '--compare x.foo: give the name of a .png file'),
])
def test_mistakes_get_one_line(argv, message, images, monkeypatch, mistake):
    monkeypatch.setattr(benchmark_data, 'make_images', lambda *args: images)
    monkeypatch.setattr(benchmark_data, 'measure', None)  # mistakes are found before
    assert message in mistake(benchmark_data, *argv)


@pytest.mark.parametrize('argv', [[], ['--workers', 1], ['--compare', 'x.png']])
def test_images_that_cannot_be_read_get_one_line(argv, tmp_path, mistake):
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    for i in range(12):
        (tmp_path / 'data' / 'a' / f'{i}.jpg').write_text('no image')
    error = mistake(benchmark_data, '--data-path', 'data', '--sizes', 32, '--repeats', 1, *argv)
    assert error.startswith('--data-path data: ')
    assert 'no image' in error if '--compare' in argv else '10 images in a row could not be read' in error

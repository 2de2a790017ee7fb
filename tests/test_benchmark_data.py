"""Run scripts/benchmark_data.py on small images."""
import json
import sys

import pytest
import torch
from PIL import Image

import benchmark_data
import nano  # noqa: F401
import prepare_data


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


@pytest.fixture
def prepared(images, tmp_path):
    """The training images of `images`, in tars, short sides of 6 pixels."""
    prepare_data.main(prepare_data.build_parser().parse_args(
        [str(images / 'train'), str(tmp_path / 'prepared'), '--short-side', '6', '--num-workers', '0']))
    return tmp_path / 'prepared'


def test_peers_on_originals_and_on_prepared_tars(monkeypatch, tmp_path, capsys, images, prepared):
    run(monkeypatch, '--data-path', images, '--prepared', prepared, '--loaders', 'reference', 'fast', 'timm',
        'torchvision', '--batch-size', 20, '--sizes', 64, '--repeats', 2, '--json', tmp_path / 'a.json')
    records = json.loads((tmp_path / 'a.json').read_text())['records']
    assert [(r['data'], r['loader']) for r in records] == [
        (data, loader) for data in ('original', 'prepared') for loader in ('reference', 'fast', 'timm', 'torchvision')]
    assert all(r['images_per_s_per_core'] > 0 and r['ratio'] > 0 for r in records) and records[0]['ratio'] == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(' | ')[-1] for line in lines if '| timm |' in line] == [' |'] * 2
    assert all('operations' in line for line in lines if '| torchvision |' in line)


@pytest.mark.parametrize('loader', ['reference', 'fast', 'timm', 'torchvision', 'dali'])
def test_every_loader_gives_the_batches_of_training(monkeypatch, loader, images):
    if loader == 'dali':
        pytest.importorskip('nvidia.dali', reason='pip install nvidia-dali-cuda120')
    args = benchmark_data.build_parser().parse_args(
        ['--data-path', str(images), '--batch-size', '20', '--loaders', loader])
    case = benchmark_data.Case(args, 'original', loader, 64, 0, torch.device('cpu'))
    batches = [batch[0] for batch in case.batches]
    assert len(batches) == 5
    for batch in batches:
        assert batch.shape == (20, 3, 64, 64)
        assert batch.dtype == (torch.float32 if loader == 'timm' else torch.uint8)
    pixels = torch.cat(batches).float()
    pixels = pixels * 55 + 120 if loader == 'timm' else pixels
    assert 60 < pixels.mean() < 190 and pixels.std() > 30 and not torch.equal(*pixels[:2])
    assert list(case.run(0)) == [None] * 5 and case.per_s


def test_prepared_images_are_cropped_as_the_originals(monkeypatch, tmp_path, capsys):
    data = benchmark_data.make_images(tmp_path / 'data', 8)
    prepare_data.main(prepare_data.build_parser().parse_args(
        [str(data), str(tmp_path / 'prepared'), '--short-side', '250', '--num-workers', '0']))
    run(monkeypatch, '--data-path', data, '--prepared', tmp_path / 'prepared', '--sizes', 64, '--compare',
        tmp_path / 'grid.jpg')
    assert Image.open(tmp_path / 'grid.jpg').size == (8 * 64, 3 * 64)
    assert float(capsys.readouterr().out.split()[-3]) < 20  # other crops differ by 40


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
    (['--compare', 'x.foo'], '--compare x.foo: give the name of a .png or .jpg file'),
])
def test_mistakes_get_one_line(argv, message, images, monkeypatch, mistake):
    monkeypatch.setattr(benchmark_data, 'make_images', lambda *args: images)
    monkeypatch.setattr(benchmark_data, 'measure', None)  # mistakes are found before
    assert message in mistake(benchmark_data, *argv)


def test_prepared_images_are_those_of_the_data(images, prepared, tmp_path, mistake):
    (tmp_path / 'other' / 'a').mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(tmp_path / 'other' / 'a' / '0.png')
    error = mistake(benchmark_data, '--data-path', tmp_path / 'other', '--prepared', prepared, '--sizes', 32)
    assert error.startswith('--prepared ') and error.endswith('contain other images\n')


def test_dali_is_named_if_it_is_missing(images, tmp_path, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nvidia.dali', None)
    assert '--loaders dali needs DALI: pip install' in mistake(
        benchmark_data, '--data-path', images, '--sizes', 32, '--loaders', 'dali')


@pytest.mark.parametrize('argv', [[], ['--workers', 1], ['--compare', 'x.png']])
def test_images_that_cannot_be_read_get_one_line(argv, tmp_path, mistake):
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    for i in range(12):
        (tmp_path / 'data' / 'a' / f'{i}.jpg').write_text('no image')
    error = mistake(benchmark_data, '--data-path', 'data', '--sizes', 32, '--repeats', 1, *argv)
    assert error.startswith('--data-path data: ')
    assert 'not an image' in error if '--compare' in argv else '10 images in a row could not be read' in error

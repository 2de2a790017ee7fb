"""Run scripts/benchmark_data.py on small images."""
import json
import sys

import pytest
import torch
from PIL import Image

import benchmark_data
import prepare_data


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['benchmark_data.py', *map(str, argv)])
    benchmark_data.main()


def test_both_loaders_at_all_sizes_and_workers(monkeypatch, tmp_path, images):
    run(monkeypatch, '--data-path', images, '--batch-size', 2, '--sizes', 64, 32, '--workers', 0, 2, '--repeats', 2,
        '--repeated-aug', '--json', tmp_path / 'a.json')
    report = json.loads((tmp_path / 'a.json').read_text())
    records = report['records']
    assert [(r['size'], r['workers'], r['loader']) for r in records] == [
        (size, workers, loader) for size in (64, 32) for workers in (0, 2) for loader in ('reference', 'fast')]
    for r in records:
        assert 0 < r['images_per_s_min'] <= r['images_per_s'] <= r['images_per_s_max']
        assert r['images_per_s_per_core'] > 0 and r['repeats'] == 2
        assert (r['ratio'] == 1) == (r['loader'] == 'reference')
    assert {'torch', 'pillow', 'simplejpeg'} <= {name.lower() for name in report['versions']}


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
    assert capsys.readouterr().out.count('| 64 |') == 8


@pytest.mark.parametrize('loader', ['reference', 'fast', 'timm', 'torchvision', 'dali'])
def test_every_loader_gives_the_batches_of_training(loader, images):
    if loader == 'dali':
        pytest.importorskip('nvidia.dali', reason='pip install nvidia-dali-cuda120')
    args = benchmark_data.build_parser().parse_args(
        ['--data-path', str(images), '--batch-size', '20', '--loaders', loader, '--sizes', '64'])
    case, = benchmark_data.build_cases(args, torch.device('cpu'))
    batches = [batch[0] for batch in case.batches]
    assert len(batches) == 5
    for batch in batches:
        assert batch.shape == (20, 3, 64, 64)
        assert batch.dtype == (torch.float32 if loader == 'timm' else torch.uint8)
    pixels = torch.cat(batches).float()
    pixels = pixels * 55 + 120 if loader == 'timm' else pixels
    assert 60 < pixels.mean() < 190 and pixels.std() > 30 and not torch.equal(*pixels[:2])


@pytest.mark.parametrize('argv, words', [
    (['--data-path', 'nowhere'], 'nowhere'), (['--data-path', 'nowhere', '--json', 'nodir/x.json'], 'nodir/x.json')])
def test_mistakes_get_one_line(argv, words, mistake):
    assert words in mistake(benchmark_data, *argv)


def test_prepared_images_are_those_of_the_data(images, prepared, tmp_path, mistake):
    (tmp_path / 'other' / 'a').mkdir(parents=True)
    Image.new('RGB', (8, 8)).save(tmp_path / 'other' / 'a' / '0.png')
    assert '--prepared' in mistake(
        benchmark_data, '--data-path', tmp_path / 'other', '--prepared', prepared, '--sizes', 32)


def test_dali_is_named_if_it_is_missing(images, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nvidia.dali', None)
    assert 'pip install nvidia-dali' in mistake(
        benchmark_data, '--data-path', images, '--sizes', 32, '--loaders', 'dali')

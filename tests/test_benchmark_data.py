"""scripts/benchmark_data.py on images that it makes."""
import json
import sys

import pytest
from PIL import Image

import benchmark_data


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


def test_folders_of_classes_tars_and_nothing(monkeypatch, images, tmp_path):
    for path in (images, images / 'train'):
        run(monkeypatch, '--data-path', path, '--sizes', 32, '--repeats', 1, '--loaders', 'fast')
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, '--data-path', tmp_path / 'nowhere')
    assert status.value.code == 2

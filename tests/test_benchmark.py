"""scripts/benchmark.py: the reference form's arithmetic, cases and ratios, mistakes."""
import json
import sys

import pytest
import timm
import torch

import benchmark


@torch.no_grad()
def test_reference_form_is_the_same_arithmetic():
    model = timm.create_model('cmt_ti', img_size=64).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(benchmark.reference(model, images), model(images), rtol=1e-9, atol=1e-9)


def test_ratios_are_against_the_reference_of_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--cases', 'cmt_ti:infer:64:3:reference,eager,fused', 'cmt_ti:train:32:2:reference,eager',
        '--devices', 'cpu', '--repeats', '2', '--seconds', '0', '--json', str(tmp_path / 'b.json')])
    benchmark.main()
    records = json.loads((tmp_path / 'b.json').read_text())['records']
    assert [(r['mode'], r['size'], r['batch'], r['form']) for r in records] == [
        ('infer', 64, 3, 'reference'), ('infer', 64, 3, 'eager'), ('infer', 64, 3, 'fused'),
        ('train', 32, 2, 'reference'), ('train', 32, 2, 'eager')]
    for record in records:
        reference = records[0 if record['mode'] == 'infer' else 3]
        for ratio, seconds in (('ratio', 'seconds'), ('cpu_ratio', 'cpu_seconds')):
            a, b = reference[seconds], record[seconds]
            assert record[ratio] == pytest.approx((a[0] / b[0] + a[1] / b[1]) / 2)  # the median of two
        assert record['repeats'] == len(record['seconds']) == 2
        assert record['images_per_s_min'] <= record['images_per_s'] <= record['images_per_s_max']
    assert capsys.readouterr().out.count('| cmt_ti |') == 5


def test_combinations_of_flags_with_another_timm_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--models', 'cmt_ti', 'resnet18', '--forms', 'fused', 'eager', '--devices', 'cpu', '--batches',
        '1', '2', '--sizes', '32', '--dtypes', 'bfloat16', '--repeats', '1', '--seconds', '0'])
    benchmark.main()
    rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[3], row[0], row[4]) for row in rows] == [
        (batch, name, form) for batch in '12'
        for name, form in (('cmt_ti', 'fused'), ('cmt_ti', 'eager'), ('resnet18', 'eager'))]
    assert all(float(row[7].split()[0]) > 0 for row in rows)


@pytest.mark.parametrize('argv, words', [
    (['--models', 'cmt_q'], 'cmt_q'),
    (['--models', 'cmt_ti', '--sizes', '64', '48'], '--sizes'),
    (['--json', 'nodir/x.json'], 'nodir/x.json'),
    (['--modes', 'train', '--forms', 'fused'], 'nothing to measure'),
])
def test_mistakes_get_one_line_before_measurements(argv, words, mistake):
    assert words in mistake(benchmark, *argv)

"""scripts/benchmark.py: the reference form computes the same, and tables contain the measured figures."""
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
    torch.testing.assert_close(benchmark.Reference(model)(images), model(images), rtol=1e-9, atol=1e-9)


def test_ratios_are_against_the_reference_of_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--cases', 'cmt_ti:infer:64:3:reference,eager,fused', 'cmt_ti:train:32:2:reference,eager',
        '--devices', 'cpu', '--repeats', '2', '--seconds', '0', '--json', str(tmp_path / 'b.json'), '--markdown'])
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


PEER = 'swin_tiny_patch4_window7_224'


@pytest.mark.parametrize('argv, message', [
    (['--cases', 'cmt_q:infer:64:2:eager'], 'unknown model cmt_q'),
    (['--cases', 'cmt_ti:infer:64:0:eager'], "'cmt_ti:infer:64:0:eager' is not MODEL:MODE:SIZE:"),
    (['--models', 'cmt_q'], 'unknown model cmt_q'),
    (['--sizes', '64', '48'], 'size 48: sizes are multiples of 32'),
    (['--devices', 'cuda'], '--devices cuda: no CUDA device here'),
    (['--batches', '8', '0'], '--batches: 0 is not at least 1'),
    (['--json', 'nodir/x.json'], "'nodir/x.json' cannot be written (No such file or directory)"),
    (['--plot', 'nodir/x.png'], "'nodir/x.png' cannot be written (No such file or directory)"),
    (['--plot', 'x.foo'], '--plot x.foo: the name must end in one of .'),
    (['--plot', 'x.png', '--modes', 'train'], '--plot x.png: nothing to draw'),
    (['--plot', 'x.png', '--models', 'resnet18', '--forms', 'eager'], '--plot x.png: nothing to draw'),
    (['--modes', 'train', '--forms', 'fused'], 'nothing to measure'),
    (['--models', 'resnet18', '--forms', 'reference'], 'nothing to measure'),
])
def test_mistakes_get_one_line(argv, message, monkeypatch, mistake):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(timm, 'create_model', None)  # no model is built before
    assert message in mistake(benchmark, *argv)


@pytest.mark.parametrize('argv, message', [
    (['--models', PEER, '--forms', 'eager', '--sizes', '32'], f'{PEER} cannot infer at 32 px, batch 2: '),
    (['--models', 'cmt_ti.in22k'], 'cmt_ti.in22k cannot infer at its own size, batch 2: Invalid pretrained tag'),
    (['--models', 'cmt_ti', '--modes', 'train', '--batches', '1', '--sizes', '32'],  # BatchNorm of one value
     'cmt_ti cannot train at 32 px, batch 1: '),
])
def test_models_that_cannot_be_measured_get_one_line(argv, message, monkeypatch, mistake):
    monkeypatch.setattr(benchmark, 'peak_flops', None)  # nothing is measured before
    assert mistake(benchmark, '--devices', 'cpu', *argv).startswith(message)


def test_plot_of_all_combinations_names_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--models', 'cmt_ti', 'resnet18', '--forms', 'fused', 'eager', '--devices', 'cpu', '--batches',
        '1', '2', '--sizes', '32', '--repeats', '1', '--seconds', '0', '--plot', str(tmp_path / 'x.PNG')])
    benchmark.main()
    said = capsys.readouterr()
    assert '--plot leaves out resnet18: ' in said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert [(row[5], row[0], row[2]) for row in rows] == [
        (batch, name, form) for batch in '12'
        for name, form in (('cmt_ti', 'fused'), ('cmt_ti', 'eager'), ('resnet18', 'eager'))]
    assert (tmp_path / 'x.PNG').read_bytes().startswith(b'\x89PNG')

"""The form that speed is compared with computes the same, and the tables hold what was measured."""
import json
import sys

import pytest
import timm
import torch

import benchmark
import nano  # noqa: F401


@torch.no_grad()
def test_reference_form_is_the_same_arithmetic():
    model = timm.create_model('cmt_ti', img_size=64).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(images)
    reference = benchmark.Reference(model.float()).double().eval()
    assert (reference(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ratios_are_against_the_reference_of_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--models', 'cmt_ti', '--modes', 'infer', 'train', '--forms', 'reference', 'eager', 'fused',
        '--devices', 'cpu', '--batches', '2', '--sizes', '32', '--repeats', '2', '--seconds', '0',
        '--json', str(tmp_path / 'b.json'), '--markdown'])
    benchmark.main()
    result = json.loads((tmp_path / 'b.json').read_text())
    forms = [(r['mode'], r['form']) for r in result['records']]
    assert forms == [('infer', 'reference'), ('infer', 'eager'), ('infer', 'fused'), ('train', 'reference'),
                     ('train', 'eager')]
    for record in result['records']:
        reference = result['records'][0 if record['mode'] == 'infer' else 3]
        for ratio, seconds in (('ratio', 'seconds'), ('cpu_ratio', 'cpu_seconds')):
            a, b = reference[seconds], record[seconds]
            assert record[ratio] == pytest.approx((a[0] / b[0] + a[1] / b[1]) / 2)  # the median of two
        assert record['repeats'] == len(record['seconds']) == 2
        assert record['images_per_s_min'] <= record['images_per_s'] <= record['images_per_s_max']
    assert capsys.readouterr().out.count('| cmt_ti |') == 5


def test_cases_that_have_not_all_in_common(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--devices', 'cpu', '--repeats', '1', '--seconds', '0', '--json', str(tmp_path / 'b.json'),
        '--cases', 'cmt_ti:infer:64:3:reference,fused', 'cmt_ti:train:32:2:eager'])
    benchmark.main()
    found = [(r['model'], r['mode'], r['size'], r['batch'], r['form'])
             for r in json.loads((tmp_path / 'b.json').read_text())['records']]
    assert found == [('cmt_ti', 'infer', 64, 3, 'reference'), ('cmt_ti', 'infer', 64, 3, 'fused'),
                     ('cmt_ti', 'train', 32, 2, 'eager')]


@pytest.mark.parametrize('argv, message', [
    (['--cases', 'cmt_q:infer:64:2:eager'], 'error: unknown model cmt_q\n'),
    (['--models', 'cmt_q'], 'error: unknown model cmt_q\n'),
    (['--sizes', '64', '48'], 'error: size 48: sizes are multiples of 32\n'),
    (['--devices', 'cpu', '--forms', 'eager', 'kernels'], 'error: the form kernels is for --devices cuda\n'),
    (['--devices', 'cuda'], 'error: --devices cuda: no CUDA device here\n'),
])
def test_mistakes_get_one_line(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *argv])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message

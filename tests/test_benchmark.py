"""The form that speed is compared with computes the same, and tables hold what was measured; checkpoints are timed."""
import json
import sys

import pytest
import timm
import torch

import benchmark
import benchmark_checkpoint
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


def mistake(script, argv, tmp_path, monkeypatch, capsys):
    """The one line that a mistake gets."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [f'{script.__name__}.py', *argv])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        script.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and not captured.out and sorted(tmp_path.iterdir()) == before
    start = f'{script.__name__}.py: error: '
    assert captured.err.startswith(start) and captured.err.endswith('\n') and captured.err.count('\n') == 1
    return captured.err.removeprefix(start).strip()


PEER = 'swin_tiny_patch4_window7_224'


@pytest.mark.parametrize('argv, message', [
    (['--cases', 'cmt_q:infer:64:2:eager'], 'unknown model cmt_q'),
    (['--cases', 'cmt_ti:infer:64:0:eager'], "'cmt_ti:infer:64:0:eager' is not MODEL:MODE:SIZE:"),
    (['--models', 'cmt_q'], 'unknown model cmt_q'),
    (['--sizes', '64', '48'], 'size 48: sizes are multiples of 32'),
    (['--devices', 'cpu', '--forms', 'eager', 'kernels'], 'the form kernels is for --devices cuda'),
    (['--devices', 'cuda'], '--devices cuda: no CUDA device here'),
    (['--devices', 'foo'], "invalid choice: 'foo'"),
    (['--batches', '8', '0'], '--batches: 0 is not at least 1'),
    (['--batches', '-1'], '--batches: -1 is not at least 1'),
    (['--repeats', '0'], '--repeats: 0 is not at least 1'),
    (['--repeats', '-3'], '--repeats: -3 is not at least 1'),
    (['--seconds', 'nan'], '--seconds: nan is not at least 0'),
    (['--json', 'nodir/x.json'], "'nodir/x.json' cannot be written (No such file or directory)"),
    (['--json', '.'], "'.' cannot be written (Is a directory)"),
    (['--plot', 'nodir/x.png'], "'nodir/x.png' cannot be written (No such file or directory)"),
    (['--plot', 'x.foo'], '--plot x.foo: the name must end in one of .'),
    (['--plot', 'x.png', '--modes', 'train'], '--plot x.png: nothing to draw'),
    (['--plot', 'x.png', '--models', 'resnet18', '--forms', 'eager'], '--plot x.png: nothing to draw'),
    (['--modes', 'train', '--forms', 'fused'], 'nothing to measure'),
    (['--models', 'resnet18', '--forms', 'reference'], 'nothing to measure'),
])
def test_mistakes_get_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm, 'create_model', None)  # none is built
    assert message in mistake(benchmark, argv, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize('argv, message', [
    (['--models', PEER, '--forms', 'eager', '--sizes', '32'], f'{PEER} cannot infer at 32 px, batch 2: '),
    (['--models', 'cmt_ti.in22k'], 'cmt_ti.in22k cannot infer at its own size, batch 2: Invalid pretrained tag'),
    (['--models', 'cmt_ti', '--modes', 'train', '--batches', '1', '--sizes', '32'],  # BatchNorm of one value
     'cmt_ti cannot train at 32 px, batch 1: '),
])
def test_models_that_cannot_be_measured_get_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'peak_flops', None)  # nothing is measured before
    assert mistake(benchmark, ['--devices', 'cpu', *argv], tmp_path, monkeypatch, capsys).startswith(message)


def test_plot_names_what_it_leaves_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark.py', '--models', 'cmt_ti', 'resnet18', '--forms', 'eager', '--devices', 'cpu', '--batches', '1',
        '--sizes', '32', '--repeats', '1', '--seconds', '0', '--plot', str(tmp_path / 'x.PNG')])
    benchmark.main()
    assert '--plot leaves out resnet18: ' in capsys.readouterr().err
    assert (tmp_path / 'x.PNG').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('argv, message', [
    (['--model', 'cmt_q'], 'unknown --model cmt_q'),
    (['--runs', '0'], '--runs: 0 is not at least 1'),
    (['--runs', '-2'], '--runs: -2 is not at least 1'),
    (['--folder', 'nodir'], '--folder nodir: No such file or directory: give a folder'),
    (['--folder', 'file'], '--folder file: Not a directory: give a folder'),
    (['--folder', '/proc'], '--folder /proc: '),
    (['--device', 'cuda:99'], '--device cuda:99 cannot be used here'),
    (['--device', 'meta'], '--device meta cannot be used here'),
    (['--device', 'foo'], '--device foo cannot be used here'),
])
def test_mistakes_about_checkpoints_get_one_line(argv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(timm, 'create_model', None)
    assert message in mistake(benchmark_checkpoint, argv, tmp_path, monkeypatch, capsys)


def test_a_checkpoint_of_no_such_weights_gets_one_line(tmp_path, monkeypatch, capsys):
    line = mistake(benchmark_checkpoint, ['--model', 'cmt_ti.in22k'], tmp_path, monkeypatch, capsys)
    assert line.startswith('--model cmt_ti.in22k: Invalid pretrained tag')


def test_checkpoints_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'benchmark_checkpoint.py', '--model', 'cmt_nano', '--runs', '2', '--folder', str(tmp_path), '--device', 'cpu',
        '--json'])
    benchmark_checkpoint.main()
    found = json.loads(capsys.readouterr().out)
    assert len(found['held_up_s']) == len(found['on_disk_s']) == 2 and found['megabytes'] > 0
    assert not list(tmp_path.iterdir())

"""scripts/profile_flops.py: counts against the paper's, the tables, mistakes."""
import json
import subprocess
import sys

import pytest

import profile_flops


def test_every_variant_costs_what_the_paper_says(tmp_path):
    """Run the command from another folder; torchprofile warns about no operation."""
    result = subprocess.run(
        [sys.executable, profile_flops.__file__, '--json', '--per-stage'], cwd=tmp_path, capture_output=True, text=True,
        timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    found = {row['model']: row for row in json.loads(result.stdout)}
    expected = {
        'cmt_ti': (160, 0.644e9, 9_492_426), 'cmt_xs': (192, 1.558e9, 15_247_208),
        'cmt_s': (224, 4.055e9, 26_256_160), 'cmt_b': (256, 9.362e9, 45_715_076)}
    assert list(found) == list(expected)
    for name, (size, macs, params) in expected.items():
        assert (found[name]['input_size'], found[name]['params']) == (size, params)
        assert found[name]['macs'] == pytest.approx(macs, rel=0.01)
        parts = found[name]['parts']
        assert [part['part'] for part in parts] == ['stem', 'stage 1', 'stage 2', 'stage 3', 'stage 4', 'head']
        assert sum(part['macs'] for part in parts) == found[name]['macs']


def test_one_model_at_another_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['profile_flops.py', *'--model cmt_tiny --input-size 64 --per-stage'.split()])
    profile_flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ['cmt_ti', '64', '0.101', 'G', '9,419,346']
    assert [line.split()[0] for line in lines[4:]] == ['stem'] + ['stage'] * 4 + ['head']


@pytest.mark.parametrize('args, words', [
    (('--input-size', '100'), '--input-size 100: must be a multiple of 32'),
    (('--input-size', '0'), '--input-size 0: must be a multiple of 32'),
    (('--input-size', 'x'), "argument --input-size: invalid int value: 'x'"),
    (('--input-size', '32000000'), '--input-size 32000000: give a smaller one: '),
    (('--model', 'cmt_xl'), "argument --model: invalid choice: 'cmt_xl' (choose from "),
    (('--flops',), 'unrecognized arguments: --flops'),
])
def test_mistakes_get_one_line(mistake, args, words):
    assert mistake(profile_flops, *args).startswith(words)

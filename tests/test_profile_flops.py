"""scripts/profile_flops.py: counts against the paper's, tables, mistakes."""
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
    expected = [('cmt_ti', 160, 0.644e9, 9_492_426), ('cmt_xs', 192, 1.559e9, 15_247_208),
                ('cmt_s', 224, 4.055e9, 26_256_160), ('cmt_b', 256, 9.363e9, 45_715_076)]
    for row, (name, size, macs, params) in zip(json.loads(result.stdout), expected, strict=True):
        assert (row['model'], row['input_size'], row['params']) == (name, size, params)
        assert row['macs'] == pytest.approx(macs, abs=0.0005e9)  # README's digits
        assert [stage['name'] for stage in row['stages']] == ['stem', *(f'stage {i}' for i in (1, 2, 3, 4)), 'head']
        assert sum(stage['macs'] for stage in row['stages']) == row['macs']


def test_one_model_at_another_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['profile_flops.py', *'--model cmt_tiny --input-size 64 --per-stage'.split()])
    profile_flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ['cmt_ti', '64', '0.101', 'G', '9,419,346', '-', '-']  # the paper has no such size
    assert [line.split()[0] for line in lines[4:]] == ['stem'] + ['stage'] * 4 + ['head']


@pytest.mark.parametrize('flag, value', [('--input-size', '100'), ('--input-size', '0'), ('--model', 'cmt_xl')])
def test_mistakes_get_one_line(mistake, flag, value):
    message = mistake(profile_flops, flag, value)
    assert flag in message and value in message

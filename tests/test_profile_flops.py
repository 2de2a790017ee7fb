"""scripts/profile_flops.py: counts against the paper's, and tables."""
import subprocess
import sys

import pytest

import profile_flops


def test_every_variant_costs_what_the_paper_says(tmp_path):
    """Run the command from another folder; torchprofile warns about no operation."""
    result = subprocess.run(
        [sys.executable, profile_flops.__file__, '--per-stage'], cwd=tmp_path, capture_output=True, text=True,
        timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:5] for row in rows[1:5]] == [  # README's digits
        ['cmt_ti', '160', '0.644', 'G', '9,492,426'], ['cmt_xs', '192', '1.559', 'G', '15,247,208'],
        ['cmt_s', '224', '4.055', 'G', '26,256,160'], ['cmt_b', '256', '9.363', 'G', '45,715,076']]
    for i in range(5, len(rows), 8):  # an empty line, the title, six stages
        assert [row[0] for row in rows[i + 2:i + 8]] == ['stem', *['stage'] * 4, 'head']
        shares = [[float(word[:-1]) for word in row if word.endswith('%')] for row in rows[i + 2:i + 8]]
        assert [sum(column) for column in zip(*shares)] == pytest.approx([100, 100], abs=0.3)


def test_one_model_at_another_size(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['profile_flops.py', *'--model cmt_tiny --input-size 64 --per-stage'.split()])
    profile_flops.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ['cmt_ti', '64', '0.101', 'G', '9,419,346', '-', '-']  # the paper has no such size
    assert [line.split()[0] for line in lines[4:]] == ['stem'] + ['stage'] * 4 + ['head']

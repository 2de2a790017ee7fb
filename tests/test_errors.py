"""A bug keeps its traceback and ends all ranks with status 1; a mistake is one line, never an empty one."""
import importlib
import os
import re
from pathlib import Path

import pytest

import errors
import nano
import processes


def bug(place, kind, rank=0):
    """Return a function for nano.start(before=): `place` raises that kind of exception, on `rank` alone."""
    def before(this):
        name, function = place.split('.')
        module = importlib.import_module(name)
        original = getattr(module, function)

        def injected(*args, **kwargs):
            if this == rank:
                raise kind
            return original(*args, **kwargs)
        setattr(module, function, injected)
    return before


@pytest.mark.parametrize('place, kind, more', [
    ('datasets.open_split', OSError, []), ('transforms.create_transform', TypeError, []),
    ('train.read_weights', ValueError, ['--finetune', 'RUN/checkpoint_best.pth']), ('cmt.Stem', RuntimeError, []),
    ('train.build_scheduler', AssertionError, []),
    ('train.load_optimizer', OSError, ['--resume', 'RUN/checkpoint_last.pth', '--output-dir', 'new'])])
def test_a_bug_in_the_set_up_shows_its_line(flags, whole, tmp_path, monkeypatch, place, kind, more):
    monkeypatch.chdir(tmp_path)
    output, more = tmp_path / 'out.txt', [flag.replace('RUN', str(whole)) for flag in more]
    nano.finish(nano.start([*flags, *more], output=output, before=bug(place, kind)), status=1)
    text = output.read_text()
    assert re.search(rf'Traceback .*File ".*{Path(__file__).name}", line \d+, in injected.*\n{kind.__name__}', text,
                     re.DOTALL), text


def test_a_bug_of_rank_1_ends_both_ranks(flags, tmp_path):
    output = tmp_path / 'out.txt'
    nano.finish(nano.start(flags, ranks=2, output=output, before=bug('train.build_optimizer', OSError, rank=1)), 1)
    text = output.read_text()
    assert text.count('Traceback') == 1 and '\nOSError' in text and ', in injected' in text


@pytest.mark.parametrize('error, line', [
    (errors.UsageError('--lr'), '--lr'), (FileNotFoundError(2, 'No such file', '/x/y'), '/x/y'),
    (errors.UsageError(), 'UsageError'), (ValueError('--lr'), None), (OSError('disk'), None),
    (OSError(28, 'full'), None)])
def test_only_checks_and_named_files_are_mistakes(error, line):
    found = errors.mistake(error)
    assert found is None if line is None else line in found
    with pytest.raises(errors.UsageError if line else type(error), match=line), processes.usage_errors():
        raise error


def test_a_file_that_cannot_be_listed_is_one_line(flags, tmp_path, monkeypatch, capsys):
    import train

    def denied(path, *args, scandir=os.scandir):
        if Path(path) == tmp_path / 'train':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path, *args)

    (tmp_path / 'train').mkdir()
    monkeypatch.setattr(os, 'scandir', denied)
    assert train.cli([*map(str, flags), '--data-path', str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert printed.count('\n') == 1 and str(tmp_path / 'train') in printed

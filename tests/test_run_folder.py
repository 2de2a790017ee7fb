"""The folder of a run: overwriting, locks, kept and best checkpoints."""
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image

import convert_checkpoint
import errors
import export
import nano
import options
import predict
import run


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != '.lock'}


def test_config_yaml_has_the_settings_in_force(flags, whole):
    text = (whole / 'config.yaml').read_text()
    assert text.startswith(f'# train.py {" ".join(flags)}')
    assert re.search(f'torch {torch.__version__.split("+")[0]}.* timm {timm.__version__}', text.splitlines()[1])
    again = vars(options.parse_args(['--config', str(whole / 'config.yaml')]))
    saved = nano.read(whole)['args']
    again.pop('config'), saved.pop('config')
    assert again == saved
    assert yaml.safe_load(text)['model-ema-decay'] == 0.9


def test_a_config_holds_for_any_folder(flags, images, whole, tmp_path, monkeypatch):
    """Paths are absolute; one that is missing names the config and the flag, unless the command line replaces it."""
    monkeypatch.chdir(images.parent)
    (tmp_path / 'map').write_text('class_0\nclass_1\nclass_2\n')
    paths = {'data-path': images.name, 'class-map': os.path.relpath(tmp_path / 'map'),
             'finetune': os.path.relpath(whole / 'checkpoint_best.pth')}
    more = [text for name, value in paths.items() for text in (f'--{name}', value)]
    nano.train([*flags, *more, '--epochs', 1, '--output-dir', tmp_path / 'run'])
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert {name: config[name] for name in paths} == {name: os.path.abspath(value) for name, value in paths.items()}
    assert 'output-dir' not in config and nano.read(tmp_path / 'run')['args']['data_path'] == str(images)

    monkeypatch.chdir(tmp_path)
    again = ['--config', 'run/config.yaml', '--epochs', 2]
    for name in paths:
        Path('run/config.yaml').write_text(yaml.safe_dump({**config, name: '/gone'}))
        with pytest.raises(errors.UsageError, match=f'/gone.*run/config.yaml.*--{name}'):
            nano.train([*again, '--output-dir', tmp_path / 'other'])
    # A run that resumes does not read its initial weights again.
    Path('run/config.yaml').write_text(yaml.safe_dump({**config, 'data-path': '/gone', 'finetune': '/gone'}))
    nano.train([*again, '--resume', 'auto', '--data-path', images])


# what a run leaves of another

def test_an_old_run_stays_until_images_are_read(flags, tmp_path):
    run, output = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    nano.train(run)
    before = contents(tmp_path / 'run')
    nano.finish(nano.start(
        [*run, '--overwrite'], output=output,
        before=lambda rank: setattr(Path, 'read_bytes', lambda path: b'not an image')), status=1)
    assert output.read_text().count('train.py: error: ') == 1 and 'Traceback' not in output.read_text()
    assert contents(tmp_path / 'run') == before


def test_overwrite_clears_the_folder(flags, tmp_path):
    run = [*flags, '--batch-size', 48, '--output-dir', tmp_path]
    nano.train([*run, '--keep-checkpoints', 2])
    assert sorted(path.name[11:15] for path in tmp_path.glob('checkpoint_0*')) == ['0001', '0002']
    assert nano.same(nano.read(tmp_path, 'checkpoint_0002.pth'), nano.read(tmp_path))
    nano.train([*run, '--epochs', 1, '--overwrite'])
    assert nano.epochs(tmp_path) == [0]
    assert not list(tmp_path.glob('checkpoint_0*')) and not (tmp_path / 'checkpoint_prev.pth').exists()


def test_two_runs_do_not_write_to_one_folder(flags, whole, tmp_path):
    run, output = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto'], tmp_path / 'out.txt'
    frozen = nano.start(run, before=lambda rank: nano.at_step(8, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    nano.wait_for(lambda: os.waitid(os.P_PID, frozen[0].pid, os.WSTOPPED | os.WNOHANG))
    before = contents(tmp_path / 'run')
    try:
        nano.finish(nano.start(run, output=output), status=2)
        text = output.read_text()
        assert text.count('train.py: error: ') == 1 and f'{tmp_path}/run/.lock' in text and 'Traceback' not in text
        assert contents(tmp_path / 'run') == before
    finally:
        os.kill(frozen[0].pid, signal.SIGCONT)
    nano.finish(frozen)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_ranks_that_do_not_share_the_folder_end(flags, whole, tmp_path):
    """Rank 1 alone has a checkpoint: one line, and no rank waits for the other."""
    (tmp_path / '0').mkdir()
    shutil.copytree(whole, tmp_path / '1' / 'run')
    output = tmp_path / 'out.txt'
    run = [*flags[2:], '--resume', 'auto', '--output-dir', 'run']  # Without --model cmt_nano, rank 0 builds cmt_s.
    nano.finish(nano.start(run, ranks=2, output=output, before=lambda rank: os.chdir(tmp_path / str(rank))), status=2)
    errors = re.findall('train.py: error: (.*)', output.read_text())
    assert len(errors) == 1 and '--output-dir' in errors[0]


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(flags, tmp_path):
    run, output = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto'], tmp_path / 'out.txt'
    nano.train([*run, '--epochs', 1])
    before = nano.read(tmp_path / 'run')
    nano.finish(nano.start(
        run, output=output,
        before=lambda rank: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))), status=1)
    text = output.read_text()
    assert len(re.findall(f'^train.py: error: .*{tmp_path}/run', text, re.M)) == 1 and 'Traceback' not in text
    assert nano.same(nano.read(tmp_path / 'run'), before)


def test_copies_that_a_user_made_stay(flags, tmp_path):
    run = [*flags, '--output-dir', tmp_path, '--keep-checkpoints', 1]
    nano.train([*run, '--epochs', 1])
    copies = [tmp_path / f'checkpoint_{name}.pth' for name in ('2024_final', '0_mine', '2b', '99999x', 'mine', '7')]
    for copy in copies:
        copy.write_text('mine')
    nano.train([*run, '--epochs', 2, '--resume', 'auto'])
    assert not (tmp_path / 'checkpoint_0000.pth').exists() and (tmp_path / 'checkpoint_0001.pth').exists()
    nano.train([*run, '--epochs', 1, '--overwrite'])
    assert all(copy.read_text() == 'mine' for copy in copies)
    assert (tmp_path / 'checkpoint_0000.pth').exists() and not (tmp_path / 'checkpoint_0001.pth').exists()


# the best checkpoints

@pytest.mark.parametrize('prefix', ['', 'ema_'])
def test_best_checkpoints_hold_the_scored_weights_alone(flags, images, tmp_path, prefix, capsys, monkeypatch):
    """Every command reads them without a flag, from any folder, with the figures of the log."""
    run = [*flags, '--data-path', images, '--epochs', 4, '--input-size', 64, '--model-ema-decay', 0.5, '--amp-dtype',
           'bfloat16']
    nano.train([*run, '--output-dir', tmp_path / 'run'])
    path = tmp_path / 'run' / f'checkpoint_{prefix}best.pth'
    best, key = nano.read(path.parent, path.name), f'{prefix}test_acc1'
    assert set(best) == {'format', 'model_args', 'model', 'args', 'classes', 'training_images', 'epoch', 'acc1'}
    line = max(nano.log(path.parent), key=lambda line: line[key])
    assert (best['acc1'], best['epoch']) == (line[key], line['epoch'])
    assert best['acc1'] == nano.read(path.parent)['best'][f'{prefix}acc1']
    size = sum(value.numel() * value.element_size() for value in best['model'].values())
    assert path.stat().st_size < 1.1 * size + 200_000  # The model of this test is smaller than its names.

    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    capsys.readouterr()
    nano.train(['--eval', '--resume', path])
    printed = capsys.readouterr().out
    expected = [f'{line[f"{prefix}test_{name}"]:.3f}' for name in ('acc1', 'acc5', 'loss')]
    assert re.search(r'\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)', printed).groups() == tuple(expected)
    with pytest.raises(errors.UsageError, match='--finetune'):
        nano.train([*run, '--resume', path, '--output-dir', tmp_path / 'more'])
    assert not (tmp_path / 'more').exists()


@pytest.fixture
def run_folder(flags, tmp_path, monkeypatch):
    """A run of an epoch, with the given scores in its best checkpoints; None removes one of them."""
    nano.train([*flags, '--epochs', 1, '--input-size', 64, '--output-dir', tmp_path / 'run'])
    Image.new('RGB', (64, 64)).save(tmp_path / 'x.png')
    monkeypatch.chdir(tmp_path)

    def rate(acc1, ema_acc1):
        for name, score in (('checkpoint_best.pth', acc1), ('checkpoint_ema_best.pth', ema_acc1)):
            state = nano.read('run')
            content = {key: state[key] for key in run.DESCRIPTION if key in state} | {
                'model': state['model_ema' if 'ema' in name else 'model'], 'acc1': score}
            Path('run', name).unlink(missing_ok=True)
            if score is not None:
                torch.save(content, Path('run', name))
    return rate


@pytest.mark.parametrize('scores, name', [
    ((50., 60.), 'checkpoint_ema_best.pth'), ((50., 50.), 'checkpoint_best.pth'),
    ((None, None), 'checkpoint_last.pth')])
def test_a_runs_folder_is_its_best_checkpoint(run_folder, flags, capsys, caplog, scores, name):
    """For each command that reads weights, which says the name; --finetune takes no EMA."""
    run_folder(*scores)
    own = 'checkpoint_last.pth' if scores[0] is None else 'checkpoint_best.pth'
    file, more = f'run/{name}', [*flags, '--epochs', 1, '--input-size', 64, '--output-dir', 'new', '--overwrite']

    def outputs(path, finetuned):
        capsys.readouterr()
        for expected, command in (
                (name, lambda: predict.main([path, 'x.png', '--json'])),
                (name, lambda: convert_checkpoint.main([path, 'out.safetensors', '--overwrite'])),
                (name, lambda: export.main([path, 'out.ts', '--overwrite'])),
                (name, lambda: nano.train(['--eval', '--resume', path, '--device', 'cpu', '--num-workers', 0])),
                (own, lambda: nano.train([*more, '--finetune', finetuned]))):
            caplog.clear()
            command()
            assert path == file or expected in caplog.text + capsys.readouterr().out
        return [Path('out.safetensors').read_bytes(), nano.read('new')['model']]
    assert nano.same(outputs('run', 'run'), outputs(file, f'run/{own}'))
    assert yaml.safe_load(Path('new/config.yaml').read_text())['finetune'] == os.path.abspath(f'run/{own}')
    nano.train([*more, '--finetune', 'run'])
    assert yaml.safe_load(Path('new/config.yaml').read_text())['finetune'] == os.path.abspath('run')


def test_folders_without_a_run_are_named(mistake, tmp_path):
    (tmp_path / 'photos').mkdir()
    Image.new('RGB', (64, 64)).save(tmp_path / 'photos' / 'x.png')
    assert 'photos' in mistake(predict, 'photos', 'photos')
    (tmp_path / 'photos' / 'checkpoint_best.pth').write_text('damaged')
    assert 'photos/checkpoint_best.pth' in mistake(predict, 'photos', 'photos')


def assert_best_has_files(folder):
    best = nano.read(folder)['best']
    for prefix in ('', 'ema_'):
        assert nano.read(folder, f'checkpoint_{prefix}best.pth')['epoch'] == best[f'{prefix}epoch']


def test_a_resumed_run_takes_its_best_checkpoints_elsewhere(flags, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'a')
    run = [*flags, '--epochs', 4, '--lr', 1e-9, '--warmup-lr', 0, '--resume', tmp_path / 'a' / 'checkpoint_last.pth']
    nano.train([*run, '--output-dir', tmp_path / 'b'])
    assert_best_has_files(tmp_path / 'b')


def test_a_run_goes_back_to_a_kept_checkpoint(flags, tmp_path):
    run = [*flags, '--output-dir', tmp_path, '--keep-checkpoints', 9]
    nano.train(run)
    state = nano.read(tmp_path, 'checkpoint_0001.pth')
    torch.save({**state, 'best': {'acc1': 100., 'epoch': 7}}, tmp_path / 'checkpoint_0001.pth')
    run += ['--resume', tmp_path / 'checkpoint_0001.pth']
    with nano.at_step(0, nano.die), pytest.raises(nano.Killed):
        nano.train(run)
    assert nano.epochs(tmp_path) == [0, 1] and not (tmp_path / 'checkpoint_0002.pth').exists()
    nano.train(run)
    assert_best_has_files(tmp_path)

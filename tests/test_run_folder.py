"""The folder of a run: overwriting, locks, kept and best checkpoints, names of any bytes."""
import os
import re
import resource
import shutil
import signal
import threading
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
    os.mkfifo('pipe')
    threading.Thread(target=lambda: Path('pipe').write_text(yaml.safe_dump({**config, 'epochs': 1}))).start()
    nano.train(['--config', 'pipe'])
    for name in paths:
        Path('run/config.yaml').write_text(yaml.safe_dump({**config, name: '/gone'}))
        with pytest.raises(errors.UsageError, match=f'/gone.*run/config.yaml.*--{name}'):
            nano.train([*again, '--output-dir', tmp_path / 'other'])
        resumes = name == 'finetune'  # A run that resumes does not read its initial weights again.
        nano.train([*again, '--resume', 'auto', *([] if resumes else [f'--{name}', os.path.abspath(
            images if name == 'data-path' else 'map')])])


# what a run leaves of another

@pytest.mark.parametrize('fault, status', [
    ((Path, 'read_bytes', lambda path: b'not an image'), 1), ((os, 'fsync', nano.full_disk), 2),
    (None, 2)], ids=['images', 'disk', 'compiler'])
def test_an_old_run_stays_until_nothing_can_fail(flags, tmp_path, monkeypatch, fault, status):
    run, output = [*flags, '--epochs', 1, '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    nano.train(run)
    before = contents(tmp_path / 'run')
    if not fault:
        run.append('--compile')
        monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
        monkeypatch.setenv('PATH', '')
    nano.finish(nano.start(
        [*run, '--overwrite'], output=output, before=lambda rank: fault and setattr(*fault)), status)
    assert output.read_text().count('train.py: error: ') == 1 and 'Traceback' not in output.read_text()
    assert contents(tmp_path / 'run') == before


@pytest.mark.parametrize('name', ['config.yaml', 'log.txt', 'checkpoint_best.pth', 'checkpoint_0001.pth'])
@pytest.mark.parametrize('flag', [['--overwrite'], ['--resume', 'auto']])
def test_a_folder_in_place_of_a_file_costs_nothing(flags, whole, tmp_path, name, flag):
    shutil.copytree(whole, tmp_path / 'run')
    (tmp_path / 'run' / name).unlink(missing_ok=True)
    (tmp_path / 'run' / name).mkdir()
    before = sorted(os.listdir(tmp_path / 'run'))
    with pytest.raises(errors.UsageError, match=name):
        nano.train([*flags, '--epochs', 4, '--output-dir', tmp_path / 'run', *flag])
    assert sorted(os.listdir(tmp_path / 'run')) == before


def test_the_compiler_check_can_be_interrupted(flags, whole, tmp_path, monkeypatch):
    """A finished run needs no compiler."""
    run, output = [*flags, '--compile', '--output-dir', tmp_path / 'run'], tmp_path / 'out.txt'
    shutil.copytree(whole, tmp_path / 'run')
    monkeypatch.setattr(torch, 'compile', lambda *_, **__: lambda *_: signal.raise_signal(signal.SIGINT))
    nano.finish(nano.start([*run, '--overwrite'], output=output), status=130)
    assert contents(tmp_path / 'run') == contents(whole)
    nano.finish(nano.start([*run, '--resume', 'auto'], output=output))


@pytest.mark.parametrize('resumes', [False, True])
def test_overwrite_clears_the_folder(flags, whole, tmp_path, resumes):
    """Also for a run that resumes another folder's checkpoint."""
    run = [*flags, '--batch-size', 48, '--output-dir', tmp_path]
    nano.train([*run, '--keep-checkpoints', 2])
    assert sorted(path.name[11:15] for path in tmp_path.glob('checkpoint_0*')) == ['0001', '0002']
    assert nano.same(nano.read(tmp_path, 'checkpoint_0002.pth'), nano.read(tmp_path))
    more = ['--epochs', 4, '--resume', whole / 'checkpoint_last.pth'] if resumes else ['--epochs', 1]
    nano.train([*run, *more, '--overwrite'])
    assert nano.epochs(tmp_path) == [3 if resumes else 0]
    assert not list(tmp_path.glob('checkpoint_0*'))
    assert (tmp_path / 'checkpoint_prev.pth').exists() == resumes  # the checkpoint that was resumed


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
    nano.finish(nano.start(run))


@pytest.mark.parametrize('is_damaged', [False, True])
def test_ranks_that_do_not_share_the_folder_end(flags, whole, tmp_path, is_damaged):
    """Rank 1 alone has a checkpoint, a good or a damaged one: one line, and no rank waits for the other."""
    (tmp_path / '0').mkdir()
    shutil.copytree(whole, tmp_path / '1' / 'run')
    for path in (tmp_path / '1' / 'run').glob('*.pth') if is_damaged else ():
        path.write_bytes(b'damaged')
    output = tmp_path / 'out.txt'
    run = [*flags[2:], '--resume', 'auto', '--output-dir', 'run']  # Without --model cmt_nano, rank 0 builds cmt_s.
    nano.finish(nano.start(run, ranks=2, output=output, before=lambda rank: os.chdir(tmp_path / str(rank))), status=2)
    errors = re.findall('train.py: error: (.*)', output.read_text())
    assert len(errors) == 1 and ('run: ' if is_damaged else '--output-dir') in errors[0]


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


def test_a_bug_while_writing_stops_the_run(flags, tmp_path):
    output = tmp_path / 'out.txt'

    def save(*args):
        raise KeyError('injected')
    nano.finish(nano.start([*flags, '--output-dir', tmp_path / 'run'], output=output,
                           before=lambda rank: setattr(torch, 'save', save)), status=1)
    assert re.search('^train.py: error: .*injected', output.read_text(), re.M) and nano.epochs(tmp_path / 'run') == [0]


def test_a_checkpoint_without_permission_is_not_a_damaged_one(flags, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / 'run')
    before = contents(tmp_path / 'run')

    def load(path, *args, load=torch.load, **kwargs):
        if str(path).endswith('checkpoint_last.pth'):
            raise PermissionError(13, 'Permission denied', str(path))
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, 'load', load)
    with pytest.raises(errors.UsageError, match='checkpoint_last.pth'):
        nano.train([*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto'])
    assert contents(tmp_path / 'run') == before


def test_copies_that_a_user_made_stay(flags, tmp_path):
    run, output = [*flags, '--output-dir', tmp_path, '--keep-checkpoints', 1], tmp_path / 'out.txt'
    nano.train([*run, '--epochs', 1])
    copies = [tmp_path / f'checkpoint_{name}.pth' for name in ('2024_final', '0_mine', '2b', '99999x', 'mine', '7')]
    for copy in copies:
        copy.write_text('mine')
    nano.train([*run, '--epochs', 2, '--resume', 'auto'])
    assert not (tmp_path / 'checkpoint_0000.pth').exists() and (tmp_path / 'checkpoint_0001.pth').exists()
    nano.train([*run, '--epochs', 1, '--overwrite'])
    assert all(copy.read_text() == 'mine' for copy in copies)
    assert (tmp_path / 'checkpoint_0000.pth').exists() and not (tmp_path / 'checkpoint_0001.pth').exists()
    shutil.copytree(tmp_path, tmp_path / 'copies', ignore=lambda *_: {'checkpoint_last.pth', 'log.txt', 'copies'})
    nano.finish(nano.start([*flags, '--output-dir', tmp_path / 'copies'], output=output), status=2)
    assert '--overwrite' in output.read_text()


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
    ((50., 60.), 'checkpoint_ema_best.pth'), ((60., 50.), 'checkpoint_best.pth'),
    ((None, 0.), 'checkpoint_ema_best.pth'), ((50., 50.), 'checkpoint_best.pth'),
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
    return best


def test_a_resumed_run_takes_its_best_checkpoints_elsewhere(flags, whole, tmp_path):
    shutil.copytree(whole, tmp_path / 'a')
    run = [*flags, '--epochs', 4, '--lr', 1e-9, '--warmup-lr', 0, '--resume', tmp_path / 'a' / 'checkpoint_last.pth']
    nano.train([*run, '--output-dir', tmp_path / 'b'])
    assert_best_has_files(tmp_path / 'b')
    (tmp_path / 'a' / 'checkpoint_best.pth').unlink()
    nano.train([*run, '--output-dir', tmp_path / 'c'])
    assert assert_best_has_files(tmp_path / 'c')['epoch'] == 3
    nano.train([*run, '--output-dir', tmp_path / 'd', '--epochs', 3])  # nothing left to do
    assert nano.same(nano.read(tmp_path / 'd')['model'], nano.read(whole)['model'])


@pytest.mark.parametrize('change', ['rewound', 'missing', 'newer'])
def test_a_best_score_has_its_checkpoint(flags, tmp_path, change):
    """A run that is killed between its best and its last checkpoint leaves a newer best one."""
    run = [*flags, '--output-dir', tmp_path, '--keep-checkpoints', 9]
    nano.train(run)
    if change != 'rewound':
        path = tmp_path / 'checkpoint_best.pth'
        best = nano.read(tmp_path, path.name)
        path.unlink()
        if change == 'newer':
            torch.save({**best, 'epoch': 3, 'acc1': 100.}, path)
        nano.train([*run, '--epochs', 4, '--resume', 'auto'])
    else:
        state = nano.read(tmp_path, 'checkpoint_0001.pth')
        torch.save({**state, 'best': {'acc1': 100., 'epoch': 7}}, tmp_path / 'checkpoint_0001.pth')
        run += ['--resume', tmp_path / 'checkpoint_0001.pth']
        with nano.at_step(0, nano.die), pytest.raises(nano.Killed):
            nano.train(run)
        assert nano.epochs(tmp_path) == [0, 1] and not (tmp_path / 'checkpoint_0002.pth').exists()
        nano.train(run)
    assert_best_has_files(tmp_path)


# names of files

def test_names_of_any_bytes_and_lines_go_through_a_run(flags, images, tmp_path):
    folder, data = os.fsdecode(bytes(tmp_path) + b'/a\xff\nb'), os.fsdecode(bytes(tmp_path) + b'/d\xff\n\xe2\x80\xa8')
    shutil.copytree(images, data)
    bad = os.fsdecode(b'bad\xff\nname.png')
    printed = r'/d\udcff\n\u2028/{}/class_0/bad\udcff\nname.png'
    Path(data, 'train', 'class_0', bad).write_text('no image')
    output, run = tmp_path / 'out.txt', [*flags, '--no-repeated-aug', '--data-path', data]
    nano.finish(nano.start([*run, '--output-dir', folder], output=output))
    assert printed.format('train') in output.read_text() and 'Logging error' not in output.read_text()
    again = ['--config', f'{folder}/config.yaml', '--resume', 'auto', '--epochs', 4]
    nano.finish(nano.start(again, output=output))
    assert Path(folder, 'config.yaml').read_text().startswith('# train.py --config ')
    assert nano.epochs(folder) == [0, 1, 2, 3]

    Path(data, 'val', 'class_0', bad).write_text('no image')
    for workers in (0, 2):
        output.unlink()
        nano.finish(nano.start([*again, '--epochs', 5, '--num-workers', workers], output=output), status=1)
        assert printed.format('val') in re.search('^train.py: error: (.*)', output.read_text(), re.M)[1]

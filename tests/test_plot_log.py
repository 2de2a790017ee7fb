"""scripts/plot_log.py: what is read from a log, what is drawn of it, and how mistakes are answered."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import plot_log

SCRIPT = Path(__file__).parent.parent / 'scripts' / 'plot_log.py'


def record(epoch, tested=True):
    line = {'train_loss': 2.0 / (epoch + 1), 'train_lr': 1e-3, 'epoch': epoch, 'n_parameters': 9492426,
            'train_images_per_s': 50.0 + epoch, 'epoch_seconds': 28.0, 'memory_mb': 900.0}
    if tested:
        line |= {'test_loss': 1.0 / (epoch + 1), 'test_acc1': 90.0 + epoch, 'test_acc5': 99.0,
                 'ema_test_loss': 1.5 / (epoch + 1), 'ema_test_acc1': 80.0 + epoch, 'ema_test_acc5': 98.0}
    return line


def write_run(folder, records, tail=''):
    folder.mkdir(exist_ok=True)
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in records) + tail)
    return folder


def lines_of(axes):
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle()) for line in axes.lines]


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        plot_log.main([str(argument) for argument in argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('plot_log.py: error: ') and error.count('\n') == 1
    return error


def test_every_value_of_the_log_is_drawn(tmp_path):
    # validation in epochs 0, 2 and 3 only, as test_freq 2 and a last epoch of 3 leave it
    records = [record(0), record(1, tested=False), record(2), record(3)]
    figure = plot_log.draw({'run': plot_log.read_log(write_run(tmp_path / 'run', records) / 'log.txt')})
    loss, accuracy, rate, speed = figure.axes
    assert lines_of(loss) == [([0, 1, 2, 3], [2.0, 1.0, 2 / 3, 0.5], ':'),
                              ([0, 2, 3], [1.0, 1 / 3, 0.25], '-'),
                              ([0, 2, 3], [1.5, 0.5, 0.375], '--')]
    assert lines_of(accuracy) == [([0, 2, 3], [90.0, 92.0, 93.0], '-'), ([0, 2, 3], [80.0, 82.0, 83.0], '--')]
    assert lines_of(rate) == [([0, 1, 2, 3], [1e-3] * 4, '-')]
    assert lines_of(speed) == [([0, 1, 2, 3], [50.0, 51.0, 52.0, 53.0], '-')]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ['train', 'test', 'test, EMA']
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['run, best 93.00 %, EMA 83.00 %']


def test_several_runs_have_a_colour_and_a_name_each(tmp_path):
    runs = [write_run(tmp_path / name, [record(0), record(1)]) for name in ('plain', 'mixup')]
    names = plot_log.run_names([runs[0], runs[1] / 'log.txt'])
    assert names == ['plain', 'mixup']
    figure = plot_log.draw({name: plot_log.read_log(run / 'log.txt') for name, run in zip(names, runs)})
    assert [line.get_color() for line in figure.axes[1].lines] == ['C0', 'C0', 'C1', 'C1']
    assert [text.get_text().split(',')[0] for text in figure.legends[0].get_texts()] == names
    # one name twice says nothing: the paths do
    for parent in 'ab':
        (tmp_path / parent / 'run').mkdir(parents=True)
    assert plot_log.run_names([tmp_path / 'a' / 'run', tmp_path / 'b' / 'run']) == \
        [str(tmp_path / 'a' / 'run'), str(tmp_path / 'b' / 'run')]


def test_a_dot_in_a_name_makes_no_file_of_a_folder(tmp_path):
    names = [f'lr_0.001_seed_{seed}' for seed in range(3)]
    runs = [write_run(tmp_path / name, [record(0)]) for name in names]
    assert plot_log.run_names(runs) == names
    # a run that is watched may have no log yet
    (runs[0] / 'log.txt').unlink()
    assert plot_log.run_names([runs[0] / 'log.txt', *runs[1:]]) == names


@pytest.mark.parametrize('length, columns', [(6, 3), (31, 1), (150, 1)])
def test_names_stay_inside_the_picture(length, columns):
    figure = plot_log.draw({f'{i}_' + 'w' * (length - 2): [record(0), record(1)] for i in range(4)})
    figure.canvas.draw()
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns
    assert all(axes.bbox.height > 200 for axes in figure.axes)


def test_the_ending_may_be_in_capitals(tmp_path):
    plot_log.main([str(write_run(tmp_path / 'run', [record(0)])), '-o', str(tmp_path / 'curves.PNG')])
    assert (tmp_path / 'curves.PNG').read_bytes().startswith(b'\x89PNG')


def test_a_run_without_validation_or_with_a_nan_is_drawn(tmp_path):
    records = [record(0, tested=False), record(1, tested=False) | {'train_loss': float('nan')}]
    write_run(tmp_path, records)
    loss, accuracy, *_ = plot_log.draw({'run': plot_log.read_log(tmp_path / 'log.txt')}).axes
    assert lines_of(loss) == [([0], [2.0], ':')]
    assert not accuracy.lines and accuracy.texts[0].get_text() == 'not in the log'


def test_a_resumed_run_shows_an_epoch_once(tmp_path):
    write_run(tmp_path, [record(0), record(1), record(1) | {'train_loss': 7.0}, record(2)])
    assert [(line['epoch'], line['train_loss']) for line in plot_log.read_log(tmp_path / 'log.txt')] == \
        [(0, 2.0), (1, 7.0), (2, 2 / 3)]


def test_command_line(tmp_path):
    write_run(tmp_path / 'run', [record(0), record(1)])
    environment = {name: value for name, value in os.environ.items() if name not in ('DISPLAY', 'MPLBACKEND')}
    done = subprocess.run([sys.executable, str(SCRIPT), 'run', '-o', 'out.png'], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'out.png: 2 epochs\n'), done.stderr
    with Image.open(tmp_path / 'out.png') as picture:
        picture.load()
        assert picture.format == 'PNG' and len(picture.convert('RGB').getcolors(1 << 24)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.png', 'run']


def test_the_picture_lies_beside_the_log(tmp_path):
    plot_log.main([str(write_run(tmp_path / 'run', [record(0)]) / 'log.txt')])
    assert (tmp_path / 'run' / 'curves.png').is_file()


def test_a_line_that_is_cut_short(tmp_path, capsys):
    run = write_run(tmp_path / 'run', [record(0)], tail='{"train_loss": 0.')
    plot_log.main([str(run)])
    assert capsys.readouterr().out.endswith('1 epochs\n')


@pytest.mark.parametrize('content, message', [
    (None, 'there is no'),
    ('', 'is empty'),
    ('{"train_loss": 1', 'is empty'),
    ('{"epoch": 0}\n{"epoch": \n{"epoch": 2}\n', 'line 2 is no JSON'),
    ('{"epoch": 0}\n{"epoch": \n', 'line 2 is no JSON'),
    ('{"epoch": 0}\nEpoch 1', 'line 2 is no JSON'),
    ('{"epoch": 0}\n\n{"train_loss": 1.0}\n', 'line 3 is no record'),
    ('[1, 2]\n', 'line 1 is no record'),
])
def test_bad_logs_get_one_line(tmp_path, capsys, content, message):
    log = tmp_path / 'log.txt'
    if content is not None:
        log.write_text(content)
    line = error_of(capsys, log)
    assert message in line and str(log) in line
    assert not (tmp_path / 'curves.png').exists()


def test_bad_arguments_get_one_line(tmp_path, capsys):
    run, folder = write_run(tmp_path / 'run', [record(0)]), tmp_path / 'folder.png'
    folder.mkdir()
    assert 'must end in one of' in error_of(capsys, run, '-o', tmp_path / 'curves.xyz')
    assert 'there is no folder' in error_of(capsys, run, '-o', tmp_path / 'nowhere' / 'curves.png')
    assert 'is a folder' in error_of(capsys, run, '-o', folder)
    for seconds in ('0', '-1', 'nan', 'inf'):
        assert 'above 0' in error_of(capsys, run, '--watch', seconds)
    assert 'required: RUN' in error_of(capsys)
    assert 'there is no' in error_of(capsys, tmp_path / 'nowhere', '--watch', '1')
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['folder.png', 'log.txt', 'run']


def test_watch_follows_a_run_from_before_its_first_epoch(tmp_path, monkeypatch, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    steps = iter([
        lambda: write_run(run, [record(0)], tail='{"epoch": 1, "train_'),  # read in the middle of a write
        lambda: write_run(run, [record(0), record(1)]),
        lambda: None,                                                      # nothing new, nothing drawn
        lambda: write_run(run, [record(0), record(1), record(2)]),
        lambda: (run / 'log.txt').write_text('oops\n'),
    ])
    waits = []
    monkeypatch.setattr(plot_log.time, 'sleep', lambda seconds: (waits.append(seconds), next(steps)()))
    assert 'line 1 is no JSON' in error_of(capsys, run, '--watch', '0.5')
    assert waits == [0.5] * 5
    assert (run / 'curves.png').is_file()


def test_watch_draws_what_is_new_and_nothing_else(tmp_path, monkeypatch):
    run = write_run(tmp_path / 'run', [record(0)])
    drawn = []
    steps = iter([
        lambda: None,
        lambda: write_run(run, [record(0), record(1)]),
        lambda: (run / 'log.txt').unlink(),  # the run is started over
    ])

    def sleep(seconds):
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(plot_log.time, 'sleep', sleep)
    monkeypatch.setattr(plot_log, 'draw', lambda runs: drawn.append([len(lines) for lines in runs.values()]))
    monkeypatch.setattr(plot_log, 'save', lambda figure, path: None)
    with pytest.raises(KeyboardInterrupt):
        plot_log.main([str(run), '--watch'])
    assert drawn == [[1], [2]]

"""scripts/plot_log.py: reading logs, drawing, watching, mistakes."""
import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

import plot_log

LINE = '{"epoch": 0}\n'


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
    names = ['lr_0.001', 'lr_0.002']  # a dot in a name makes no file of a folder
    runs = [write_run(tmp_path / name, [record(0), record(1)]) for name in names]
    assert plot_log.run_names([runs[0], runs[1] / 'log.txt']) == names
    figure = plot_log.draw({name: plot_log.read_log(run / 'log.txt') for name, run in zip(names, runs)})
    assert [line.get_color() for line in figure.axes[1].lines] == ['C0', 'C0', 'C1', 'C1']
    assert [text.get_text().split(',')[0] for text in figure.legends[0].get_texts()] == names
    same = [tmp_path / parent / 'run' / 'log.txt' for parent in 'ab']
    assert plot_log.run_names(same) == list(map(str, same))


@pytest.mark.parametrize('length, columns', [(6, 3), (150, 1)])
def test_names_stay_inside_the_picture(length, columns):
    figure = plot_log.draw({f'{i}_' + 'w' * (length - 2): [record(0), record(1)] for i in range(4)})
    figure.draw_without_rendering()
    legend = figure.legends[0]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert len({round(text.get_window_extent().x0) for text in legend.get_texts()}) == columns


def test_validation_may_be_missing_a_loss_nan_and_an_epoch_repeated(tmp_path):
    records = [record(0, tested=False), record(1, tested=False), record(1, tested=False) | {'train_loss': 7.0},
               record(2, tested=False) | {'train_loss': float('nan')}]
    write_run(tmp_path, records, tail='{"train_loss": 0.')  # the last line is being written
    loss, accuracy, *_ = plot_log.draw({'run': plot_log.read_log(tmp_path / 'log.txt')}).axes
    assert lines_of(loss) == [([0, 1], [2.0, 7.0], ':')]
    assert not accuracy.lines and accuracy.texts[0].get_text() == 'not in the log'


def test_command_line(tmp_path):
    """A real picture, without a display and without torch."""
    write_run(tmp_path / 'run', [record(0), record(1)])
    environment = {name: value for name, value in os.environ.items() if name not in ('DISPLAY', 'MPLBACKEND')}
    code = f"""
import runpy, sys
sys.modules['torch'] = None  # an import of torch fails
sys.argv = ['plot_log.py', 'run', '-o', 'out.PNG']
sys.path.insert(0, {os.path.dirname(plot_log.__file__)!r})
runpy.run_path({plot_log.__file__!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'out.PNG: 2 epochs\n'), done.stderr
    with Image.open(tmp_path / 'out.PNG') as picture:
        picture.load()
        assert picture.format == 'PNG' and len(picture.convert('RGB').getcolors(1 << 24)) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.PNG', 'run']


@pytest.mark.parametrize('content, line, message', [
    (None, 'run', 'there is no run/log.txt'),
    ('', 'run', 'run/log.txt is empty'),
    ('{"train_loss": 1', 'run', 'run/log.txt is empty'),
    ('{"epoch": 0}\n{"epoch": \n{"epoch": 2}\n', 'run', 'run/log.txt, line 2 is no JSON'),
    ('{"epoch": 0}\nEpoch 1', 'run', 'run/log.txt, line 2 is no JSON'),
    ('{"epoch": 0}\n\n{"train_loss": 1.0}\n', 'run', 'run/log.txt, line 3 is no record'),
    ('[1, 2]\n', 'run', 'run/log.txt, line 1 is no record'),
    (LINE, '', 'required: RUN'),
    (LINE, 'run -o curves.xyz', 'must end in one of'),
    (LINE, 'run -o nowhere/curves.png', "'nowhere/curves.png' cannot be written"),
    (LINE, 'run --watch 0', '0 is not above 0 and at most 86400'),
    (LINE, 'run --watch 86401', '86401 is not above 0'),
    (LINE, 'nowhere --watch 1', 'there is no'),
])
def test_bad_logs_and_arguments_get_one_line(tmp_path, mistake, content, line, message):
    (tmp_path / 'run').mkdir()
    if content is not None:
        (tmp_path / 'run' / 'log.txt').write_text(content)
    assert message in mistake(plot_log, *line.split())


def test_watch_draws_what_is_new_and_nothing_else(tmp_path, monkeypatch, capsys):
    run = tmp_path / 'run'
    run.mkdir()
    steps = iter([
        lambda: write_run(run, [record(0)], tail='{"epoch": 1, "train_'),  # read in the middle of a write
        lambda: write_run(run, [record(0), record(1)]),
        lambda: None,
        lambda: (run / 'log.txt').unlink(),  # the run is started over
        lambda: write_run(run, [record(0)]),
        lambda: (run / 'log.txt').write_text('oops\n'),
    ])
    waits, drawn, draw = [], [], plot_log.draw
    monkeypatch.setattr(plot_log.time, 'sleep', lambda seconds: (waits.append(seconds), next(steps)()))
    monkeypatch.setattr(
        plot_log, 'draw', lambda runs: (drawn.append([len(lines) for lines in runs.values()]), draw(runs))[1])
    with pytest.raises(SystemExit):
        plot_log.main([str(run), '--watch', '0.5'])
    assert 'line 1 is no JSON' in capsys.readouterr().err
    assert waits == [0.5] * 6 and drawn == [[1], [2], [1]]
    assert (run / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_ctrl_c_ends_a_watch(tmp_path):
    run = write_run(tmp_path / 'run', [record(0)])
    watch = subprocess.Popen([sys.executable, plot_log.__file__, str(run), '--watch', '60'], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert watch.stdout.readline() == f'{run / "curves.png"}: 1 epochs\n'
    watch.send_signal(signal.SIGINT)
    assert watch.communicate(timeout=60)[1] == '' and watch.returncode == 0

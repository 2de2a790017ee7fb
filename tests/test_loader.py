"""Loading batches: workers, signals, shared memory, unreadable images."""
import multiprocessing
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import nano

# signals

def signal_group(process):
    """End a run and its workers from outside, as `timeout`, scancel and the end of a container do.

    A worker obeys the run alone, so it must look at the sender.
    """
    subprocess.run(['kill', '-s', 'TERM', '--', str(-os.getpgid(process))], start_new_session=True, check=True)


def test_a_signal_to_the_whole_group_spares_workers(flags, whole, tmp_path):
    def signal_all():
        workers = multiprocessing.active_children()
        signal_group(0)
        time.sleep(0.5)
        assert len(workers) == 4 and all(worker.is_alive() for worker in workers), workers

    run = [*flags, '--output-dir', tmp_path / 'run', '--resume', 'auto', '--num-workers', 2]
    nano.finish(nano.start(run, output=tmp_path / 'out.txt', before=lambda rank: nano.at_step(8, signal_all)))
    assert nano.read(tmp_path / 'run')['step'] == 3
    nano.train(run)
    nano.assert_same_run(whole, tmp_path / 'run')


def test_a_killed_worker_is_one_line(flags, tmp_path):
    output = tmp_path / 'out.txt'
    run = [*flags, '--num-workers', 2, '--output-dir', tmp_path / 'run', '--resume', 'auto']
    nano.finish(nano.start(run, output=output, before=lambda rank: nano.at_step(
        8, lambda: multiprocessing.active_children()[0].kill())), status=1)
    assert len(re.findall('^train.py: error: .*--num-workers', output.read_text(), re.M)) == 1
    assert 'Traceback' not in output.read_text()
    nano.train(run)
    assert nano.epochs(tmp_path / 'run') == [0, 1, 2]


# images

def test_an_unreadable_validation_image_is_named(flags, images, whole, tmp_path):
    (tmp_path / 'train').symlink_to(images / 'train')
    (tmp_path / 'val' / 'class_1').mkdir(parents=True)
    (tmp_path / 'val' / 'class_1' / 'bad.png').write_bytes(b'no image')
    run = [*flags, '--data-path', tmp_path, '--epochs', 1]
    evaluation = ['--eval', '--resume', whole / 'checkpoint_last.pth']
    for workers, more, status in ((0, [], 1), (2, [], 1), (2, evaluation, 2)):
        output = tmp_path / f'{workers}{status}.txt'
        nano.finish(nano.start([*run, '--num-workers', workers, *more], output=output), status=status)
        text = output.read_text()
        assert re.search(r'^train\.py: error: .*val/class_1/bad\.png', text, re.M) and 'Traceback' not in text


@pytest.mark.parametrize('pause, workers', [(0.02, 0), (0.02, 1), (0., 1)])
def test_a_run_that_waits_for_data_says_so(flags, monkeypatch, capsys, pause, workers):
    monkeypatch.setattr(Path, 'read_bytes', lambda path, read=Path.read_bytes: time.sleep(pause) or read(path))
    with nano.on_forward(lambda model, _: time.sleep(0 if pause else 0.05)):
        nano.train([*flags, '--epochs', 1, '--num-workers', workers, '--no-repeated-aug'])
    assert ('--num-workers' in capsys.readouterr().out) == (pause > 0)

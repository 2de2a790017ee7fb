"""Run scripts/prepare_data.py on all sources that --data-path takes; kill it, fill its disk, damage its images."""
import io
import os
import random
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import members, pack, publish_val

import nano
import prepare_data
from datasets import build_dataset
from errors import TrainingFault, UsageError
from sources import open_image, open_split


def run(*argv) -> None:
    prepare_data.main(prepare_data.build_parser().parse_args([str(arg) for arg in argv]))


def fails(file, status, *argv) -> str:
    """The error of a run in a process of its own, which ends with `status`."""
    nano.finish(nano.start([str(arg) for arg in argv], command='prepare_data', output=file), status)
    line = file.read_text().splitlines()[-1]
    file.unlink()
    return line.removeprefix('prepare_data.py: error: ')


def tars(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob('*.tar')}


def listed(images) -> list[tuple[str, str]]:
    """File and class of each sample."""
    return [(name.rpartition('/')[2], images.classes[label]) for name, label in images.samples]


def photograph(width, height, seed=0, mode='RGB') -> Image.Image:
    """A smooth picture."""
    pixels = np.random.default_rng(seed).integers(64, 192, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """60 images in three classes, some in folders below: JPEG, PNG and WebP, short sides of 20 to 90 pixels."""
    root = tmp_path_factory.mktemp('photographs')
    for i in range(60):
        name = f'{i:02d}.{("jpg", "png", "webp")[i % 4 % 3]}'
        file = root / 'train' / 'abc'[i % 3] / ('below' if i % 7 == 0 else '.') / name
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(120, 20 + i % 8 * 10, i).save(file)
    for i in range(6):
        file = root / 'val' / 'abc'[i % 3] / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        photograph(120, 90, i).save(file)
    return root


def pack_parts(images, src, prefix='') -> Path:
    for part in 'train', 'val':
        pack(src / f'{part}.tar', images / part, prefix=prefix)
    return src


def pack_classes(images, src) -> Path:
    for part in 'train', 'val':
        (src / part).mkdir()
        for label in os.listdir(images / part):
            pack(src / part / f'{label}.tar', images / part / label)
    return src


def pack_shards(images, src) -> Path:
    """Shards that each count their keys from 0."""
    for part in 'train', 'val':
        files = sorted((images / part).rglob('*.*'))
        for shard in range(3):
            members(src / f'{part}-{shard}.tar', *(entry for i, file in enumerate(files[shard::3]) for entry in (
                (f'{i:03d}{file.suffix}', file.read_bytes()), (f'{i:03d}.seg.png', b'mask'),
                (f'{i:03d}.cls', file.parent.name[-1].encode()))))
    return src


def publish(images, src, monkeypatch) -> Path:
    """ImageNet's own tars."""
    publish_val(images, src, monkeypatch)
    (src / 'classes').mkdir()
    for label in os.listdir(images / 'train'):
        pack(src / 'classes' / f'{label}.tar', images / 'train' / label)
    pack(src / 'ILSVRC2012_img_train.tar', src / 'classes')
    return src


FORMS = {
    'folder': lambda images, src, _: images,
    'folder of tars': lambda images, src, _: pack_parts(images, src),
    'train.tar': lambda images, src, _: pack_parts(images, src, './data/') / 'train.tar',
    'one tar': lambda images, src, _: pack(src / 'everything.tar', images, prefix='data/'),
    'folders of class tars': lambda images, src, _: pack_classes(images, src),
    'shards': lambda images, src, _: pack_shards(images, src),
    'published': publish}


@pytest.mark.parametrize('form', FORMS)
def test_samples_classes_and_order_are_those_of_the_source(images, form, tmp_path, monkeypatch):
    (tmp_path / 'src').mkdir()
    src = FORMS[form](images, tmp_path / 'src', monkeypatch)
    run(src, tmp_path / 'dst', '--images-per-tar', 7, '--num-workers', 0)
    for part, count in (('train', 100), ('val', 27)):
        source, made = (open_split(str(path), part, None, None) for path in (src, tmp_path / 'dst'))
        assert len(made) == count and made.classes == source.classes and made.targets == source.targets
        assert listed(made) == listed(source)
        assert [made.read(i) for i in range(count)] == [source.read(i) for i in range(count)]  # all are small
    assert len(tars(tmp_path / 'dst')) > 15 and not (tmp_path / 'dst.incomplete').exists()


def test_a_folder_of_classes_keeps_its_split(photographs, tmp_path):
    run(photographs / 'train', tmp_path / 'dst', '--short-side', 1000)
    for is_train in True, False:
        source, made = (build_dataset('IMNET', is_train, str(path), 32, val_split=0.2)
                        for path in (photographs / 'train', tmp_path / 'dst'))
        assert [made.read(i) for i in range(len(made))] == [source.read(i) for i in range(len(source))]


def test_large_training_images_get_the_short_side(photographs, tmp_path):
    run(photographs, tmp_path / 'dst', '--short-side', 50, '--quality', 95)
    source, made = (open_split(str(path), 'train', None, None) for path in (photographs, tmp_path / 'dst'))
    resized = 0
    for i in range(len(source)):
        before, after = source[i][0], made[i][0]
        if min(before.size) <= 50:
            assert made.read(i) == source.read(i)
        else:
            resized += 1
            assert min(after.size) == 50 and after.width == round(120 * 50 / before.height)
            image = Image.open(io.BytesIO(made.read(i)))
            assert image.format == 'JPEG' and image.layer[0][1:3] == (2, 2)  # 4:2:0
            expected = before.resize(after.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(expected, int) - np.asarray(after)).mean() < 2
    assert resized > 20
    source, made = (open_split(str(path), 'val', None, None) for path in (photographs, tmp_path / 'dst'))
    assert [made.read(i) for i in range(6)] == [source.read(i) for i in range(6)]
    run(photographs, tmp_path / 'both', '--short-side', 50, '--resize-val')
    made = open_split(str(tmp_path / 'both'), 'val', None, None)
    assert {min(made[i][0].size) for i in range(6)} == {50}


def test_images_of_any_kind_are_prepared_as_the_loaders_read_them(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown turned by 90 degrees
    grey16 = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
    kinds = {'exif.jpg': (photograph(80, 60), dict(exif=rotated)), 'cmyk.jpg': (photograph(80, 60, mode='CMYK'), {}),
             'grey.jpg': (photograph(80, 60, mode='L'), {}), 'palette.gif': (photograph(80, 60, mode='P'), {}),
             'alpha.png': (photograph(80, 60, mode='RGBA'), {}), 'grey16.png': (grey16, {}),
             'png.JPEG': (photograph(80, 60), dict(format='PNG')), 'one.png': (photograph(80, 60, mode='1'), {}),
             'long.jpg': (photograph(900, 31), {}), 'talk.jpg': (photograph(80, 60), dict(comment=b'words')),
             'odd name\n%41.jpg': (photograph(80, 60), {})}
    for name, (image, options) in kinds.items():
        (tmp_path / 'src' / name[0]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'src' / name[0] / name, **options)
    run(tmp_path / 'src', tmp_path / 'dst', '--short-side', 30, '--quality', 100)
    made = open_split(str(tmp_path / 'dst'), 'train', None, None)
    assert {name for name, _ in listed(made)} == set(kinds)
    for i, (name, label) in enumerate(listed(made)):
        before, after = open_image((tmp_path / 'src' / label / name).read_bytes()), made[i][0]
        assert after.size == ((871, 30) if name == 'long.jpg' else (40, 30))
        image = Image.open(io.BytesIO(made.read(i)))
        assert 0x0112 not in image.getexif() and 'comment' not in image.info
        difference = np.asarray(before.resize(after.size, Image.Resampling.LANCZOS), int) - np.asarray(after)
        assert np.abs(difference).mean() < (8 if name in ('one.png', 'palette.gif') else 3), name


@pytest.fixture(scope='module')
def undisturbed(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'dst'
    run(photographs, folder, '--short-side', 40, '--images-per-tar', 3, '--num-workers', 0)
    return tars(folder)


@pytest.mark.parametrize('workers', [1, 4])
def test_any_number_of_processes_writes_the_same_bytes(photographs, undisturbed, workers, tmp_path):
    run(photographs, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 3, '--num-workers', workers)
    assert tars(tmp_path / 'dst') == undisturbed and len(undisturbed) == 22


def test_killed_five_times_the_bytes_are_the_same(photographs, undisturbed, tmp_path, monkeypatch):
    once = prepare_data.Encoder.encode
    monkeypatch.setattr(prepare_data.Encoder, 'encode', lambda *args: time.sleep(0.04) or once(*args))
    argv = [photographs, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 3, '--num-workers', 2]
    rng, folder, done = random.Random(5), tmp_path / 'dst.incomplete', [0]

    def written():
        return {file.name: file.stat().st_mtime_ns for file in folder.glob('train*.tar')}

    for kill in range(5):
        process, = nano.start(argv, command='prepare_data', output=tmp_path / f'{kill}.txt')
        until = done[-1] + rng.choice((1, 2))
        while len(written()) < until:
            assert process.exitcode is None
            time.sleep(0.005)
        time.sleep(0.1 * rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        done.append(len(written()))
    before = written()
    assert done == sorted(done) and 5 <= done[-1] < 22 and not (tmp_path / 'dst').exists()
    nano.finish(nano.start(argv, command='prepare_data', output=tmp_path / 'last.txt'))
    assert tars(tmp_path / 'dst') == undisturbed
    assert all(os.stat(tmp_path / 'dst' / name).st_mtime_ns == time_ns for name, time_ns in before.items())
    assert not [file for file in os.listdir(tmp_path / 'dst') if 'tmp' in file or 'lock' in file]


def test_training_reads_what_was_prepared(images, flags, whole, tmp_path):
    run(images, tmp_path / 'dst', '--images-per-tar', 9)
    nano.finish(nano.start([*flags, '--data-path', tmp_path / 'dst', '--output-dir', tmp_path / 'out']))
    nano.assert_same_run(whole, tmp_path / 'out')


# what goes wrong

@pytest.fixture
def damaged(photographs, tmp_path):
    """A copy of the photographs with a truncated image and one that is none."""
    shutil.copytree(photographs, tmp_path / 'src')
    for name in 'a/03.webp', 'b/04.jpg':
        file, = (tmp_path / 'src' / 'train').glob(f'{name[0]}/**/{name[2:4]}.*')
        data = file.read_bytes()
        file.write_bytes(data[:len(data) // 2] if name[0] == 'b' else b'no image')
    return tmp_path / 'src'


@pytest.mark.parametrize('workers', [0, 2])
def test_damaged_images_stop_the_work_unless_they_may_be_left_out(damaged, workers, tmp_path, capsys):
    argv = damaged, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 4, '--num-workers', workers
    assert re.fullmatch(
        r'cannot decode .*/train/a/03.\w+ \(not an image; --skip-damaged leaves such images out\): mend the image; the '
        'same command then resumes', fails(tmp_path / 'log', 2, *argv))
    assert not (tmp_path / 'dst').exists()
    run(*argv, '--skip-damaged')
    left_out = dict(line.split('\t') for line in (tmp_path / 'dst' / 'left_out.txt').read_text().splitlines())
    assert [Path(name).stem for name in left_out] == ['03', '04'] and 'truncated' in list(left_out.values())[1]
    assert capsys.readouterr().out.count('\nleft out: ') == 2
    made = open_split(str(tmp_path / 'dst'), 'train', None, None)
    source = open_split(str(damaged), 'train', None, None)
    assert listed(made) == [(name, label) for name, label in listed(source) if name[:2] not in ('03', '04')]


def test_an_image_that_is_mended_after_a_kill_is_not_left_out(damaged, photographs, tmp_path, monkeypatch):
    argv = damaged, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 4, '--num-workers', 0
    once = prepare_data.write

    def stop(*args):
        once(*args)
        if args[0].name == 'left_out.txt':
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, 'write', stop)
    with pytest.raises(KeyboardInterrupt):
        run(*argv, '--skip-damaged')
    monkeypatch.undo()
    assert (tmp_path / 'dst.incomplete' / 'left_out.txt').read_text().count('\n') == 1
    shutil.copytree(photographs, damaged, dirs_exist_ok=True)
    with pytest.raises(UsageError, match='leaves out 1 images .left_out.txt.: give --skip-damaged again, or remove it'):
        run(*argv)
    run(*argv, '--skip-damaged')
    assert len(open_split(str(tmp_path / 'dst'), 'train', None, None)) == 60
    assert not (tmp_path / 'dst' / 'left_out.txt').read_text()


def test_a_class_of_damaged_images_alone_is_named(damaged, tmp_path):
    for file in (damaged / 'train' / 'c').rglob('*.*'):
        file.write_bytes(b'')
    with pytest.raises(UsageError, match='^no image of class c can be decoded: remove the class from the source, and '):
        run(damaged, tmp_path / 'dst', '--skip-damaged')
    assert not (tmp_path / 'dst').exists()
    shutil.rmtree(tmp_path / 'dst.incomplete')
    for file in (damaged / 'train').rglob('*.*'):
        file.write_bytes(b'')
    with pytest.raises(UsageError, match='^no image of train can be decoded$'):
        run(damaged, tmp_path / 'dst', '--skip-damaged')


def test_the_number_of_classes_of_shards_stays(photographs, tmp_path):
    files = sorted((photographs / 'train').rglob('*.*'))[:4]
    members(tmp_path / 'train.tar', *(entry for i, file in enumerate(files) for entry in (
        (f'/abs/{i}{file.suffix}', file.read_bytes() if i < 3 else b'no image'), (f'/abs/{i}.cls', b'%d' % (2 * i)))))
    with pytest.raises(UsageError, match='^no image of class 6 can be decoded'):
        run(tmp_path / 'train.tar', tmp_path / 'dst', '--skip-damaged')
    shutil.rmtree(tmp_path / 'dst.incomplete')
    (tmp_path / '.train.tar.index.npz').unlink()
    members(tmp_path / 'train.tar', *(entry for i, file in enumerate(files) for entry in (
        (f'/abs/{i}{file.suffix}', file.read_bytes()), (f'/abs/{i}.cls', b'%d' % (2 * i)))))
    run(tmp_path / 'train.tar', tmp_path / 'dst')
    assert open_split(str(tmp_path / 'dst'), 'train', None, None).targets == [0, 2, 4, 6]


def test_what_nobody_would_read_is_named(photographs, tmp_path, capsys):
    shutil.copytree(photographs, tmp_path / 'src')
    (tmp_path / 'src' / 'test' / 'a').mkdir(parents=True)
    run(tmp_path / 'src', tmp_path / 'dst')
    assert 'not read: test\n' in capsys.readouterr().out
    (tmp_path / 'src' / 'train').rename(tmp_path / 'src' / 'training')
    with pytest.raises(UsageError, match='src has test, training beside val, which would not be read: name the parts'):
        run(tmp_path / 'src', tmp_path / 'other')


def test_a_destination_inside_of_a_linked_part_is_refused(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / 'store')
    (tmp_path / 'src' / 'train').mkdir(parents=True)
    for label in 'abc':
        (tmp_path / 'src' / 'train' / label).symlink_to(tmp_path / 'store' / 'train' / label)
    with pytest.raises(UsageError, match='dst is inside of .*src/train/b, and would be taken for a part of it'):
        run(tmp_path / 'src', tmp_path / 'store' / 'train' / 'b' / 'dst')


def test_killed_the_loader_processes_end(photographs, tmp_path, monkeypatch):
    """Their results fill a pipe, which nobody empties any more."""
    monkeypatch.setattr(prepare_data.Encoder, '__getitem__', lambda self, index: bytes(2 ** 20))
    process, = nano.start([photographs, tmp_path / 'dst', '--images-per-tar', 5, '--num-workers', 2],
                          command='prepare_data')
    while not (children := Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()) or not list(
            (tmp_path / 'dst.incomplete').glob('*.tar')):
        time.sleep(0.01)
    process.kill()
    process.join()
    until = time.monotonic() + 20
    while any(Path(f'/proc/{child}').exists() for child in children):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_source_that_stops_answering_is_no_damage(photographs, tmp_path, monkeypatch):
    def fail(self, index):
        raise OSError(116, 'Stale file handle')

    monkeypatch.setattr('sources.EncodedImages.read', fail)
    with pytest.raises(UsageError, match=r'^cannot read .*jpg \(Stale file handle\)'):
        run(photographs, tmp_path / 'dst', '--skip-damaged', '--num-workers', 0)


def test_a_full_disk_is_one_line_and_the_work_goes_on(photographs, undisturbed, tmp_path, monkeypatch):
    argv = photographs, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 3, '--num-workers', 0
    added = []

    def add(*args):
        added.append(1)
        return nano.full_disk() if len(added) == 11 else tarfile.TarFile.addfile(*args)

    monkeypatch.setattr(prepare_data, 'add', lambda tar, name, data: add(tar, *header(name, data)))
    with pytest.raises(TrainingFault, match=r'^cannot write to .*dst.incomplete \(No space left on device\): make room '
                                            'or mend the disk; the same command then resumes$'):
        run(*argv)
    assert len(tars(tmp_path / 'dst.incomplete')) == 3 and not (tmp_path / 'dst').exists()
    run(*argv)
    assert tars(tmp_path / 'dst') == undisturbed


def header(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, io.BytesIO(data)


def test_what_the_disk_lost_is_noticed(photographs, tmp_path, monkeypatch):
    argv = photographs, tmp_path / 'dst', '--short-side', 40, '--images-per-tar', 3, '--num-workers', 0
    monkeypatch.setattr(prepare_data, 'verify_part', nano.full_disk)
    with pytest.raises(TrainingFault):
        run(*argv)
    monkeypatch.undo()
    tar = tmp_path / 'dst.incomplete' / 'train-000003.tar'
    data = tar.read_bytes()
    zeros = data[:512] + bytes(100) + data[612:]
    for damage, words in ((data[:len(data) // 2], 'copy it again'), (zeros, 'not an image')):
        tar.write_bytes(damage)
        with pytest.raises(TrainingFault, match=f'{words}.*, as written by this command: check the disk, remove that'):
            run(*argv)
    tar.write_bytes((tmp_path / 'dst.incomplete' / 'train-000004.tar').read_bytes())
    with pytest.raises(TrainingFault, match='the images of train in .*dst.incomplete are not those of the source'):
        run(*argv)
    tar.unlink()
    run(*argv)
    assert (tmp_path / 'dst' / 'train-000003.tar').read_bytes() == data


def test_mistakes_are_one_line_and_nothing_is_written(photographs, tmp_path, monkeypatch, capsys):
    def names():
        return sorted(tmp_path.rglob('*'))

    src = tmp_path / 'src'
    shutil.copytree(photographs, src)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'taken.incomplete').mkdir()
    (tmp_path / 'taken.incomplete' / 'thesis.txt').touch()
    (tmp_path / 'torn.incomplete').mkdir()
    (tmp_path / 'torn.incomplete' / 'prepared.json').write_text('[1]')
    (tmp_path / 'twice').mkdir()
    for name in 'x', 'y':
        members(tmp_path / 'twice' / f'train-{name}.tar', ('a/0.jpg', b''), ('b/0.jpg', b''))
    (tmp_path / 'cut').mkdir()
    (tmp_path / 'cut' / 'train.tar').write_bytes(b'no tar')
    before = names()
    for argv, words in (
            ((tmp_path / 'nowhere', 'dst'), 'no folder .*nowhere'),
            ((tmp_path / 'empty', 'dst'), 'no class folders in'),
            ((tmp_path / 'x.tar', 'dst'), 'no folder .*x.tar'), ((tmp_path / 'cut', 'dst'), 'train.tar is no tar'),
            ((src, 'empty'), 'empty exists: remove it, or give a folder that does not exist yet'),
            ((src, src), 'src exists'), ((src, 'file'), 'file exists'), ((src, 'link'), 'link exists'),
            ((src, src / 'dst'), 'dst is inside of .*src, and would be taken for a part of it'),
            ((src, src / 'train' / '..' / 'dst'), 'dst is inside of .*src'),
            ((src, 'torn'), 'prepared.json is damaged: remove .*torn.incomplete to start over'),
            ((src, 'taken'), 'taken.incomplete is in the way: this command has not made it'),
            ((tmp_path / 'twice', 'dst'), 'train-x.tar/a/0.jpg and .*train-y.tar/a/0.jpg would have one name')):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=words) as stop:
            run(*argv)
        assert '\n' not in str(stop.value)
        assert [file for file in names() if not file.name.endswith('.npz')] == before
    with pytest.raises(TrainingFault, match='cannot write to .*dst.incomplete .Not a directory.: make room or mend'):
        run(src, tmp_path / 'file' / 'dst')
    for argv, words in (
            ([], 'SRC, DST'), ([src, 'dst', '--short-side', '0'], '--short-side: 0 is not at least 1'),
            ([src, 'dst', '--quality', '101'], '--quality: 101 is not at least 1 and at most 100'),
            ([src, 'dst', '--num-workers', '-1'], '--num-workers: -1 is not at least 0'),
            (['~nobody-here/x', 'dst'], 'there is no such home folder')):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.count('\n') == 1 and re.search(words, line)


def test_other_settings_do_not_mix(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'verify_part', nano.full_disk)
    with pytest.raises(TrainingFault):
        run(photographs, tmp_path / 'dst')
    for changed in (['--short-side', 40], ['--quality', 80], ['--resize-val'], ['--images-per-tar', 3]):
        with pytest.raises(UsageError, match='was begun with other settings .*: remove it to start over'):
            run(photographs, tmp_path / 'dst', *changed)
    shutil.copytree(photographs, tmp_path / 'other')
    with pytest.raises(UsageError, match='other settings .source'):
        run(tmp_path / 'other', tmp_path / 'dst')
    shutil.copytree(photographs, tmp_path / 'mine')
    with pytest.raises(TrainingFault):
        run(tmp_path / 'mine', tmp_path / 'dst2')
    next((tmp_path / 'mine').rglob('*.jpg')).unlink()
    with pytest.raises(UsageError, match='dst2.incomplete was begun with other files in the source: remove it'):
        run(tmp_path / 'mine', tmp_path / 'dst2')


def test_two_at_once_do_not_mix(photographs, tmp_path, monkeypatch):
    once = prepare_data.Encoder.encode
    monkeypatch.setattr(prepare_data.Encoder, 'encode', lambda *args: time.sleep(0.01) or once(*args))
    argv = [photographs, tmp_path / 'dst', '--num-workers', 1]
    first = nano.start(argv, command='prepare_data')
    while not (tmp_path / 'dst.incomplete' / '.lock').exists():
        time.sleep(0.03)
    with pytest.raises(UsageError, match='another run is writing to .*dst.incomplete'):
        run(*argv)
    nano.finish(first)
    assert len(open_split(str(tmp_path / 'dst'), 'train', None, None)) == 60

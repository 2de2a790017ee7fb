"""Run scripts/prepare_data.py on the sources that --data-path takes; kill it, fill its disk, damage its images."""
import io
import itertools
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

import nano
import prepare_data
from datasets import build_dataset, open_split
from errors import TrainingFault, UnreadableImage, UsageError
from sources import open_image
from test_sources import members, pack, publish_val

SMALL_TARS = '--short-side', 40, '--images-per-tar', 3, '--num-workers'


def run(*argv) -> None:
    prepare_data.main(prepare_data.build_parser().parse_args([str(arg) for arg in argv]))


def run_until_disk_is_full(after, *argv) -> None:
    """Run until the disk is full after that many files in tars."""
    addfile, files = tarfile.TarFile.addfile, itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingFault, match='No space left') as fault:
        patch.setattr(
            tarfile.TarFile, 'addfile', lambda *args: nano.full_disk() if next(files) == after else addfile(*args))
        run(*argv)
    assert '\n' not in str(fault.value)


def tars(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob('*.tar')}


def times(folder) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in Path(folder).glob('*.tar')}


def train_split(folder):
    return open_split(str(folder), 'train', None, None)


def listed(images) -> list[tuple[str, str]]:
    """File and class of each sample."""
    return [(name.rpartition('/')[2], images.classes[label]) for name, label in images.samples]


def encoded(images) -> list[bytes]:
    return [images.read(i) for i in range(len(images))]


def photograph(width, height, seed=0, mode='RGB') -> Image.Image:
    """A smooth image."""
    pixels = np.random.default_rng(seed).integers(64, 192, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """60 images in three classes, some in folders below: JPEG, PNG and WebP, short sides of 20 to 90 pixels."""
    root = tmp_path_factory.mktemp('photographs')
    names = {f'train/{"abc"[i % 3]}/{"below/" * (i % 7 == 0)}{i:02d}.{("jpg", "png", "webp")[i % 4 % 3]}': i % 8
             for i in range(60)}
    names.update({f'val/{"abc"[i % 3]}/{i}.jpg': 7 for i in range(6)})
    for seed, (name, size) in enumerate(names.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(120, 20 + 10 * size, seed).save(root / name)
    return root


def pack_source(form, images, src, monkeypatch=None) -> Path:
    """Pack a folder into tars; return what --data-path takes."""
    src.mkdir(exist_ok=True)
    if form == 'folder':
        return images
    if form == 'one tar':
        return pack(src / 'everything.tar', images, prefix='data/')
    for split in 'train', 'val':
        if form == 'shards':
            for shard in range(3):  # which all count their keys from 0
                files = sorted((images / split).rglob('*.*'))[shard::3]
                members(src / f'{split}-{shard}.tar', *(entry for i, file in enumerate(files) for entry in (
                    (f'{i:03d}{file.suffix}', file.read_bytes()),
                    (f'{i:03d}.cls', file.parent.name[-1].encode()))))
        else:
            (src / split).mkdir()
            for folder in (images / split).iterdir():
                pack(src / split / f'{folder.name}.tar', folder)
    if form == 'published':  # ImageNet's own tars
        pack(src / 'ILSVRC2012_img_train.tar', (src / 'train').rename(src / 'classes'))
        shutil.rmtree(src / 'val')
        publish_val(images, src, monkeypatch)
    return src


@pytest.mark.parametrize('form', ['folder', 'one tar', 'folders of class tars', 'shards', 'published'])
def test_samples_classes_and_order_are_those_of_the_source(images, form, tmp_path, monkeypatch):
    src = pack_source(form, images, tmp_path / 'src', monkeypatch)
    run(src, tmp_path / 'dst', '--images-per-tar', 40 if form == 'shards' else 7, '--num-workers', 0)
    for split, count in (('train', 100), ('val', 27)):
        source, made = (open_split(str(path), split, None, None) for path in (src, tmp_path / 'dst'))
        assert len(made) == count and made.classes == source.classes and made.targets == source.targets
        assert listed(made) == listed(source) and encoded(made) == encoded(source)  # all are small
    assert len(tars(tmp_path / 'dst')) > 5 and not (tmp_path / 'dst.incomplete').exists()


def test_a_folder_of_classes_keeps_its_split(photographs, tmp_path):
    run(photographs / 'train', tmp_path / 'dst', '--short-side', 1000)
    for is_train in True, False:
        source, made = (build_dataset('IMNET', is_train, str(path), 32, val_split=0.2)
                        for path in (photographs / 'train', tmp_path / 'dst'))
        assert encoded(made) == encoded(source)


def test_large_training_images_get_the_short_side(photographs, tmp_path):
    run(photographs, tmp_path / 'dst', '--short-side', 50, '--quality', 95)
    source, made = train_split(photographs), train_split(tmp_path / 'dst')
    resized = [i for i in range(60) if encoded(made)[i] != encoded(source)[i]]
    assert resized == [i for i in range(60) if source[i][0].height > 50] and len(resized) > 20
    for i in resized:
        before, after = source[i][0], made[i][0]
        assert after.size == (round(120 * 50 / before.height), 50)
        image = Image.open(io.BytesIO(made.read(i)))
        assert image.format == 'JPEG' and image.layer[0][1:3] == (2, 2)  # 4:2:0
        expected = before.resize(after.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(expected, int) - np.asarray(after)).mean() < 2
    source, made = (open_split(str(path), 'val', None, None) for path in (photographs, tmp_path / 'dst'))
    assert encoded(made) == encoded(source)
    run(photographs, tmp_path / 'both', '--short-side', 50, '--resize-val')
    assert {image.height for image, _ in open_split(str(tmp_path / 'both'), 'val', None, None)} == {50}


def test_images_of_any_kind_are_prepared_as_loaders_read_them(tmp_path):
    rotated = Image.Exif()
    rotated[0x0112] = 6  # shown turned by 90 degrees
    grey16 = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
    kinds = {'exif.jpg': (photograph(80, 60), dict(exif=rotated)), 'cmyk.jpg': (photograph(80, 60, mode='CMYK'), {}),
             'palette.gif': (photograph(80, 60, mode='P'), {}), 'alpha.png': (photograph(80, 60, mode='RGBA'), {}),
             'grey16.png': (grey16, {}), 'png.JPEG': (photograph(80, 60), dict(format='PNG')),
             'long.jpg': (photograph(900, 31), {}), 'talk.jpg': (photograph(80, 60), dict(comment=b'words')),
             'odd name\n%41.jpg': (photograph(80, 60), {})}
    for name, (image, options) in kinds.items():
        (tmp_path / 'src' / name[0]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'src' / name[0] / name, **options)
    run(tmp_path / 'src', tmp_path / 'dst', '--short-side', 30, '--quality', 100)
    made = train_split(tmp_path / 'dst')
    assert {name for name, _ in listed(made)} == set(kinds)
    for i, (name, label) in enumerate(listed(made)):
        before, after = open_image((tmp_path / 'src' / label / name).read_bytes()), made[i][0]
        assert after.size == {'long.jpg': (871, 30), 'exif.jpg': (30, 40)}.get(name, (40, 30))
        image = Image.open(io.BytesIO(made.read(i)))
        assert 0x0112 not in image.getexif() and 'comment' not in image.info
        difference = np.asarray(before.resize(after.size, Image.Resampling.LANCZOS), int) - np.asarray(after)
        assert np.abs(difference).mean() < (8 if name == 'palette.gif' else 3), name


@pytest.fixture(scope='module')
def undisturbed(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed') / 'dst'
    run(photographs, folder, *SMALL_TARS, 0)
    return tars(folder)


def test_killed_five_times_the_bytes_are_the_same(photographs, undisturbed, tmp_path, monkeypatch):
    encode = prepare_data.Encoder.encode
    monkeypatch.setattr(prepare_data.Encoder, 'encode', lambda *args: time.sleep(0.04) or encode(*args))
    argv = [photographs, tmp_path / 'dst', *SMALL_TARS, 2]
    rng, before = random.Random(5), {}
    for _ in range(5):
        process, = nano.start(argv, command='prepare_data')
        until = len(before) + rng.choice((1, 2))
        while len(times(tmp_path / 'dst.incomplete')) < until:
            assert process.exitcode is None
            time.sleep(0.005)
        time.sleep(0.1 * rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        after = times(tmp_path / 'dst.incomplete')
        assert before.items() <= after.items() and not (tmp_path / 'dst').exists()
        before = after
    assert 5 <= len(before) < 22
    nano.finish(nano.start(argv, command='prepare_data', output=tmp_path / 'last.txt'))
    assert tars(tmp_path / 'dst') == undisturbed and before.items() <= times(tmp_path / 'dst').items()
    assert all(name.endswith(('.tar', '.tar.index.npz', 'prepared.json')) for name in os.listdir(tmp_path / 'dst'))


def test_after_a_full_disk_the_work_resumes(photographs, undisturbed, tmp_path):
    run_until_disk_is_full(10, photographs, tmp_path / 'dst', *SMALL_TARS, 0)
    assert len(tars(tmp_path / 'dst.incomplete')) == 3 and not (tmp_path / 'dst').exists()
    run(photographs, tmp_path / 'dst', *SMALL_TARS, 0)
    assert tars(tmp_path / 'dst') == undisturbed


def test_tars_of_other_images_are_written_again(photographs, tmp_path):
    src = shutil.copytree(photographs, tmp_path / 'src')
    run_until_disk_is_full(50, src, tmp_path / 'dst', *SMALL_TARS, 0)
    shutil.rmtree(src / 'train' / 'b')
    for dst in 'dst', 'expected':
        run(src, tmp_path / dst, *SMALL_TARS, 0)
    assert tars(tmp_path / 'dst') == tars(tmp_path / 'expected')


def test_damaged_images_stop_the_work_or_are_left_out(photographs, tmp_path, capsys):
    damaged = shutil.copytree(photographs, tmp_path / 'src')
    (damaged / 'train' / 'a' / '03.jpg').write_bytes(b'not an image')
    os.truncate(damaged / 'train' / 'b' / '04.jpg', 1000)
    argv = damaged, tmp_path / 'dst', *SMALL_TARS
    nano.finish(nano.start([*argv, 2], command='prepare_data', output=tmp_path / 'log'), 2)
    error = (tmp_path / 'log').read_text().partition('prepare_data.py: error: ')[2]
    assert error.count('\n') == 1 and re.search('/train/a/03.jpg .*--skip-damaged', error)
    assert not (tmp_path / 'dst').exists()
    run_until_disk_is_full(25, *argv, 0, '--skip-damaged')  # after both images
    run(*argv, 2, '--skip-damaged')
    printed = capsys.readouterr().out
    assert re.findall('left out: .*/(.*jpg) ', printed) == ['03.jpg', '04.jpg'] and 'truncated' in printed
    assert printed.splitlines()[-1] == 'left out 2 images'
    assert listed(train_split(tmp_path / 'dst')) == [
        sample for sample in listed(train_split(damaged)) if sample[0] not in ('03.jpg', '04.jpg')]


def test_a_source_that_stops_answering_is_not_damage(photographs, tmp_path, monkeypatch):
    def fail(self, index):
        raise OSError(116, 'Stale file handle')

    monkeypatch.setattr('sources.EncodedImages.read', fail)
    with pytest.raises(UnreadableImage, match='jpg .*Stale file handle'):
        run(photographs, tmp_path / 'dst', '--skip-damaged', '--num-workers', 0)


def test_mistakes_are_one_line_and_nothing_is_written(photographs, tmp_path, monkeypatch):
    src, twice = tmp_path / 'src', tmp_path / 'twice'
    shutil.copytree(photographs, src)
    for folder in 'empty', 'taken.incomplete', 'twice', 'unread/val/a':
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'taken.incomplete' / 'thesis.txt').touch()
    for name in 'x', 'y':
        members(twice / f'train-{name}.tar', ('a/0.jpg', b''), ('b/0.jpg', b''))
    shutil.copy(src / 'val' / 'a' / '0.jpg', tmp_path / 'unread' / 'val' / 'a')
    (tmp_path / 'unread' / 'training').mkdir()
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.chdir(tmp_path)
    for source, dst, words in (
            ('nowhere', 'dst', 'nowhere'), ('empty', 'dst', 'empty'), ('x.tar', 'dst', 'x.tar'),
            (src, 'empty', 'empty exists'), (src, src / 'dst', 'dst is inside .*src'),
            (src, 'taken', 'taken.incomplete'), ('unread', 'dst', 'training'),
            (twice, 'dst', 'train-x.tar/a/0.jpg and .*train-y.tar/a/0.jpg')):
        with pytest.raises(UsageError, match=words) as stop:
            run(source, dst)
        assert '\n' not in str(stop.value)
        assert [file for file in sorted(tmp_path.rglob('*')) if not file.name.endswith('.npz')] == before


def test_other_settings_do_not_mix(photographs, tmp_path):
    run_until_disk_is_full(10, photographs, tmp_path / 'dst', *SMALL_TARS, 0)
    for src, *changed in ((photographs, '--short-side', 50), (photographs, '--resize-val'), (photographs / 'train',)):
        with pytest.raises(UsageError, match='other settings.*prepared.json.*remove .*dst.incomplete'):
            run(src, tmp_path / 'dst', *SMALL_TARS, 0, *changed)
    assert not (tmp_path / 'dst').exists()


def test_rotated_images_are_stored_upright_without_the_tag(tmp_path):
    """Small ones and those of the validation too; only these are encoded again."""
    for split, i in itertools.product(('train', 'val'), (1, 6)):
        exif = Image.Exif()
        exif[0x0112] = i
        (tmp_path / 'src' / split / f'turned_{i}').mkdir(parents=True)
        photograph(48, 32).save(tmp_path / 'src' / split / f'turned_{i}' / '0.jpg', exif=exif)
    run(tmp_path / 'src', tmp_path / 'dst', '--short-side', 40, '--quality', 100)
    for split in ('train', 'val'):
        source, made = (open_split(str(tmp_path / folder), split, None, None) for folder in ('src', 'dst'))
        assert made.read(0) == source.read(0) and len(made) == 2
        image = Image.open(io.BytesIO(made.read(1)))
        assert 0x0112 not in image.getexif() and image.size == (32, 48)
        assert np.abs(np.asarray(source[1][0], int) - np.asarray(made[1][0])).mean() < 3

"""README and docs: links have targets, commands have flags that exist, and snippets run."""
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import detection
import nano
import options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    titles = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE),
                        re.MULTILINE)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_between_pages_have_targets(page):
    links = re.findall(r'\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)', page.read_text())
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f'{path}#{anchor}'


def commands(page: Path) -> list[str]:
    """Return the commands of a page, indented or between backticks."""
    text = page.read_text()
    lines = re.findall(r'^    (.*)$', text, re.MULTILINE) + re.findall(r'`([^`\n]*)`', text)
    lines = [re.sub(r'\s\.\.\.$', '', re.sub(r'\s+#.*', '', line)) for line in lines]
    return [line for line in lines if re.search(r'(train|scripts/\w+)\.py [^ ]', line) and ' ... ' not in line
            and line.split()[0] in ('python', 'torchrun')]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_flags_of_commands_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        script, flags = re.search(r'(\w+)\.py (.*)', line).groups()
        if script == 'train':
            flags = re.sub(r'--help|--config output/\S+', '', flags)  # this run does not exist
            options.parse_args(shlex.split(flags))
        elif script == 'detection':
            detection.parse_args(shlex.split(flags))
        else:
            source = (ROOT / 'scripts' / f'{script}.py').read_text()
            assert all(f"'{flag}'" in source for flag in re.findall(r'--[\w-]+', flags)), line


def test_links_make_classes_of_a_csv_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('1.jpg', '2.jpg', '3.jpg'):
        (tmp_path / name).write_text(name)
    (tmp_path / 'labels.csv').write_text('file,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n')
    exec(re.search(r'^```python\n(import csv.*?)^```', (ROOT / 'docs' / 'data.md').read_text(), re.S | re.M)[1], {})
    assert {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.glob('photos/*/*')} == {
        'photos/cat/1.jpg': '1.jpg', 'photos/dog/2.jpg': '2.jpg', 'photos/cat/3.jpg': '3.jpg'}


def test_the_first_snippet_classifies_a_photo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (90, 70), (200, 100, 0)).save('photo.jpg')
    snippet = re.search(r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.DOTALL | re.MULTILINE)[1]
    assert snippet.count('pretrained=True') == 1
    exec(snippet.replace('pretrained=True', 'pretrained=False'), {})
    assert len(re.findall(r'^\d+\.\d% \w+', capsys.readouterr().out, re.MULTILINE)) == 5


def test_weights_from_a_file_need_no_network(tmp_path, monkeypatch):
    text = (ROOT / 'docs' / 'weights.md').read_text()
    snippet = re.search(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    state = timm.create_model('cmt_s').state_dict()
    torch.save(state, 'cmt_small.pth')
    names = {}
    exec(snippet, names)
    assert nano.same(dict(names['model'].state_dict()), dict(state))


def test_a_snippet_loads_a_runs_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, folder = nano.warm(num_classes=3), tmp_path / 'output/pets'
    folder.mkdir(parents=True)
    torch.save({'format': 1, 'model': model.state_dict(), 'model_args': model.model_args, 'classes': ['a', 'b', 'c'],
                'args': {'model': 'cmt_nano', 'crop_pct': 0.9}}, folder / 'checkpoint_best.pth')
    Image.new('RGB', (90, 70), (200, 100, 0)).save('photo.jpg')
    page = (ROOT / 'docs/evaluation.md').read_text()
    snippet, = re.findall(r'^```python\n((?:(?!```).)*?load_model.*?)^```', page, re.S | re.M)
    exec(snippet, {})
    assert capsys.readouterr().out.split()[0] in 'abc'

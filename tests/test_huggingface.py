"""Converted folders on the Hugging Face Hub: its own client against a local server that speaks the Hub's HTTP API."""
import base64
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import convert_checkpoint
import nano
import predict

ROOT = Path(__file__).resolve().parents[1]
TOKEN, COMMIT = 'hf_test', 40 * 'a'


class Hub(http.server.BaseHTTPRequestHandler):
    """Store repositories in memory: `repos` maps each to its files."""

    protocol_version = 'HTTP/1.1'

    def answer(self, content=b'', status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(content), **headers}.items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def do_POST(self):
        body, server, path = self.rfile.read(int(self.headers.get('Content-Length', 0))), self.server, self.path
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            return self.answer({'error': 'Invalid username or password.'}, 401)
        if path == '/api/repos/create':
            repo = f'{json.loads(body).get("organization") or "me"}/{json.loads(body)["name"]}'
            exists = repo in server.repos
            server.repos.setdefault(repo, {})
            return self.answer({'url': f'{server.url}/{repo}'}, 409 if exists else 200)
        if path == '/api/validate-yaml':
            ModelCard(json.loads(body)['content'], ignore_metadata_errors=False)
            return self.answer({'errors': [], 'warnings': []})
        repo = re.match(r'(?:/api/models)?/([^/]+/[^/.]+)', path)[1]
        if '/preupload/' in path:
            return self.answer({'files': [
                {'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                for file in json.loads(body)['files']]})
        assert '/commit/' in path, path
        for item in map(json.loads, body.splitlines()):
            if item['key'] == 'file':
                server.repos[repo][item['value']['path']] = base64.b64decode(item['value']['content'])
        return self.answer({'commitUrl': f'{server.url}/{repo}/commit/{COMMIT}', 'commitOid': COMMIT})

    def do_GET(self):
        found = re.fullmatch(r'(?:/api/models)?/([^/]+/[^/]+?)(?:/(resolve|revision|tree)/[^/]+(?:/(.*))?)?',
                             self.path.split('?')[0])
        files = self.server.repos.get(found[1]) if found else None
        if files is None:
            return self.answer(status=404, X_Error_Code='RepoNotFound')
        if found[2] == 'tree':
            return self.answer([{'type': 'file', 'path': name, 'size': len(content), 'oid': COMMIT}
                                for name, content in files.items()])
        if found[2] != 'resolve':
            return self.answer({'id': found[1], 'sha': COMMIT, 'tags': [], 'siblings': [
                {'rfilename': name} for name in files]})
        if found[3] not in files:
            return self.answer(status=404, X_Error_Code='EntryNotFound', X_Repo_Commit=COMMIT)
        content = files[found[3]]
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.url = {}, f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """Return a function that runs a command as someone with an empty cache who is logged in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'PYTHONPATH'))}
    environment.update(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'hf'), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET='1',
                       OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')

    def run(*command, status=0, **changes):
        shutil.rmtree(tmp_path / 'hf', ignore_errors=True)
        done = subprocess.run([sys.executable if c == 'python' else str(c) for c in command], cwd=tmp_path,
                              env={**environment, **changes}, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr
    return run


@pytest.fixture
def checkpoint(tmp_path):
    model = nano.warm(num_classes=3)
    torch.save({'format': 1, 'model': model.state_dict(), 'model_args': model.model_args, 'acc1': 87.5, 'epoch': 4,
                'classes': ['cat|*dog*', 'eel', '</details>'], 'training_images': 1234,
                'args': {'model': 'cmt_nano', 'data_path': '/home/me/pets', 'data_set': 'IMNET', 'finetune': 'cmt_s'}},
               tmp_path / 'checkpoint_best.pth')
    Image.effect_noise((90, 70), 90).convert('RGB').save(tmp_path / 'photo.jpg')
    return model


def code(folder):
    return re.search(r'^```python\n(.*?)^```', (folder / 'README.md').read_text(), re.DOTALL | re.MULTILINE)[1]


def test_a_folder_goes_to_the_hub_and_comes_back(checkpoint, hub, run, tmp_path, capsys):
    run('python', ROOT / 'scripts/convert_checkpoint.py', 'checkpoint_best.pth', 'pets', '--push-to-hub', 'me/pets')
    files = {path.name: path.read_bytes() for path in (tmp_path / 'pets').iterdir()}
    assert hub.repos == {'me/pets': files}

    run('hf', 'download', 'me/pets', 'cmt.py', '--local-dir', '.')  # as the card says
    (tmp_path / 'card.py').write_text(code(tmp_path / 'pets') + "import torch\ntorch.save(model, 'model.pt')\n")
    name = run('python', 'card.py').strip()
    downloaded = torch.load(tmp_path / 'model.pt', weights_only=False)
    x = torch.randn(2, 3, *checkpoint.img_size)
    assert torch.equal(downloaded(x), checkpoint.eval()(x))
    capsys.readouterr()
    predict.main([str(tmp_path / 'checkpoint_best.pth'), str(tmp_path / 'photo.jpg'), '--json'])
    expected, = json.loads(capsys.readouterr().out)
    assert expected['predictions'][0]['class'] == name
    again, = json.loads(run('python', ROOT / 'scripts/predict.py', 'hf-hub:me/pets', 'photo.jpg', '--json'))
    assert again['predictions'] == expected['predictions']


def test_an_upload_that_fails_is_one_line(checkpoint, run, tmp_path):
    line = run('python', ROOT / 'scripts/convert_checkpoint.py', 'checkpoint_best.pth', 'pets', '--push-to-hub',
               'me/pets', status=2, HF_TOKEN='wrong')
    assert '--push-to-hub me/pets' in line and 'Traceback' not in line and not (tmp_path / 'pets').exists()


def test_the_card_of_a_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert = functools.partial(convert_checkpoint.main, ['checkpoint_best.pth', 'pets', '--overwrite'])
    convert()
    card = ModelCard.load(tmp_path / 'pets' / 'README.md')
    assert card.data.license == 'apache-2.0' and card.data.eval_results[0].metric_value == 0.875
    for fact in ('cmt_s', '1,234', '87.5', 'checkpoint_best.pth', 'cat|*dog*'):
        assert fact in card.text
    assert '/home/me' not in card.content
    convert_checkpoint.main(['checkpoint_best.pth', 'pets', '--overwrite', '--license', 'mit'])
    assert ModelCard.load(tmp_path / 'pets' / 'README.md').data.license == 'mit'

    state = torch.load('checkpoint_best.pth', weights_only=True)
    state['args'].update(data_set='CIFAR10', data_path='C:\\Users\\me\\data', finetune='https://me:pass@host/a.pth?key=1')
    torch.save(state, 'checkpoint_best.pth')
    convert()
    card = ModelCard.load(tmp_path / 'pets' / 'README.md')
    assert '`CIFAR10`' in card.content and '`a.pth`' in card.content and card.data.license is None
    assert not any(private in card.content for private in ('Users', 'pass', 'key=1'))

    torch.save(checkpoint.state_dict(), 'bare.pth')  # nothing is known about these weights
    convert_checkpoint.main(['bare.pth', 'bare'])
    card = ModelCard.load(tmp_path / 'bare' / 'README.md')
    assert card.data.license is None and card.data.eval_results is None and 'None ' not in card.content
    exec(code(tmp_path / 'bare'), {})

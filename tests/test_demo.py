"""scripts/demo.py: the page in a browser. `pytest -m soak` needs gradio, playwright and a Chromium."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import demo
import nano
from sources import is_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photos(tmp_path):
    """Lay out a model of three classes, two of one name, photos, and a file that is none."""
    model = nano.warm(num_classes=3)
    torch.save({'format': 1, 'model': model.state_dict(), 'model_args': model.model_args, 'args': {},
                'classes': ['cat', 'eel', 'cat']}, tmp_path / 'ckpt.pth')
    generator = np.random.default_rng(0)
    for i in range(6):
        pixels = generator.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((400, 300)).save(tmp_path / f'{i}.jpg')
    (tmp_path / 'text.jpg').write_text('no photo')
    return tmp_path


def test_mistakes_start_no_server(photos, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert 'pip install gradio' in mistake(demo, 'ckpt.pth')


@pytest.mark.soak
def test_a_browser_sees_the_classes_of_predict(photos):
    pytest.importorskip('gradio')
    playwright = pytest.importorskip('playwright.sync_api')
    browser = shutil.which('chromium') or pytest.skip('needs chromium')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    names = sorted(f'{i}.jpg' for i in range(6))
    done = subprocess.run([sys.executable, ROOT / 'scripts/predict.py', 'ckpt.pth', *names, '--json'], cwd=photos,
                          env=environment, capture_output=True, text=True, check=True)
    tops = {result['image']: result['predictions'][0] for result in json.loads(done.stdout)}
    expected = {name: f'cat ({top["index"]})' if top['index'] != 1 else 'eel' for name, top in tops.items()}
    assert len(set(expected.values())) > 1

    server = subprocess.Popen([sys.executable, ROOT / 'scripts/demo.py', 'ckpt.pth', '--examples', '.', '--port',
                               str(port)], cwd=photos, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert f'127.0.0.1:{port}' in server.stdout.readline()
        with playwright.sync_playwright() as manager:
            page = manager.chromium.launch(executable_path=browser, args=['--no-sandbox']).new_page()
            requests = []
            page.on('request', lambda request: requests.append(request.url))
            page.goto(f'http://127.0.0.1:{port}')

            def upload(name, line, shown=None):
                """Upload a file, and wait for a line with these words and for the first class, None for none."""
                page.set_input_files('input[type=file]', str(photos / name))
                page.wait_for_function(
                    f'() => (document.body.innerText + document.querySelector("textarea").value).includes({line!r})')
                if shown is not None:
                    page.wait_for_function(f'() => document.querySelector("h2")?.innerText.trim() == {shown!r}')
                    assert page.locator('img').count() > 1
                else:
                    assert not page.locator('h2').count()

            for name in names:
                upload(name, name, expected[name])
            upload('text.jpg', 'not an image')
            shown = dict(zip(sorted(path.name for path in photos.iterdir() if is_image(path.name)),
                             page.locator('button.gallery-item').all()))
            for name, line in (('3.jpg', '3.jpg'), ('text.jpg', 'not an image'), ('4.jpg', '4.jpg')):
                shown[name].click()
                page.wait_for_function(f'() => document.querySelector("textarea").value.includes({line!r})')
            upload(names[0], names[0], expected[names[0]])
            assert all(url.startswith((f'http://127.0.0.1:{port}/', 'data:', 'blob:')) for url in requests)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.stdout.close()

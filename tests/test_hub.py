"""hubconf.py, as torch.hub loads it."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cmt

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize('name, kind', [('cmt_ti', 'cmt_ti'), ('cmt_tiny', 'cmt_ti'), ('cmt_small', 'cmt_s')])
def test_models_by_both_names(name, kind):
    with torch.device('meta'):
        model = torch.hub.load(ROOT, name, source='local', num_classes=7, img_size=64)
    assert isinstance(model, cmt.CMT) and model.num_classes == 7 and model.img_size == (64, 64)
    assert model.pretrained_cfg['architecture'] == kind
    assert name in torch.hub.list(ROOT, source='local') and len(torch.hub.list(ROOT, source='local')) == 8
    assert 'multiply-adds' in torch.hub.help(ROOT, name, source='local')


def test_pretrained_reaches_the_download(monkeypatch):
    asked = []

    def download(url, *args, **kwargs):
        asked.append(url)
        raise ConnectionError

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', download)
    with pytest.raises(ConnectionError):
        torch.hub.load(ROOT, 'cmt_xsmall', source='local', pretrained=True)
    assert asked == [cmt.default_cfgs['cmt_xs'].default.url]


def test_from_another_folder(tmp_path):
    code = f'import torch; m = torch.hub.load({ROOT!r}, "cmt_ti", source="local", img_size=32); print(m.img_size)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == '(32, 32)\n', done.stderr

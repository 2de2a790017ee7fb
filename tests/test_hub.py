"""hubconf.py, as torch.hub loads it."""
from pathlib import Path

import pytest
import torch

import cmt
import hubconf

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize('name, kind', [('cmt_ti', 'cmt_ti'), ('cmt_tiny', 'cmt_ti'), ('cmt_small', 'cmt_s')])
def test_models_by_both_names(name, kind):
    with torch.device('meta'):
        model = torch.hub.load(ROOT, name, source='local', num_classes=7, img_size=64)
    assert isinstance(model, cmt.CMT) and model.num_classes == 7 and model.img_size == (64, 64)
    assert model.pretrained_cfg['architecture'] == kind


def test_pretrained_reaches_the_download(monkeypatch):
    asked = []

    def download(url, *args, **kwargs):
        asked.append(url)
        raise ConnectionError

    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', download)
    with pytest.raises(ConnectionError):
        torch.hub.load(ROOT, 'cmt_xsmall', source='local', pretrained=True)
    assert asked == [cmt.default_cfgs['cmt_xs'].default.url]


def test_what_the_hub_lists():
    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')}
    assert entries == {*cmt.ALIASES, *cmt.ALIASES.values()}
    assert all('multiply-adds' in getattr(hubconf, name).__doc__ for name in entries)

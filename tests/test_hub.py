"""hubconf.py, as torch.hub loads it."""
from pathlib import Path

import pytest
import timm
import torch

import cmt
import hubconf
import nano

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize('name, kind', [('cmt_ti', 'cmt_ti'), ('cmt_tiny', 'cmt_ti'), ('cmt_small', 'cmt_s')])
def test_models_by_both_names(name, kind):
    model = torch.hub.load(ROOT, name, source='local', num_classes=7, img_size=64, device='meta')
    assert isinstance(model, cmt.CMT) and model.num_classes == 7 and model.img_size == (64, 64)
    assert model.pretrained_cfg['architecture'] == kind


def test_pretrained_reaches_timm(tmp_path):
    state = timm.create_model('cmt_ti').state_dict()
    torch.save({'model': cmt.to_released(state)}, tmp_path / 'ti.pth')
    model = torch.hub.load(ROOT, 'cmt_tiny', source='local', pretrained=True,
                           pretrained_cfg_overlay=dict(file=str(tmp_path / 'ti.pth')))
    assert nano.same(model.state_dict(), state)


def test_entry_points():
    entries = {name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith('_')}
    assert entries == {*cmt.ALIASES, *cmt.ALIASES.values()}
    assert all(getattr(hubconf, name).__doc__ for name in entries)

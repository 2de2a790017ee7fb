"""docs/backbone.md: each of its snippets runs."""
import re
from pathlib import Path

import pytest
import timm
import torch

import nano  # noqa: F401, registers cmt_nano

ROOT = Path(__file__).parent.parent
SNIPPETS = {match[1]: match[2] for match in re.finditer(
    r'^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```', (ROOT / 'docs' / 'backbone.md').read_text(), re.M | re.S)}
HEAVY = {'segmentation_models_pytorch', 'transformers'}


@pytest.mark.parametrize('title', [
    pytest.param(title, marks=pytest.mark.soak) if title in HEAVY else title for title in SNIPPETS])
def test_snippet(title):
    if title in HEAVY:
        pytest.importorskip(title)
    exec(SNIPPETS[title], {})


def test_attention_maps_by_timms_tool(monkeypatch):
    monkeypatch.setattr(timm.layers.config, '_USE_FUSED_ATTN', 0)  # what set_fused_attn(False) sets
    model = timm.create_model('cmt_nano', img_size=64)
    for settings in ({'method': 'hook'}, {'names': ['*softmax']}):
        maps = timm.utils.AttentionExtract(model, **settings)(torch.randn(1, 3, 64, 64))
        assert [tuple(one.shape[1:]) for one in maps.values()] == [(1, 256, 4), (2, 64, 4), (2, 16, 4), (4, 4, 4)]


def test_every_snippet_is_tested():
    assert set(SNIPPETS) == {'In Python: stages as features', "torchvision's detectors", *HEAVY}

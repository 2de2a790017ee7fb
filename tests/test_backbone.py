"""docs/backbone.md: each of its snippets runs."""
import argparse
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


def test_timms_scripts_need_the_size_of_the_model():
    """timm's scripts pass --img-size to the data alone, and --model-kwargs to the model."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--img-size', type=int)
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=timm.utils.ParseKwargs)
    for argv in ['--img-size', '64'], ['--img-size', '64', '--model-kwargs', 'img_size=64']:
        args = vars(parser.parse_args(argv))
        model = timm.create_model('cmt_nano', **args['model_kwargs'])
        size = timm.data.resolve_data_config(args, model=model)['input_size']
        assert size == (3, 64, 64) and (size == (3, *model.img_size)) == bool(args['model_kwargs'])


def test_every_snippet_is_tested():
    assert set(SNIPPETS) == {'In Python: stages as features', "torchvision's detectors", *HEAVY}


@pytest.mark.soak
def test_unet_learns():
    """Twenty steps on a batch of shapes."""
    pytest.importorskip('segmentation_models_pytorch')
    exec(SNIPPETS['segmentation_models_pytorch'] + '''
torch.manual_seed(0)
images, targets = torch.randn(4, 3, 96, 96), torch.zeros(4, 96, 96, dtype=torch.int64)
for i, (image, target) in enumerate(zip(images, targets)):
    image[:, 20:60, 30:70] += 3 * (i % 2) - 1
    target[20:60, 30:70] = 1 + i % 2
optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
for step in range(20):
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses)
assert losses[-1] < 0.5 * losses[0]
''', {})

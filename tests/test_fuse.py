"""The inference form has the model's results."""
import re

import pytest
import timm
import torch
import torch.nn as nn

import cmt  # noqa: F401


def with_statistics(name: str, **kwargs) -> nn.Module:
    """Return a model with noise in every BatchNorm."""
    torch.manual_seed(0)
    model = timm.create_model(name, dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return model


@pytest.mark.parametrize('name, size', [('cmt_ti', (64, 96)), ('cmt_xs', 32), ('cmt_s', 32), ('cmt_b', 32)])
@torch.no_grad()
def test_fused_equals_plain(name, size):
    model = with_statistics(name, img_size=size)
    images = torch.randn(2, 3, *model.img_size, dtype=torch.float64)
    before = model(images)
    fused = model.fuse()
    difference = (fused(images) - before).abs().max() / before.abs().max()
    assert difference < 1e-9
    assert torch.equal(model(images), before)  # fuse() works on a copy
    left = {name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert all(re.fullmatch(r'stem\.norm[123]|stages\.\d\.blocks\.\d+\.irffn\.norm1', name) for name in left)


@pytest.mark.parametrize('wrap, inplace', [(lambda m: m, False), (nn.Sequential, True)], ids=['bare', 'wrapped'])
@torch.no_grad()
def test_timms_tool_fuses_a_model_in_train_mode(wrap, inplace):
    """timm's validate.py and benchmark.py reparameterize before model.eval()."""
    model = wrap(with_statistics('cmt_ti', img_size=32))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, names = model(images), set(model.state_dict())
    for _ in range(2):
        fused = timm.utils.reparameterize_model(model.train(), inplace=inplace).eval()
        assert (fused is model) == inplace and len(fused.state_dict()) < len(names)
        assert (fused(images) - before).abs().max() / before.abs().max() < 1e-9
    if not inplace:
        assert set(model.state_dict()) == names and torch.equal(model.eval()(images), before)


@torch.no_grad()
def test_fused_models_take_any_size_and_are_scripted():
    model = with_statistics('cmt_ti', img_size=64, dynamic_img_size=True, num_classes=7)
    fused = model.fuse()
    for size in ((64, 64), (96, 32)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        assert (fused(images) - model(images)).abs().max() < 1e-9
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    scripted = torch.jit.script(fused)
    assert (scripted(images) - model(images)).abs().max() < 1e-9
    for a, b in zip(fused.forward_intermediates(images)[1], model.forward_intermediates(images)[1]):
        assert (a - b).abs().max() < 1e-9

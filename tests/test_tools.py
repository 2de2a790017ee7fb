"""Tools that act on modules, weights and gradients work on CMT: imitated here, and the packages themselves (soak).

test_cmt.py tests what they need: each module with weights is called once a forward pass, and its output counts.

    pip install '.[tools]' && pytest -m soak tests/test_tools.py
"""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import cmt
import profile_flops
from nano import small


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def layers(model, kinds=(nn.Conv2d, nn.Linear)):
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# weights that are held, moved or rewritten

def test_reparametrized_weights_train():
    model, x = small().train(), images()
    for layer in layers(model).values():
        nn.utils.parametrizations.weight_norm(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name
        optimizer.step()
    assert not torch.equal(model(x), logits)


@torch.no_grad()
def test_weights_that_stay_on_meta_between_calls():
    """Keep weights off the device except during the forward pass of their module, as accelerate's offload does."""
    model = small().eval()
    expected = model(images())
    for module in model.modules():
        weights = dict(module._parameters)
        away = {name: p if p is None else nn.Parameter(p.to('meta')) for name, p in weights.items()}
        module._parameters.update(away)
        module.register_forward_pre_hook(lambda module, _, weights=weights: module._parameters.update(weights))
        module.register_forward_hook(lambda module, *_, away=away: module._parameters.update(away))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize('train', [False, True])
def test_gradients_of_every_modules_output(train):
    """Use backward hooks, which also refuse in-place operations on a module's output."""
    model, gradients = small().train(train), {}
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda _, __, output, name=name: gradients.update({name: output[0]}))
    model(images().requires_grad_()).square().sum().backward()
    uncalled = nn.ModuleList, nn.Dropout  # torch's fused kernel applies the dropout of attention
    assert {name for name, m in model.named_modules() if not isinstance(m, uncalled)} <= set(gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# the packages themselves

def tiny():
    torch.manual_seed(0)
    return timm.create_model('cmt_ti', img_size=64, num_classes=3).eval()


@pytest.mark.soak
@pytest.mark.parametrize('kind, options', [
    ('LoHaConfig', dict(r=4, target_modules=r'.*\.(q|dw)')),
    ('LoKrConfig', dict(r=4, target_modules=r'.*\.(q|dw)')),
    ('LoraConfig', dict(r=4, target_modules=r'.*\.(q|expand|project)')),
    ('LoraConfig', dict(r=46, target_modules=r'stages\.0\..*lpu\.dw')),  # peft asks for a multiple of the groups
])
def test_peft(kind, options):
    peft = pytest.importorskip('peft')
    model, x = tiny(), images()
    expected = model(x)
    model = peft.get_peft_model(model, getattr(peft, kind)(**options)).eval()
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        nn.init.normal_(p, std=0.3)
    logits = model(x)
    logits.square().sum().backward()
    assert adapters and all(p.grad.abs().sum() > 0 for p in adapters.values())
    assert (logits - expected).abs().max() > 0.01


@pytest.mark.soak
@pytest.mark.parametrize('method', ['GradCAM', 'FullGrad'])
def test_grad_cam(method):
    cam = pytest.importorskip('pytorch_grad_cam')
    targets = [cam.utils.model_targets.ClassifierOutputTarget(0)] * 2
    model = tiny()
    for layer in list(layers(model, nn.Conv2d).values())[-3:]:  # irffn.dw, irffn.project, head_proj.proj
        with getattr(cam, method)(model=model, target_layers=[layer]) as explain:
            maps = explain(input_tensor=images(), targets=targets)
        assert maps.shape == (2, 64, 64) and maps.max() > 0


@pytest.mark.soak
def test_torch_pruning():
    """Nothing is pruned unless `dw` may change, as with timm's pvt_v2."""
    pruning = pytest.importorskip('torch_pruning')
    model = tiny()
    fixed = [layer for name, layer in layers(model).items() if not name.endswith(('irffn.expand', 'irffn.dw'))]
    widths = [m.expand.out_channels for m in model.modules() if isinstance(m, cmt.IRFFN)]
    pruning.pruner.MagnitudePruner(
        model, images(), importance=pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=fixed,
    ).step()
    assert [m.dw.groups for m in model.modules() if isinstance(m, cmt.IRFFN)] == [width // 2 for width in widths]
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.soak
def test_lightning(tmp_path):
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.example_input_array = tiny(), images()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    model = Classifier()
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % 3)
    trainer = lightning.Trainer(accelerator='cpu', max_epochs=1, default_root_dir=tmp_path)  # prints a summary first
    trainer.fit(model, torch.utils.data.DataLoader(data, 4))
    assert trainer.global_step == 2
    flops = lightning.pytorch.utilities.model_summary.ModelSummary(model).total_flops
    assert flops / 2 / len(images()) == pytest.approx(profile_flops.profile('cmt_ti', 64)['macs'], rel=0.06)

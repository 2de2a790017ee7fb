"""Tools that act on modules, weights and gradients work on CMT: imitated here, and the packages themselves (soak).

test_cmt.py tests what they need: each module with weights is called once a forward pass, and its output counts.

    pip install '.[tools]' && pytest -m soak tests/test_tools.py
"""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune
from timm.layers import LayerNorm2d
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import cmt
import profile_flops
from nano import small


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def layers(model, kinds=(nn.Conv2d, nn.Linear)):
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def counted(fused, **kwargs):
    """Return CMT-Ti. Counters of operations miss the products in the fused attention kernel."""
    model = timm.create_model('cmt_ti', **kwargs).eval()
    for module in model.modules():
        if isinstance(module, cmt.LMHSA):
            module.fused_attn = fused
    return model


# weights that are held, moved or rewritten

def test_a_pruned_state_dict_loads_into_a_pruned_model():
    pair = small(0).eval(), small(1).eval()
    for model in pair:
        for layer in layers(model).values():
            nn.utils.prune.l1_unstructured(layer, 'weight', 0.3)
    assert not torch.allclose(pair[0](images()), pair[1](images()), atol=0.1)
    pair[1].load_state_dict(pair[0].state_dict())
    assert torch.equal(pair[0](images()), pair[1](images()))


@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated:FutureWarning')
@pytest.mark.parametrize(
    'norm', [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_reparametrized_weights_train(norm):
    model, x = small().train(), images()
    for layer in layers(model).values():
        norm(layer)
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


def test_fully_sharded_layers():
    """Shard every layer separately with FSDP2, on a mesh of one process."""
    from torch.distributed.fsdp import fully_shard
    model = small().eval()
    expected = model(images())
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh('cpu', (1,))
        for layer in layers(model).values():
            fully_shard(layer, mesh=mesh)
        logits = fully_shard(model, mesh=mesh)(images())
        logits.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.allclose(logits, expected, atol=1e-6)
    assert all(p.grad is not None for p in model.parameters())


# replaced and rewritten layers

@pytest.mark.parametrize('make', [
    lambda c: nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
    lambda c: nn.Conv2d(c, c, 5, padding=2, groups=c),
    lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c, padding_mode='reflect'),
    lambda c: nn.Sequential(nn.Conv2d(c, c, (3, 1), padding=(1, 0), groups=c), nn.Conv2d(c, c, (1, 3), padding=(0, 1))),
], ids=['dilated', '5x5', 'reflecting', 'sequential'])
def test_other_modules_in_place_of_a_depthwise_convolution(make):
    model = small()
    for name, module in layers(model).items():
        if name.endswith(('lpu.dw', 'irffn.dw')):
            model.set_submodule(name, make(module.in_channels))
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    block, y = model.eval().stages[1].blocks[0], torch.randn(2, 24, 8, 8)
    assert torch.allclose(block.lpu(y), y + block.lpu.dw(y), atol=1e-6)
    f = block.irffn
    hidden = f.norm1(F.gelu(f.expand(y)))
    expected = f.norm3(f.project(f.norm2(F.gelu(hidden + f.dw(hidden)))))
    assert torch.allclose(f(y), expected, atol=1e-5)


@torch.no_grad()
def test_the_hidden_width_of_an_irffn_can_be_cut():
    """Structural pruning: removing hidden channels equals projecting nothing from them."""
    irffn, y = small().stages[1].blocks[0].irffn, torch.randn(2, 24, 8, 8)
    irffn.train()(torch.randn(8, 24, 8, 8))  # statistics
    keep = torch.randperm(96)[:24].sort().values
    cut, masked = copy.deepcopy(irffn).eval(), copy.deepcopy(irffn).eval()
    masked.project.weight[:, [i for i in range(96) if i not in keep]] = 0
    for layer in (cut.expand, cut.norm1, cut.dw, cut.norm2):
        for tensors in (layer._parameters, layer._buffers):
            tensors.update({name: nn.Parameter(t[keep], False) for name, t in tensors.items() if t.ndim})
    cut.project.weight = nn.Parameter(cut.project.weight[:, keep])
    cut.dw.groups = 24
    assert torch.allclose(cut(y), masked(y), atol=1e-5)


@pytest.mark.filterwarnings('ignore')
def test_static_quantization_by_fx_reaches_every_layer():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    model, x = small().eval(), images()
    prepared = prepare_fx(model, get_default_qconfig_mapping('fbgemm'), (x,))
    prepared(x)
    quantized = convert_fx(prepared)
    kinds = torch.ao.nn.quantized.Conv2d, torch.ao.nn.quantized.Linear
    assert layers(quantized, kinds).keys() == layers(model).keys()
    expected = model(x)
    assert (quantized(x) - expected).norm() < 0.25 * expected.norm()  # 0.05 to 0.13 with other seeds


# gradients and counts

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


@pytest.mark.parametrize('fused, allowed', [(False, 0.01), (True, 0.06)])
@torch.no_grad()
def test_torchs_counter_agrees_with_the_profile(fused, allowed):
    with FlopCounterMode(display=False) as counter:
        counted(fused, img_size=64)(images()[:1])
    assert counter.get_total_flops() / 2 == pytest.approx(profile_flops.profile('cmt_ti', 64)['macs'], rel=allowed)


def test_vectorized_jacobian_in_training():
    model, x = small(dtype=torch.float64), images().double()
    loop, vectorized = (
        torch.autograd.functional.jacobian(model, x, vectorize=vectorize) for vectorize in (False, True))
    assert torch.allclose(loop, vectorized, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings('ignore:.*torch.jit.script.* is deprecated:FutureWarning')  # torch's decompositions
def test_forward_ad_in_training():
    model, x = small(dtype=torch.float64), images().double()
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6 * direction
    assert torch.allclose(tangent, (model(x + step) - model(x - step)) / 2e-6, rtol=1e-5, atol=1e-7)


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
@pytest.mark.parametrize('offload', ['cpu_offload', 'disk_offload'])
@torch.no_grad()
def test_accelerate(tmp_path, offload):
    accelerate = pytest.importorskip('accelerate')
    model, x = tiny(), images()
    expected = model(x)
    folder = (tmp_path,) if offload == 'disk_offload' else ()
    model = getattr(accelerate, offload)(model, *folder, execution_device='cpu')
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize('method', ['LayerGradCam', 'LayerConductance'])
def test_captum(method):
    attribution = getattr(pytest.importorskip('captum.attr'), method)
    model, x = tiny(), images()
    for name, layer in layers(model, nn.Conv2d).items():
        if name.startswith(('stages.3', 'head_proj')):
            scores = attribution(model, layer).attribute(x, target=0)
            assert scores.isfinite().all() and scores.abs().sum() > 0, name


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


@pytest.mark.soak
def test_thop():
    """thop counts layers by their exact type, so it misses attention's products and timm's LayerNorm2d."""
    thop = pytest.importorskip('thop')
    model = counted(True)
    macs, parameters = thop.profile(model, inputs=(torch.zeros(1, 3, 160, 160),), verbose=False)
    assert macs == pytest.approx(profile_flops.profile('cmt_ti')['macs'], rel=0.06)
    uncounted = [p for m in model.modules() if isinstance(m, LayerNorm2d) for p in m.parameters()]
    uncounted += [stage.position_bias for stage in model.stages]
    assert parameters == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in uncounted)


@pytest.mark.soak
@pytest.mark.parametrize('backend, fused, allowed', [
    ('pytorch', True, 0.06), ('aten', True, 0.06), ('aten', False, 0.01)])
def test_ptflops(backend, fused, allowed):
    ptflops = pytest.importorskip('ptflops')
    macs, parameters = ptflops.get_model_complexity_info(
        counted(fused), (3, 160, 160), backend=backend, as_strings=False, print_per_layer_stat=False)
    expected = profile_flops.profile('cmt_ti')
    assert macs == pytest.approx(expected['macs'], rel=allowed) and parameters == expected['params']


@pytest.mark.soak
@pytest.mark.parametrize('fused, allowed', [(True, 0.06), (False, 0.01)])
def test_fvcore(fused, allowed):
    fvcore = pytest.importorskip('fvcore.nn')
    counts = fvcore.FlopCountAnalysis(counted(fused), torch.zeros(1, 3, 160, 160)).by_operator()
    macs = counts['conv'] + counts['linear'] + counts['matmul']  # norms, which the paper does not count, are 1.2 %
    assert macs == pytest.approx(profile_flops.profile('cmt_ti')['macs'], rel=allowed)


@pytest.mark.soak
def test_torchinfo():
    """torchinfo counts a linear layer once an image, not once a token: 0.75 of CMT-Ti, 0.2 of timm's pvt_v2_b0."""
    torchinfo = pytest.importorskip('torchinfo')
    summary, expected = torchinfo.summary(counted(True), (1, 3, 160, 160), verbose=0), profile_flops.profile('cmt_ti')
    assert summary.total_params == expected['params']
    assert 0.7 * expected['macs'] < summary.total_mult_adds < expected['macs']

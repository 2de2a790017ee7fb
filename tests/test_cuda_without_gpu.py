"""Steps, evaluation and attention on a CUDA device that does not exist (fake_cuda.py).

The memory and the bytes of docs/performance.md:

    pytest -m soak -s tests/test_cuda_without_gpu.py
"""
import collections
import re
import sys
import time
import types
from unittest import mock

import pytest
import timm
import torch

import cmt
import engine
import nano
import options
import processes
import train
from fake_cuda import CUDA, ROOT, Engine, PeakMemory, Recorder, attention, fake_cuda, real
from loader import ValidationDataset

MEAN_OR_STD = 'cpu', 'cuda', torch.float32, torch.float32, False, False  # a copy at the start of an evaluation
PRODUCTS = 'convolution', 'convolution_backward', 'addmm', 'mm', '_scaled_dot_product_efficient_attention'
PREDICTIONS = 3 * 8 * (1 + 5 + 5)  # values read after three batches: targets, classes and probabilities


class Data:
    classes = [str(i) for i in range(1000)]

    def __len__(self):
        return 4096


def build(*flags):
    """Build a run of fake tensors as train.py does."""
    args = options.parse_args(
        ['--model', 'cmt_nano', '--input-size', '64', '--batch-size', '8', '--num-workers', '0', *flags])
    with real():
        model = train.load_model(args, train.InitialState(None, None, None), Data.classes, CUDA)
    run = train.build_run(args, model, Data(), Data(), CUDA)
    run.stop = types.SimpleNamespace(signal=0)
    return run


class Batches(list):
    """A loader of batches on the host."""
    batch_size = 8

    @property
    def dataset(self):
        return ValidationDataset(Images(self.batch_size * len(self)))


class Images(Data):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


def batches(args, count):
    size = args.input_size
    return Batches([(torch.empty(args.batch_size, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
             torch.zeros(args.batch_size, dtype=torch.int64)) for _ in range(count)])


def of_batches(count):
    """The copies of batches to the device."""
    return {('cpu', 'cuda', dtype, dtype, True, True): count for dtype in (torch.uint8, torch.int64)}


def record_step(*flags, accum=1, has_bfloat16=True):
    """Return what the second step of a run does."""
    with fake_cuda(has_bfloat16):
        run, meters = build(*flags), engine.Meters(CUDA, [[0.] * len(engine.Meters.NAMES)])
        run.train_step.model.train()
        group = batches(run.args, accum)
        for step in range(2):
            attention.calls.clear()
            with Recorder(group) as record:
                run.train_step(group, 0, step, meters)
    return record


@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_engine_in_python_equals_torchs(checkpointing):
    def gradients(backward):
        torch.manual_seed(0)
        model = timm.create_model('cmt_nano', num_classes=5, img_size=64, drop_path_rate=0.2).train()
        model.set_grad_checkpointing(checkpointing)
        backward(model(torch.randn(4, 3, 64, 64)).square().sum())
        return [p.grad for p in model.parameters()]

    python = Engine()
    expected = gradients(torch.Tensor.backward)
    with mock.patch.object(torch._C, '_current_graph_task_id', lambda: python.task):
        assert nano.same(gradients(python.backward), expected)


@pytest.mark.parametrize('accum, flags', [
    (1, ''), (2, '--grad-checkpointing --on-nonfinite skip'), (1, '--amp-dtype float16 --clip-grad 1'),
    (1, '--amp-dtype float16 --fast-norm --mixup 0 --cutmix 0 --smoothing 0 --remode const'),
    (1, '--clip-grad 1 --clip-mode agc --no-model-ema --freeze-stages 1 --remode rand'),
    (1, '--distillation-type soft --teacher-model cmt_nano --clip-grad 1 --clip-mode value'),
])
def test_a_step_stays_on_the_device(accum, flags, monkeypatch):
    """Two copies of a batch, no wait, and 16 bits in every product."""
    def build_teacher(name, *_):
        with real():
            return timm.create_model(name, num_classes=1000, img_size=64).to('cpu')

    monkeypatch.setattr(train, 'build_teacher', build_teacher)
    record = record_step(*flags.split(), accum=accum)
    assert record.copies == of_batches(accum) and not record.syncs and not record.scalars
    assert record.launches['sub_'] == accum  # The whole batch is normalized at once.
    dtype = getattr(torch, flags.split()[1]) if 'amp-dtype' in flags else torch.bfloat16
    assert record.float64 - ({'engine.py:__call__'} if dtype == torch.float16 else set()) == {'engine.py:add'}
    assert {name: record.dtypes[name] for name in PRODUCTS} == dict.fromkeys(PRODUCTS, {dtype})
    assert record.dtypes['gelu'] == record.dtypes['silu'] == {dtype}
    assert record.dtypes['native_layer_norm'] == {dtype if 'fast-norm' in flags else torch.float32}
    assert record.dtypes['_log_softmax_backward_data'] == {torch.float32}
    for call in attention.calls:
        assert call.dtype == dtype and call.is_fused and call.is_aligned and call.batch == 1
    if dtype == torch.float16:  # Without a driver, torch takes bfloat16 convolutions for slow ones with NCHW outputs.
        assert record.layouts == {True}


@pytest.mark.parametrize('flags, has_bfloat16', [([], False), (['--apex-amp'], True)])
def test_float16_scales_the_loss(flags, has_bfloat16, monkeypatch):
    """On a device that emulates bfloat16, and where apex is not installed."""
    monkeypatch.setitem(sys.modules, 'apex', None)
    record = record_step(*flags, has_bfloat16=has_bfloat16)
    assert record.dtypes['convolution'] == {torch.float16}
    assert record.launches['_amp_foreach_non_finite_check_and_unscale_'] and record.launches['_amp_update_scale_']


@pytest.fixture
def one_rank(monkeypatch):
    """Ranks agree by tensors on the CPU, whose values are missing here."""
    monkeypatch.setattr(processes, 'all_reduce_max', lambda value: value)


def test_an_epoch_waits_only_for_its_figures(one_rank, monkeypatch):
    """The meters are read after the steps of --print-freq and at the end."""
    monkeypatch.setattr(Data, '__len__', lambda data: 24)
    with fake_cuda():
        run = build('--print-freq', '2')
        assert train.loader_options(run.args, CUDA)['pin_memory']
        run.train_loader = batches(run.args, 3)
        with Recorder(run.train_loader) as record:
            assert train.train_epoch(run)
    assert run.state.step == 3 and record.copies == of_batches(3)
    number = len(engine.Meters.NAMES)
    assert record.syncs == {'engine.py:read': 2 * number, 'engine.py:gather': number}


def check_evaluation(record, count):
    """Two copies of each batch, 16 bits in the model, float32 for the scores."""
    assert {key: n for key, n in record.copies.items() if key != MEAN_OR_STD} == of_batches(count)
    assert not record.scalars and record.float64 <= {'engine.py:evaluate'} and record.layouts == {True}
    assert record.dtypes['convolution'] == record.dtypes['addmm'] == {torch.float16}
    assert record.dtypes['topk'] | record.dtypes['cross_entropy_loss'] <= {torch.float32}
    assert attention.calls and not any(call.has_grad for call in attention.calls)


def of_files(places):
    counts = collections.Counter()
    for place, count in places.items():
        counts[place.split(':')[0]] += count
    return counts


@pytest.mark.parametrize('flags', [[], ['--model-ema-force-cpu']])
def test_an_evaluation_waits_once(flags, one_rank):
    """The sums of the model are read at its end, and so are those of the EMA, which may come from host memory."""
    with fake_cuda():
        run = build('--amp-dtype', 'float16', *flags)
        run.val_loader, run.saved_at = batches(run.args, 3), time.monotonic()
        with Recorder(run.val_loader, answer=1) as record:
            assert set(train.evaluate_epoch(run)) == {'', 'ema_'}
        ema = [key for key in record.copies if key[:2] == ('cpu', 'cuda') and not key[-1] and key != MEAN_OR_STD]
        assert bool(ema) == bool(flags)
        for key in ema:
            del record.copies[key]
        check_evaluation(record, 6)
        assert of_files(record.syncs) == {'engine.py': 2 * 4, 'evaluation.py': 2 * PREDICTIONS}


def test_throughput_is_measured_on_the_device(monkeypatch):
    with fake_cuda(), mock.patch.object(torch.cuda, 'synchronize') as synchronize:
        run = build('--amp-dtype', 'float16', '--throughput', '--resume', 'x.pth')
        loader = batches(run.args, 3)
        monkeypatch.setattr(train, 'build_val_loader', lambda *args: loader)
        with Recorder(loader, answer=1) as record:
            train.score_only(run.args, run.core, Data(), CUDA)
        check_evaluation(record, 1)
    assert not record.syncs and synchronize.call_count == 2


@pytest.mark.parametrize('name', ['cmt_ti', 'cmt_xs', 'cmt_s', 'cmt_b'])
def test_published_models_get_fused_attention(name):
    """At the published size, and with fewer blocks at 224 px and at a size of the call."""
    for dtype, settings in ((torch.bfloat16, {}), (torch.float16, dict(img_size=224, depths=(1,) * 4)),
                            (torch.bfloat16, dict(dynamic_img_size=True, depths=(1,) * 4))):
        with fake_cuda(), torch.autocast('cuda', dtype):
            with real():
                model = timm.create_model(name, **settings).to(CUDA)
            size = 96 if model.dynamic_img_size else model.img_size[0]
            model(torch.zeros(1, 3, size, size, device=CUDA))
        assert len(attention.calls) == sum(len(stage.blocks) for stage in model.stages)
        for call in attention.calls:
            assert call.width % 8 == 0 and call.dtype == dtype and call.is_fused and call.is_aligned


# Estimates of docs/performance.md

RECIPES = {'cmt_ti': (160, 256), 'cmt_xs': (192, 256), 'cmt_s': (224, 128), 'cmt_b': (256, 64)}  # pixels, batch
FORMS = {'16 bits': '--amp-dtype float16', '--fast-norm': '--amp-dtype float16 --fast-norm',
         '--grad-checkpointing': '--amp-dtype float16 --grad-checkpointing', 'float32': '--amp-dtype float32'}


def measure(name, form, batch, pads_heads=True):
    """Return the peak memory (GiB) of a step of a published recipe, and the bytes (GB) and number of its operators."""
    with fake_cuda() as backward:
        run = build('--config', f'{ROOT}/configs/{name}.yaml', '--no-apex-amp', '--model', name, '--input-size',
                    str(RECIPES[name][0]), '--batch-size', str(batch), *FORMS[form].split())
        meters, modules = engine.Meters(CUDA), [run.core, *([run.ema.module] if run.ema else [])]
        run.train_step.model.train()
        for module in run.core.modules():
            if isinstance(module, cmt.LMHSA) and not pads_heads:
                module.head_pad = 0
        hooks = torch.autograd.graph.saved_tensors_hooks(backward.pack, backward.unpack)
        with PeakMemory(*modules) as memory, hooks:
            for step in range(2):
                with Recorder() as record:
                    run.train_step(batches(run.args, 1), 0, step, meters)
    return memory.peak / 2 ** 30, record.bytes / 1e9, sum(record.launches.values())


@pytest.mark.soak
def test_memory_and_bytes_are_those_of_the_docs():
    """Print the tables of docs/performance.md, and compare the page with them."""
    page = (ROOT / 'docs' / 'performance.md').read_text()
    for name, (size, batch) in RECIPES.items():
        rows = {form: measure(name, form, batch) for form in FORMS}
        print(f'\n| {name} | {batch} at {size} px |', ' | '.join(
            f'{memory:.1f} / {moved:.0f}' for memory, moved, _ in rows.values()), '|')
        print(f'{name}:', ', '.join(f'{number} operators ({form})' for form, (_, _, number) in rows.items()))
        print(f'{name}: {measure(name, "16 bits", batch, pads_heads=False)[1]:.0f} GB without padded heads')
        for form in ('16 bits', '--grad-checkpointing'):
            memory = rows[form][0]
            image = (memory - measure(name, form, batch // 2)[0]) / (batch - batch // 2)  # GiB
            largest = (int((gpu - 3 - memory) / image + batch) // 8 * 8 for gpu in (16, 24, 40, 80))
            print('|', name, '|', form, '|', ' | '.join(map(str, largest)), '|')
        printed, = re.findall(rf'^\| {name} \| {batch} at {size} px \|(.*)\|$', page, re.MULTILINE)
        for figures, row in zip(printed.split('|'), rows.values(), strict=True):
            assert [float(figure) for figure in figures.split('/')] == pytest.approx(row[:2], rel=0.03)


def test_no_float64_on_devices_without_it(monkeypatch):
    assert engine.sum_dtype(torch.device('mps')) == torch.float32
    monkeypatch.setattr(engine, 'sum_dtype', lambda device: torch.float32)
    assert not record_step().float64
    with fake_cuda():
        run = build()
        with Recorder(answer=1) as record:
            train.score(run.core, batches(run.args, 1), CUDA, run.eval_autocast)
        assert not record.float64

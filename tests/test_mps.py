"""Apple's GPU without one."""
import pytest
import torch
from torch.utils.cpp_extension import load_inline

import engine
import errors
import launch
import options
import processes
import test_cuda_without_gpu as fakes
import train
from fake_cuda import Recorder, fake_cuda, real

MPS = torch.device('mps', 0)


def test_mps_is_a_choice_that_a_line_names(monkeypatch, caplog):
    alone, two = launch.Launch(), launch.Launch('torchrun', world_size=2, local_world_size=2)
    assert options.parse_args(['--device', 'mps', '--data-path', 'x']).device == 'mps'
    for device, where in (('mps', alone), ('mps', two)):
        with pytest.raises(errors.UsageError, match='--device mps'):
            processes.find_device(device, where)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    caplog.set_level('INFO')
    assert processes.find_device('mps', alone).type == 'mps' and processes.find_device('cpu', alone).type == 'cpu'
    assert not caplog.text
    assert processes.find_device(None, alone).type == ('cuda' if torch.cuda.is_available() else 'cpu')
    assert ('--device mps' in caplog.text) != torch.cuda.is_available()
    with pytest.raises(errors.UsageError, match='single process'):
        processes.find_device('mps', two)


@pytest.mark.soak
@pytest.mark.parametrize('flags', [
    '', '--amp-dtype float16 --clip-grad 1', '--amp-dtype bfloat16 --on-nonfinite skip --fast-norm',
    '--opt lamb --mixup 0 --cutmix 0', '--mixup-mode elem --remode rand'])
def test_a_step_and_an_evaluation_on_mps_have_no_float64(flags, tmp_path):
    """On fake tensors: torch for Linux has no device guard for mps, so one that does nothing is compiled."""
    guard = '''#include <torch/extension.h>
        #include <c10/core/impl/DeviceGuardImplInterface.h>
        namespace c10::impl { C10_REGISTER_GUARD_IMPL(MPS, NoOpDeviceGuardImpl<DeviceType::MPS>); }'''
    load_inline('mps_guard', cpp_sources=guard, is_python_module=False, build_directory=str(tmp_path))
    with fake_cuda():
        args = options.parse_args([
            '--model', 'cmt_nano', '--input-size', '64', '--batch-size', '8', '--num-workers', '0', *flags.split()])
        with real():
            model = train.load_model(args, train.InitialState(None, None, None), fakes.Data.classes, MPS)
        run = train.build_run(args, model, fakes.Data(), fakes.Data(), MPS)
        run.core.train()
        record = Recorder(answer=1)
        record.device = MPS
        with record:
            for step in range(2):
                run.train_step(fakes.batches(args, 1), 0, step, engine.Meters(MPS))
            train.score(run.core, fakes.batches(args, 1), MPS, run.eval_autocast)
    assert record.launches['convolution'] and not record.float64
    # The host's memory of a batch may be used again before a copy that does not block is done.
    assert record.copies and not any(key[4] for key in record.copies)

"""Apple's GPU without one."""
import pytest
import torch

import errors
import launch
import options
import processes


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

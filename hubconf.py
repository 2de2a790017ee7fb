"""Offer the models to torch.hub, under their own names and MindCV's.

    import torch
    model = torch.hub.load('path/to/this/folder', 'cmt_s', source='local', pretrained=True)

Every entry point takes the arguments of timm.create_model: num_classes, img_size, in_chans, features_only, ...
"""
import timm as _timm

import cmt as _cmt

dependencies = ['torch', 'timm']


def _entrypoint(alias: str, name: str):
    def create(pretrained: bool = False, **kwargs):
        return _timm.create_model(name, pretrained=pretrained, **kwargs)

    create.__name__, create.__doc__ = alias, getattr(_cmt, name).__doc__
    return create


for _alias, _name in {**{name: name for name in _cmt.ALIASES.values()}, **_cmt.ALIASES}.items():
    globals()[_alias] = _entrypoint(_alias, _name)

"""Offer the models to torch.hub, under their own names and MindCV's.

    import torch
    model = torch.hub.load('path/to/this/folder', 'cmt_s', source='local', pretrained=True)

Every entry point takes the model arguments of timm.create_model: num_classes, img_size, in_chans, features_only, ...
"""
from cmt import cmt_b, cmt_s, cmt_ti, cmt_xs

dependencies = ['torch', 'timm']
cmt_tiny, cmt_xsmall, cmt_small, cmt_base = cmt_ti, cmt_xs, cmt_s, cmt_b  # MindCV's names

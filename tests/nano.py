"""python tests/nano.py ARGS: train.py ARGS with `cmt_nano`, a CMT small enough for a test to train in seconds."""
import sys
from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

sys.path.insert(0, str(Path(__file__).parent.parent))
import cmt  # noqa: E402

default_cfgs = generate_default_cfgs({'cmt_nano': cmt._cfg(size=32)})


@register_model
def cmt_nano(pretrained: bool = False, **kwargs) -> cmt.CMT:
    model_args = dict(
        stem_chs=4, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), mlp_ratios=(2,) * 4,
        num_features=32, drop_rate=0.1)
    return build_model_with_cfg(
        cmt.CMT, 'cmt_nano', pretrained, pretrained_filter_fn=cmt.checkpoint_filter_fn, **dict(model_args, **kwargs))


if __name__ == '__main__':
    import train
    sys.exit(train.cli())

"""Run scripts/draw_diagram.py."""
import sys

import pytest
from PIL import Image

import draw_diagram


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'cmt.png'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['draw_diagram.py', str(path)])
        draw_diagram.main()
    return path


def test_the_card_is_opaque_and_its_corners_are_not(picture):
    image = Image.open(picture).convert('RGBA')
    alpha = image.getchannel('A')
    assert image.width == 1700 and alpha.getpixel((0, 0)) == 0
    middle = alpha.crop((50, 50, image.width - 50, image.height - 50))
    assert middle.getextrema() == (255, 255) and picture.stat().st_size < 300_000


def test_another_ending_is_refused(mistake):
    assert '.png' in mistake(draw_diagram, 'cmt.foo')

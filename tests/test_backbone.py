"""docs/backbone.md: each of its snippets runs."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SNIPPETS = {match[1]: match[2] for match in re.finditer(
    r'^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```', (ROOT / 'docs' / 'backbone.md').read_text(), re.M | re.S)}
HEAVY = {'segmentation_models_pytorch', 'transformers'}


@pytest.mark.parametrize('title', [
    pytest.param(title, marks=pytest.mark.soak) if title in HEAVY else title for title in SNIPPETS])
def test_snippet(title):
    if title in HEAVY:
        pytest.importorskip(title)
    exec(SNIPPETS[title], {})


def test_every_snippet_is_tested():
    assert set(SNIPPETS) == {'In Python: stages as features', "torchvision's detectors", *HEAVY}


@pytest.mark.soak
def test_unet_learns():
    """Twenty steps on a batch of shapes."""
    pytest.importorskip('segmentation_models_pytorch')
    exec(SNIPPETS['segmentation_models_pytorch'] + '''
torch.manual_seed(0)
images, targets = torch.randn(4, 3, 96, 96), torch.zeros(4, 96, 96, dtype=torch.int64)
for i, (image, target) in enumerate(zip(images, targets)):
    image[:, 20:60, 30:70] += 3 * (i % 2) - 1
    target[20:60, 30:70] = 1 + i % 2
optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
for step in range(20):
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses)
assert losses[-1] < 0.5 * losses[0]
''', {})

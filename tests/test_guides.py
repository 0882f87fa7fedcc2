"""What the guides show works as it stands there."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import fresh_accelerate  # noqa: F401
from tiny import tokenizer_config, write_mnist

import vgen
from vgen import hub
from vgen.training import tokenizers
from vgen.training.run import start

GUIDE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the guide's blocks of Python define, one after the other."""
    names: dict[str, Any] = {"__name__": "guide"}
    kept = hub.COMPONENTS, dict(tokenizers.FAMILIES)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)
    yield names
    hub.COMPONENTS, tokenizers.FAMILIES = kept


def test_the_sampler_of_the_guide_is_one(shown: dict[str, Any]) -> None:
    body = re.search(r"@torch.no_grad\(\)\n.*?(?=\n\n\n)", GUIDE.read_text(), re.DOTALL)
    assert body is not None and len(body[0].splitlines()) <= 30
    pipe, sampler = shown["pipe"], shown["lowest_entropy"]
    assert shown["preview"].shape == (4, 3, 28, 28)
    steps = list(sampler(pipe, "bag", [5, 6], steps=4))
    assert [int(step.known[0].sum()) for step in steps] == [12, 24, 36, 49]
    assert [step.evaluations for step in steps] == [1, 2, 3, 4]
    for earlier, later in itertools.pairwise(steps):
        assert torch.equal(earlier.tokens[earlier.known], later.tokens[earlier.known])
    alone = list(sampler(pipe, "bag", [6], steps=4))[-1].tokens
    assert torch.equal(alone[0], steps[-1].tokens[1])
    first = pipe.generator(torch.full((1, 49), pipe.generator.mask_token_id), torch.tensor([8]))
    free = pipe.generator(torch.full((1, 49), pipe.generator.mask_token_id), torch.tensor([pipe.null_class]))
    entropy = torch.distributions.Categorical(logits=torch.lerp(free, first, 3.0)).entropy()[0]
    assert set(steps[0].known[0].nonzero().flatten().tolist()) == set(entropy.argsort()[:12].tolist())


def test_the_tokenizer_of_the_guide_is_one(shown: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = shown["PatchVQ"](side=7, vocab_size=32, patch_size=4)
    codes = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        tokenizer.codebook.weight.copy_(codes)
    tokens = torch.randint(32, (3, 49), generator=torch.Generator().manual_seed(1))
    images = tokenizer.decode(tokens)
    assert images.shape == (3, 3, 28, 28) and torch.equal(tokenizer.encode(images), tokens)
    data = write_mnist(tmp_path / "data")
    model = {"side": 7, "vocab_size": 32, "patch_size": 4}
    trained = start(tokenizer_config(data, family="patches", model=model, steps=30), tmp_path / "run")
    found, _ = vgen.hub.load_tokenizer(trained)
    assert type(found) is shown["PatchVQ"]
    pictures = vgen.data.to_model_range(vgen.data.open_source("fashion-mnist", "train", 28, 1, data).images(range(16)))
    rebuilt = found.decode(found.encode(pictures))
    grey = pictures.expand_as(rebuilt)
    assert (rebuilt - grey).square().mean() < 0.8 * (grey - grey.mean()).square().mean()

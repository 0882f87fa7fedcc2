"""In-painting, out-painting and class-conditional editing: what is kept is kept exactly."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SCALES, tiny_generator, tiny_pipeline, tiny_tokenizer
from torch import Tensor

from vgen.data import to_model_range
from vgen.pipelines.editing import composite, keep_masks, to_mask, to_pixels
from vgen.pipelines.next_scale import NextScalePipeline
from vgen.types import SettingError, Step

SIZE = 16


def editor() -> NextScalePipeline:
    """Images of 16 x 16 with tokens of 4 x 4 pixels, so that seams have width."""
    return tiny_pipeline(tokenizer=tiny_tokenizer(channel_multipliers=(1, 2, 2)))


@pytest.fixture
def pipe() -> NextScalePipeline:
    return editor()


def picture(batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, 3, 16, 16) uint8."""
    return torch.randint(0, 256, (batch, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def box(top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(SIZE, SIZE)
    mask[top:bottom, left:right] = 1
    return mask


MASKS = {
    "a box on the token grid": box(4, 12, 8, 16),
    "a box off the grid": box(3, 10, 5, 6),
    "one pixel": box(7, 8, 7, 8),
    "all but a box": 1 - box(4, 12, 4, 12),
    "everything": torch.ones(SIZE, SIZE),
}


@pytest.fixture(params=MASKS.values(), ids=MASKS.keys())
def mask(request: pytest.FixtureRequest) -> Tensor:
    return request.param


def uint8(images: Tensor) -> Tensor:
    """(B, 3, S, S) floats of output_type "pt" as pixels."""
    return images.mul(255).round().to(torch.uint8)


def edit_steps(pipe: NextScalePipeline, image: Tensor, mask: Tensor, **settings: Any) -> list[Step]:
    return list(pipe.stream_edit(image, mask, **({"class_labels": 1, "seeds": [3]} | settings)))


# ---- pixels


def test_pixels_outside_the_mask_come_back_exactly(pipe: NextScalePipeline, mask: Tensor) -> None:
    image = picture()
    edited = uint8(pipe.edit(image, mask, 1, seeds=[3], output_type="pt").images)
    kept = mask == 0
    assert torch.equal(edited[..., kept], image[..., kept])
    assert not torch.equal(edited[..., ~kept], image[..., ~kept])


def test_pixels_deep_inside_the_mask_are_the_generated_ones(pipe: NextScalePipeline) -> None:
    image, mask = picture(), torch.ones(SIZE, SIZE)
    edited = uint8(pipe.edit(image, mask, 1, seeds=[3], output_type="pt").images)
    assert torch.equal(edited, pipe.decode(edit_steps(pipe, image, mask)[-1]))


def test_the_seam_is_feathered_inside_the_mask_only() -> None:
    original, generated = torch.zeros(1, 3, 6, 8, dtype=torch.uint8), torch.full((1, 3, 6, 8), 255).to(torch.uint8)
    painted = torch.zeros(6, 8, dtype=torch.bool)
    painted[:, 3:] = True
    for feather, row in {
        0: [0, 0, 0] + [255] * 5,
        1: [0, 0, 0, 128] + [255] * 4,
        2: [0, 0, 0, 85, 170] + [255] * 3,
    }.items():
        # To the picture's own border, rows and last columns, there is no seam.
        assert composite(original, generated, painted, feather).tolist() == [[[row] * 6] * 3]


def test_all_forms_of_image_and_mask_are_one(pipe: NextScalePipeline) -> None:
    image, mask = picture(), box(4, 12, 8, 16)
    array, flags = image[0].permute(1, 2, 0).numpy(), mask.bool()
    images = [image, image[0], image.float() / 255, array, array.astype(np.float32) / 255, Image.fromarray(array)]
    masks = [mask, flags, mask.numpy() * 255, flags.numpy(), mask[None, None], Image.fromarray(np.uint8(mask * 255))]
    wanted = pipe.edit(image, mask, 1, seeds=[3], output_type="pt").images
    for other_image, other_mask in zip(images, masks, strict=True):
        assert torch.equal(pipe.edit(other_image, other_mask, 1, seeds=[3], output_type="pt").images, wanted)


def test_grey_forms_of_an_image_become_three_equal_channels() -> None:
    grey = picture()[0, 0]
    for form in (grey.numpy(), grey[None], Image.fromarray(grey.numpy())):
        assert torch.equal(to_pixels(form, SIZE), grey.expand(1, 3, -1, -1))


def test_output_types_of_an_edit_agree(pipe: NextScalePipeline) -> None:
    image, mask = picture(), box(4, 12, 8, 16)
    outputs = {kind: pipe.edit(image, mask, 1, seeds=[3], output_type=kind) for kind in ("pil", "np", "pt")}
    pixels = uint8(outputs["pt"].images)
    assert np.array_equal(np.asarray(outputs["pil"].images[0]), pixels[0].permute(1, 2, 0).numpy())
    assert np.array_equal(outputs["np"].images, outputs["pt"].images.permute(0, 2, 3, 1).numpy())
    assert outputs["pil"].seeds == [3] and outputs["pil"].evaluations == len(SCALES)


# ---- masks on the token grid


def test_a_token_of_the_last_scale_is_repainted_when_any_of_its_pixels_is() -> None:
    for y, x in [(0, 0), (7, 7), (8, 3), (15, 15)]:
        kept = keep_masks(to_mask(box(y, y + 1, x, x + 1), SIZE), SCALES)[-1].view(4, 4)
        assert (~kept).nonzero().tolist() == [[y // 4, x // 4]]


def test_coarser_scales_follow_the_published_rule() -> None:
    """A bilinear resize of the kept token grid above one half keeps; fewer than four tokens are always kept."""
    token_grid = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]]).float()
    painted = 1 - token_grid.repeat_interleave(4, 0).repeat_interleave(4, 1)
    kept = keep_masks(to_mask(painted, SIZE), SCALES)
    for scale, ours in zip(SCALES, kept, strict=True):
        resized = torch.nn.functional.interpolate(token_grid[None, None], (scale, scale), mode="bilinear")
        published = (resized > 0.5).flatten() if scale**2 > 3 else torch.ones(scale**2).bool()
        assert torch.equal(ours, published)
    assert [int(item.sum()) for item in kept] == [1, 3, 6, 11]


def test_the_first_scale_is_always_kept(pipe: NextScalePipeline) -> None:
    image = picture()
    first = edit_steps(pipe, image, torch.ones(SIZE, SIZE))[0]
    assert torch.equal(first.tokens[0], pipe.tokenizer.encode(to_model_range(image))[0])
    assert [int(item.sum()) for item in keep_masks(torch.ones(SIZE, SIZE).bool(), SCALES)] == [1, 0, 0, 0]


# ---- tokens


def test_kept_tokens_are_requantised_against_what_was_generated(pipe: NextScalePipeline, mask: Tensor) -> None:
    """The closed loop: at every scale the kept cells hold the nearest codes of what is left of the source."""
    image = picture()
    tokenizer = pipe.tokenizer
    source = tokenizer.encode_latent(to_model_range(image))
    steps = edit_steps(pipe, image, mask)
    latents = [tokenizer.new_latent(1)] + [step.latent for step in steps]
    for k, kept in enumerate(keep_masks(mask.bool(), SCALES)):
        given = tokenizer.quantize_scale(source - latents[k], k)
        assert torch.equal(steps[-1].tokens[k][:, kept], given[:, kept])


def test_repainted_tokens_are_those_the_model_draws(pipe: NextScalePipeline) -> None:
    """With everything repainted but the first scale, the rest is sampling given that scale: teacher-forced greedy."""
    tokens = edit_steps(pipe, picture(), torch.ones(SIZE, SIZE), temperature=0, guidance_scale=1.0)[-1].tokens
    logits = pipe.logits(tokens, [1]).split([side * side for side in SCALES], dim=1)
    assert all(torch.equal(tokens[k], logits[k].argmax(-1)) for k in range(1, len(SCALES)))


def test_keeping_everything_is_encoding(pipe: NextScalePipeline) -> None:
    """A mask of nothing is refused by `edit`; dictating every token reproduces the encoder's."""
    images = picture(2)
    source = pipe.tokenizer.encode_latent(to_model_range(images))

    def dictate(scale: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        given = pipe.tokenizer.quantize_scale(source - latent, scale)
        return torch.ones_like(given, dtype=torch.bool), given

    for settings in ({}, {"more_smooth": True}, {"guidance_scale": 1.0}):
        *_, last = pipe.stream([0, 1], seeds=[0, 1], dictation=dictate, **settings)
        wanted = pipe.tokenizer.encode(to_model_range(images))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(last.tokens, wanted, strict=True))
        torch.testing.assert_close(last.latent, pipe.tokenizer.latent(wanted), rtol=0, atol=1e-5)


def test_seeds_repeat_an_edit_and_others_change_it(pipe: NextScalePipeline) -> None:
    image, mask = picture(), box(0, 8, 0, 16)
    first, again, other = (edit_steps(pipe, image, mask, seeds=[seed])[-1].tokens for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_one_image_gives_as_many_versions_as_labels_or_seeds(pipe: NextScalePipeline) -> None:
    image, mask = picture(), box(4, 12, 8, 16)
    together = pipe.edit(image, mask, [0, 1, 2], seeds=[5, 6, 7], output_type="pt").images
    assert together.shape == (3, 3, SIZE, SIZE)
    for row, (label, seed) in enumerate([(0, 5), (1, 6), (2, 7)]):
        alone = pipe.edit(image, mask, label, seeds=[seed], output_type="pt").images
        assert torch.equal(together[row : row + 1], alone)


def test_several_images_are_edited_side_by_side(pipe: NextScalePipeline) -> None:
    images, mask = picture(2), box(4, 12, 8, 16)
    together = pipe.edit(images, mask, [0, 1], seeds=[5, 6], output_type="pt").images
    alone = pipe.edit(images[1], mask, 1, seeds=[6], output_type="pt").images
    assert torch.equal(together[1:], alone)


def test_editing_without_a_class_needs_no_second_branch(pipe: NextScalePipeline) -> None:
    seen: list[int] = []
    pipe.generator.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    pipe.edit(picture(), box(4, 12, 8, 16), seeds=[3])
    assert seen == [1] * len(SCALES)


def test_the_steps_of_an_edit_can_be_decoded(pipe: NextScalePipeline) -> None:
    for k, step in enumerate(edit_steps(pipe, picture(), box(4, 12, 8, 16))):
        assert step.index == k and pipe.decode(step).shape == (1, 3, SIZE, SIZE)


# ---- mistakes


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (torch.zeros(3, 8, 8), box(0, 4, 0, 4), "the image is 8x8, this model edits 16x16: resize or crop"),
        (torch.zeros(3, 16, 12), box(0, 4, 0, 4), "the image is 12x16, this model edits 16x16"),
        (Image.new("RGB", (32, 8)), box(0, 4, 0, 4), "the image is 32x8, this model edits 16x16"),
        (torch.full((3, 16, 16), 1.5), box(0, 4, 0, 4), r"must lie in \[0, 1\]"),
        (torch.full((3, 16, 16), -0.1), box(0, 4, 0, 4), r"must lie in \[0, 1\]"),
        (torch.full((3, 16, 16), float("nan")), box(0, 4, 0, 4), r"must lie in \[0, 1\]"),
        ("photo.png", box(0, 4, 0, 4), "image is a str"),
        (picture(), torch.zeros(16, 16), "the mask is empty: mark what to repaint"),
        (picture(), torch.ones(8, 8), r"the mask has shape \(8, 8\), the image is 16x16"),
        (picture(), np.ones((16, 16, 3)), r"the mask has shape \(16, 16, 3\)"),
        (picture(), Image.new("L", (16, 15), 255), r"the mask has shape \(15, 16\)"),
    ],
)
def test_bad_images_and_masks_are_refused(pipe: NextScalePipeline, image: Any, mask: Any, message: str) -> None:
    for edit in (pipe.edit, pipe.stream_edit):
        with pytest.raises(SettingError, match=message):
            edit(image, mask, 1, seeds=[3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_type": "latent"}, "edit composites pixels"),
        ({"top_k": -1}, "top_k is -1"),
        ({"class_labels": 3}, r"class 3 is outside 0\.\.2"),
        ({"output_type": "gif"}, "gif"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(pipe: NextScalePipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        pipe.edit(picture(), box(4, 12, 8, 16), **({"seeds": [3]} | settings))


@pytest.mark.parametrize(("images", "labels"), [(2, [0]), (2, [0, 1, 2])])
def test_images_and_labels_must_match(pipe: NextScalePipeline, images: int, labels: list[int]) -> None:
    with pytest.raises(SettingError, match=rf"{images}.*{len(labels)}|{len(labels)}.*{images}"):
        list(pipe.stream_edit(picture(images), box(4, 12, 8, 16), labels, seeds=list(range(len(labels)))))


def test_without_a_tokenizer_the_remedy_is_named() -> None:
    with pytest.raises(SettingError, match="no tokenizer"):
        NextScalePipeline(None, tiny_generator()).edit(picture(), box(4, 12, 8, 16), 1, seeds=[3])


# ---- live steps


def test_the_last_step_of_a_streamed_edit_is_composited_as_edit_does(pipe: NextScalePipeline, mask: Tensor) -> None:
    image = picture()
    steps = edit_steps(pipe, image, mask)
    whole = uint8(pipe.edit(image, mask, 1, seeds=[3], output_type="pt").images)
    assert torch.equal(pipe.blend_edit(image, mask, steps[-1]), whole)
    kept = mask == 0
    for step in steps:  # nor is a kept pixel touched on the way
        assert torch.equal(pipe.blend_edit(image, mask, step)[..., kept], image[..., kept])

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from qandc_core.evaluation.demo import NAIVE, RECOMMENDED
from qandc_core.evaluation.figure import (
    CAPTION,
    LABEL_WIDTH,
    LIGHT,
    MARGIN,
    FigureRow,
    comparison_figure,
    difference,
    timeline,
    to_pil,
)

SIZE, GAP = 24, 4
TOP, LEFT = 2 * MARGIN + CAPTION, 2 * MARGIN + LABEL_WIDTH
FLAGS = [True, False, False, True, False]


def pixels(picture):
    return np.asarray(picture)


def images(count=2, seed=0, side=8):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def strip_box(count, top):
    return (LEFT, top, LEFT + count * (SIZE + GAP) - GAP, top + SIZE)


def row(x, flags=FLAGS, title="row"):
    return FigureRow(title, "1.0 s", x, flags)


def test_to_pil_values_are_exact_at_the_images_own_size():
    levels = torch.arange(3 * 8 * 8).view(1, 3, 8, 8) % 256
    strip = pixels(to_pil(levels / 127.5 - 1, 8))
    assert np.array_equal(strip, levels[0].permute(1, 2, 0).numpy())


def test_to_pil_clamps_values_outside_the_range():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5).expand(1, 3, 5, 5)
    assert pixels(to_pil(x, 5))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_to_pil_puts_images_side_by_side_in_order_with_white_between():
    x = images(3)
    strip = pixels(to_pil(x, 8))
    assert strip.shape == (8, 3 * 8 + 2 * GAP, 3)
    for i in range(3):
        at = i * (8 + GAP)
        assert np.array_equal(strip[:, at : at + 8], pixels(to_pil(x[i : i + 1], 8)))
        assert (strip[:, at + 8 : at + 8 + GAP] == 255).all()


@pytest.mark.parametrize("factor", [2, 3])
def test_to_pil_enlarges_without_smoothing(factor):
    x = images(1)
    enlarged, plain = pixels(to_pil(x, 8 * factor)), pixels(to_pil(x, 8))
    assert np.array_equal(enlarged, plain.repeat(factor, 0).repeat(factor, 1))


def test_to_pil_shrinks_by_the_mean():
    x = images(1)
    expected = ((x.view(3, 4, 2, 4, 2).mean((2, 4)) + 1) * 127.5).round().permute(1, 2, 0)
    assert np.abs(pixels(to_pil(x, 4)).astype(int) - expected.numpy()).max() <= 1


@settings(max_examples=30, deadline=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=100), width=st.integers(300, 900))
def test_timeline_has_one_segment_for_each_step_in_its_colour(flags, width):
    bar = pixels(timeline(flags, width))
    assert bar.shape == (8, width, 3) and (bar == bar[:1]).all()
    centres = [(width * i // len(flags) + width * (i + 1) // len(flags) - 2) // 2 for i in range(len(flags))]
    assert [tuple(bar[0, c]) for c in centres] == [LIGHT.computed if flag else LIGHT.reused for flag in flags]
    assert {tuple(colour) for colour in bar[0]} <= {LIGHT.computed, LIGHT.reused, LIGHT.paper}
    # A pixel of paper parts neighbours of the same colour.
    assert sum(tuple(colour) == LIGHT.paper for colour in bar[0]) >= len(flags) - 1


def test_difference_is_black_where_equal_and_grows_with_the_error():
    x = images()
    assert (difference(x, x, 4.0) == -1).all()
    shifted = difference(torch.full((1, 3, 4, 4), 0.25), torch.zeros(1, 3, 4, 4), 4.0)
    torch.testing.assert_close(shifted, torch.zeros(1, 3, 4, 4))
    assert torch.equal(difference(x, -x, 4.0), difference(-x, x, 4.0))
    assert (difference(x, -10 * x.sign(), 4.0) == 1).all()


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 10])
def test_figure_size(rows, count):
    figure = comparison_figure([row(images(count, seed)) for seed in range(rows)], "title", size=SIZE)
    first, other = SIZE + 16 + MARGIN, 2 * SIZE + GAP + 16 + MARGIN
    assert figure.width == 3 * MARGIN + LABEL_WIDTH + count * (SIZE + GAP) - GAP
    assert figure.height == TOP + first + (rows - 1) * other + MARGIN
    assert figure.mode == "RGB"


def test_identical_images_give_a_black_difference_strip():
    x = images(2)
    figure = comparison_figure([row(x), row(x.clone())], "title", size=SIZE)
    second = TOP + SIZE + 16 + MARGIN
    strip = pixels(figure.crop(strip_box(2, second + SIZE + GAP)))
    assert (strip[:, :SIZE] == 0).all() and (strip[:, SIZE + GAP :] == 0).all()
    assert np.array_equal(pixels(figure.crop(strip_box(2, TOP))), pixels(figure.crop(strip_box(2, second))))


def test_rows_show_their_images_their_difference_from_the_first_and_their_steps():
    stacks = [images(2, seed) for seed in range(3)]
    flags = [[True] * 5, FLAGS, [True, False, True, False, True]]
    figure = comparison_figure([row(x, f) for x, f in zip(stacks, flags)], "title", size=SIZE, gain=2.0)
    top = TOP
    for i, x in enumerate(stacks):
        assert np.array_equal(pixels(figure.crop(strip_box(2, top))), pixels(to_pil(x, SIZE, LIGHT)))
        bottom = top + SIZE
        if i:
            shown = pixels(figure.crop(strip_box(2, top + SIZE + GAP)))
            assert np.array_equal(shown, pixels(to_pil(difference(x, stacks[0], 2.0), SIZE, LIGHT)))
            bottom += SIZE + GAP
        width = 2 * SIZE + GAP
        bar = figure.crop((LEFT, bottom + 6, LEFT + width, bottom + 14))
        assert np.array_equal(pixels(bar), pixels(timeline(flags[i], width)))
        top = bottom + 16 + MARGIN


def test_a_row_without_flags_has_no_timeline_and_changes_nothing_else():
    x = images(2)
    bare, marked = (comparison_figure([row(x, flags)], "title", size=SIZE) for flags in ((), FLAGS))
    assert bare.size == marked.size
    differs = np.argwhere((pixels(bare) != pixels(marked)).any(2))
    assert (differs[:, 0] >= TOP + SIZE).all() and len(differs) > 0
    colours = {tuple(c) for c in pixels(bare)[TOP + SIZE :].reshape(-1, 3)}
    assert not {LIGHT.computed, LIGHT.reused} & colours


def test_the_figure_title_is_never_cut():
    title = "a title much wider than a single small image and its label together"
    figure = comparison_figure([row(images(1))], title, size=SIZE)
    blank = comparison_figure([row(images(1))], "", size=SIZE)
    assert figure.width >= 2 * MARGIN + ImageFont.load_default(17).getlength(title) - 1
    # Smoothed letters may reach a pixel over their width.
    assert (pixels(figure)[:TOP, 2 - MARGIN :] == LIGHT.paper).all() and figure.width > blank.width


@pytest.mark.parametrize("title", [RECOMMENDED.name, NAIVE.name, "full precision, 50 steps"])
def test_the_demos_row_titles_fit_beside_the_images(title):
    assert ImageFont.load_default(17).getlength(title) <= LABEL_WIDTH

"""The training of the built-in model: its pictures, resuming, the judge. On a few made-up drawings, at tiny sizes."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.training import evaluate, judge, prepare
from benchmarks.training.classes import CLASSES
from benchmarks.training.drawings import (
    Drawings,
    augment,
    balanced_draw,
    contrasting_ground,
    hue_rotation,
    load_drawings,
    pastel,
    save_drawings,
    warped,
)
from benchmarks.training.train import (
    CHECKPOINT,
    LOG,
    PICTURES_CONFIG,
    WEIGHTS,
    Reporting,
    TrainConfig,
    Training,
    picture_grid,
    stratified_timesteps,
    timestep_density,
    train,
)
from benchmarks.training.train import main as train_main
from qandc_core import generate, load_dit
from qandc_core.demo.judge import load_judge
from qandc_core.diffusion.schedule import linear_alpha_bar

TINY = TrainConfig(
    images=8 * 40, batch=8, warmup=4, compile=False, bf16=False,
    model=replace(PICTURES_CONFIG, patch_size=8, hidden_size=32, depth=2, num_heads=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def drawings():
    """A disc for every class, of its own colour, by two artists; class 0 has four."""
    axis = torch.linspace(-1, 1, 64)
    inside = (axis[:, None].square() + axis[None].square() < 0.5).float()
    labels = torch.cat([torch.arange(len(CLASSES)).repeat(2), torch.zeros(2, dtype=torch.long)])
    colours = torch.rand(len(labels), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    pictures = torch.cat([colours * inside, inside.expand(len(labels), 1, 64, 64)], 1)
    packages = torch.arange(len(labels)) // len(CLASSES)
    return Drawings((255 * pictures).byte(), labels, packages)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_augmented_pictures_are_in_range_and_follow_the_generator(drawings):
    indices = balanced_draw(drawings, 64, seeded())
    pictures = augment(drawings, indices, seeded(1))
    assert pictures.shape == (64, 3, 32, 32) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    assert torch.equal(pictures, augment(drawings, indices, seeded(1)))
    assert not torch.equal(pictures, augment(drawings, indices, seeded(2)))


def test_a_drawing_gives_many_pictures(drawings):
    same = augment(drawings, torch.zeros(16, dtype=torch.long), seeded())
    assert torch.pdist(same.flatten(1)).min() > 1


def test_colour_never_exceeds_alpha(drawings):
    colour, alpha = warped(drawings, torch.arange(len(drawings)), seeded())
    assert (colour >= 0).all() and (colour <= alpha).all() and alpha.max() <= 1


def test_every_class_is_drawn_as_often_however_many_drawings_it_has(drawings):
    drawn = drawings.labels[balanced_draw(drawings, 40_000, seeded())]
    counts = drawn.bincount(minlength=len(CLASSES))
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_turning_the_hue_keeps_grey_and_comes_round():
    grey = torch.full((3,), 0.4)
    matrices = hue_rotation(torch.tensor([0.0, 1.0, 2 * torch.pi / 3, 2 * torch.pi]))
    torch.testing.assert_close(matrices @ grey, grey.expand(4, 3))
    torch.testing.assert_close(matrices[[0, 3]], torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrices[2] @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-5, rtol=0)


def test_grounds_are_light_and_differ_from_the_drawing():
    grounds = pastel(500, seeded())
    assert grounds.min() >= 0.4 and grounds.max() <= 1 and grounds.amax(1).min() >= 0.85
    colour, alpha = torch.tensor([1.0, 1.0, 0.5]).view(1, 3, 1, 1).expand(500, 3, 4, 4), torch.ones(500, 1, 4, 4)
    chosen = contrasting_ground(colour, alpha, seeded())[..., 0, 0]
    yellow = colour[0, :, 0, 0]
    assert (chosen - yellow).norm(dim=1).mean() > 1.2 * (grounds - yellow).norm(dim=1).mean()


def test_drawings_come_back_from_their_file(drawings, tmp_path):
    save_drawings(drawings, tmp_path / "d.safetensors", {"@some/package": "1.0, MIT"})
    for name, value in vars(load_drawings(tmp_path / "d.safetensors")).items():
        assert torch.equal(value, getattr(drawings, name))
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


# --- preparing them ---------------------------------------------------------------------------------------------------


def test_a_drawing_is_centred_and_its_edge_keeps_its_colour():
    picture = np.zeros((50, 100, 4), np.uint8)
    picture[10:20, 30:70] = (200, 100, 0, 255)
    found = prepare.centred(Image.fromarray(picture)).float()
    inside = found[3] > 128
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert len(columns) == 56 and len(rows) == 14
    assert abs(rows[0] - (63 - rows[-1])) <= 1 and abs(columns[0] - (63 - columns[-1])) <= 1
    partly = found[3] > 20
    torch.testing.assert_close(found[0][partly] / found[3][partly], torch.full_like(found[0][partly], 200 / 255),
                               atol=0.05, rtol=0)  # fmt: skip


def test_icons_are_found_under_their_alias():
    icons = {"width": 36, "icons": {"a": {"body": "<g/>"}}, "aliases": {"b": {"parent": "a"}}}
    assert prepare.svg_of(icons, "a") == prepare.svg_of(icons, "b")
    assert 'viewBox="0 0 36 16"' in str(prepare.svg_of(icons, "a")) and prepare.svg_of(icons, "c") is None


def test_a_missing_archive_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack @iconify-json/noto@"):
        prepare.prepare(tmp_path)


# --- training ---------------------------------------------------------------------------------------------------------


def losses(training, count):
    return [float(training.advance()) for _ in range(count)]


def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_stopped(drawings, tmp_path):
    whole = Training(TINY, drawings)
    expected = losses(whole, 12)

    first = Training(TINY, drawings)
    found = losses(first, 5)
    first.save(tmp_path / CHECKPOINT)
    torch.manual_seed(99)  # what another process would have drawn before
    second = Training(TINY, drawings)
    second.load(tmp_path / CHECKPOINT)
    found += losses(second, 7)

    assert found == expected and second.step == whole.step == 12
    for a, b in zip(whole.average.parameters(), second.average.parameters()):
        assert torch.equal(a, b)


def test_training_learns_and_leaves_what_it_promises(drawings, tmp_path):
    training = train(drawings, tmp_path, TINY, Reporting(checkpoint=0, grid=1e9, log=10))
    assert training.step == TINY.steps == 40
    text = (tmp_path / LOG).read_text()
    logged = [float(line.split("loss ")[1].split()[0]) for line in text.splitlines() if "loss " in line]
    assert len(logged) == 4 and logged[-1] < 0.7 * logged[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CHECKPOINT, LOG, WEIGHTS])

    model = load_dit(tmp_path / WEIGHTS)
    # Some of the sizes are found from the tensors; prediction and heads from the metadata.
    assert model.config == TINY.model and model.pos_embed.dtype == torch.float16
    x, _ = generate(load_dit(tmp_path / WEIGHTS, dtype=torch.float32), [0, 39], 3, 2.0, "ddim")
    assert x.shape == (2, 3, 32, 32) and x.isfinite().all()

    again = train(drawings, tmp_path, TINY)
    assert again.step == 40, "a finished run has nothing to do"


def test_a_clock_ends_a_run_with_the_rate_at_zero(drawings, tmp_path):
    long = replace(TINY, images=8 * 10**6)
    training = train(drawings, tmp_path, long, Reporting(log=1), seconds=1.5)
    assert 3 < training.step < long.steps and training.done >= 1
    rates = [float(line.split("rate ")[1].split()[0]) for line in (tmp_path / LOG).read_text().splitlines()[1:]]
    assert max(rates) > 0.9 and rates[-1] < 0.2 and (tmp_path / WEIGHTS).is_file()


def test_until_stops_and_the_same_command_goes_on(drawings, tmp_path):
    assert train(drawings, tmp_path, TINY, until=3).step == 3
    assert train(drawings, tmp_path, TINY, until=5).step == 5
    assert "from step 3 of 40" in (tmp_path / LOG).read_text()


def test_a_checkpoint_of_another_model_is_refused(drawings, tmp_path):
    train(drawings, tmp_path, TINY, until=1)
    other = replace(TINY, model=replace(TINY.model, depth=1))
    with pytest.raises(ValueError, match="another model"):
        train(drawings, tmp_path, other)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    config = TrainConfig(images=64_000, batch=64, warmup=100)
    rates = [config.rate(step) for step in range(config.steps)]
    assert rates[0] == 0.01 and rates[99:700] == [1.0] * 601
    assert rates[850] == pytest.approx(0.5) and 0 < rates[-1] < 0.01
    longer = replace(config, images=128_000)
    assert [longer.rate(step) for step in range(700)] == rates[:700]
    assert config.rate(500, done=0.85) == pytest.approx(0.5) and config.rate(999, done=0.2) == rates[999]


def test_timesteps_are_stratified():
    even = torch.full((1000,), 1e-3, dtype=torch.float64)
    t = stratified_timesteps(50, even, seeded())
    assert torch.equal(t.sort().values // 20, torch.arange(50)) and not torch.equal(t, t.sort().values)


def test_timesteps_are_normal_in_log_snr_but_for_the_uniform_part():
    alpha_bar = linear_alpha_bar()
    density = timestep_density(alpha_bar, 0.25)
    log_snr = (alpha_bar / (1 - alpha_bar)).log()
    assert float(density.sum()) == pytest.approx(1) and density.min() >= 0.25e-3
    normal = density - 0.25e-3
    within = [float(normal[log_snr.abs() < 2 * k].sum()) / 0.75 for k in (1, 2)]
    assert within == pytest.approx([0.6827, 0.9545], abs=0.01)


def test_the_command_trains_and_resumes(drawings, tmp_path, monkeypatch):
    save_drawings(drawings, tmp_path / "d.safetensors", {})
    monkeypatch.setattr("benchmarks.training.train.PICTURES_CONFIG", TINY.model)
    command = ["train", *map(str, (tmp_path / "d.safetensors", tmp_path / "run")), "--batch", "4", "--no-compile"]
    for until in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*command, "--float32", "--until", until])
        train_main()
    assert (tmp_path / "run" / "grid-000002.png").is_file()


def test_a_grid_shows_every_image_where_it_belongs():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    picture = np.asarray(picture_grid(images, 3, zoom=1))
    assert picture.shape == (12, 18, 3)
    assert [int(picture[2 + 6 * (i // 3), 2 + 6 * (i % 3), 0]) for i in range(5)] == [0, 64, 128, 191, 255]


# --- the judge and the evaluation -------------------------------------------------------------------------------------


def test_the_judge_learns_and_is_written(drawings, tmp_path, monkeypatch, capsys):
    few = drawings.where(drawings.labels < 4)
    save_drawings(few, tmp_path / "d.safetensors", {})
    monkeypatch.setattr(judge, "FOLDS", ((0,), (1,)))
    monkeypatch.setattr(sys, "argv", ["judge", str(tmp_path / "d.safetensors"), str(tmp_path / "j.safetensors"),
                                      str(tmp_path / "folds"), "--steps", "2"])  # fmt: skip
    monkeypatch.setattr(judge, "REAL", 12)
    judge.main()
    said = capsys.readouterr().out
    monkeypatch.setattr(judge, "train_judge", lambda *_: pytest.fail("what was trained is trained again"))
    judge.main()
    assert capsys.readouterr().out == said
    assert said.count("not trained on") == 2 and "held-out artists" in said
    assert {p.name for p in (tmp_path / "folds").iterdir()} == {"fold-0.safetensors", "fold-1.safetensors"}
    model, real = load_judge(tmp_path / "j.safetensors")
    assert real["reference"].shape == real["floor"].shape == (12, 64)
    images = augment(few, torch.arange(len(few)), seeded())
    for one, other in zip(judge.classify(model, images, batch=3), judge.classify(model, images)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_third_of_what_the_judge_learns_from_is_spoiled_and_is_none_of_the_things(drawings):
    config = judge.JudgeConfig(batch=20, spoiled=10)
    pictures, labels = judge.judged_batch(drawings, config, seeded(3))
    whole = augment(drawings, indices := balanced_draw(drawings, 30, generator := seeded(3)), generator)
    assert torch.equal(labels[:20], drawings.labels[indices[:20]]) and set(labels[20:].tolist()) == {len(CLASSES)}
    assert torch.equal(pictures[:20], whole[:20])
    changed = (pictures[20:] - whole[20:]).abs().amax(dim=(1, 2, 3))
    assert changed.min() > 0.05 and pictures.abs().max() <= 1


def test_tiles_change_places_and_nothing_else():
    pictures = torch.rand(3, 2, 32, 32, generator=seeded(1))
    moved = judge.shuffled_tiles(pictures, seeded(2))
    assert not torch.equal(moved, pictures)
    for one, other in zip(pictures, moved):
        tiles = [
            part.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
            for part in (one, other)
        ]
        assert sorted(tiles[0].tolist()) == sorted(tiles[1].tolist())


def test_the_ground_of_a_picture_is_found(drawings):
    image = torch.zeros(3, 32, 32)
    image[:, 8:24, 8:24] = 1
    torch.testing.assert_close(evaluate.ground_of(image), torch.full((3, 1, 1), 0.5))


def test_the_bank_finds_the_drawing_that_a_picture_was_made_of(drawings):
    bank = evaluate.Bank(drawings, 20, seed=0)
    image = augment(drawings, torch.tensor([7]), seeded(5))[0]
    near, picture = bank.nearest(image, 7)
    far, _ = bank.nearest(image, 7, without=7)
    assert near < far and picture.shape == image.shape
    assert near == pytest.approx(float((picture - image).square().mean().sqrt()))


def test_the_evaluation_of_a_model_that_knows_nothing(drawings, tmp_path, monkeypatch, capsys):
    save_drawings(drawings, tmp_path / "d.safetensors", {})
    train(drawings, tmp_path / "run", TINY, until=1)
    monkeypatch.setattr(judge, "REAL", 8)
    judge.save_judge(judge.PicturesJudge().eval(), drawings, tmp_path / "j.safetensors", {})
    data, model, known, out = (str(tmp_path / n) for n in ("d.safetensors", f"run/{WEIGHTS}", "j.safetensors", "out"))
    command = ["evaluate", out, "--drawings", data, "--model", model, "--judge", known, "--folds", known,
               "--each", "2", "--steps", "2", "--bank", "3", "--cfg", "2", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*command, "--only", "1"])
    evaluate.main()
    assert "recognises" not in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 2  # of each guidance
    early = load_file(tmp_path / "out" / "pictures-ddpm-2-2-1.safetensors")["images"]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    said = capsys.readouterr().out
    assert said.count("of 80") == 4 and "drawing left out" in said and "guidance 1, judges without" in said
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {"grid.png", "nearest.png"}
    (tmp_path / "again").mkdir()
    net = load_dit(model, dtype=torch.float32)
    images, labels = evaluate.sampled(net, range(2), 2, 2.0, "ddpm", tmp_path / "again")
    assert labels.tolist() == [c for c in range(40) for _ in range(2)]
    torch.testing.assert_close(images[1::2], early, rtol=1e-3, atol=1e-3)
    whole, _ = generate(net, [*range(40)] * 2, 2, 2.0, "ddpm", seed=1)
    torch.testing.assert_close(
        images, whole.clamp(-1, 1).view(2, 40, 3, 32, 32).transpose(0, 1).flatten(0, 1), rtol=1e-3, atol=1e-3
    )

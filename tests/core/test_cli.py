import argparse
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import qandc_core
from qandc_core import (
    DiT,
    DiTConfig,
    apply_cache_to_dit,
    generate,
    load_calibration,
    load_dit,
    quantize_model,
    save_dit,
)
from qandc_core.cli.main import main, parser
from qandc_core.evaluation.figure import to_pil
from qandc_core.models.layers import DIT_SKIP
from qandc_core.quantization.model import quantized_layers

COMMANDS = ("demo", "generate", "calibrate", "quantize", "experiment", "bench")
CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
SAMPLING = ["--steps", "5", "--cfg", "2"]
CLASSES = [0, 3, 4]


def saved(path, seed=0, **changes):
    torch.manual_seed(seed)
    save_dit(DiT(replace(CONFIG, **changes)), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model, other (another model) and latents (a model of four channels), all .safetensors; tests only read it."""
    folder = tmp_path_factory.mktemp("cli")
    saved(folder / "model.safetensors")
    saved(folder / "other.safetensors", seed=1)
    saved(folder / "latents.safetensors", in_channels=4, learn_sigma=True)
    return folder


def calibrate(folder, out, *options):
    sizes = ["--trajectories", "4", "--samples", "6", "--pairs", "4"]
    return main(["calibrate", "--model", f"{folder}/model.safetensors", *SAMPLING, *sizes, "--out", f"{out}", *options])


@pytest.fixture(scope="module")
def calibration(folder):
    path = folder / "calibration.safetensors"
    assert calibrate(folder, path, "--hessians") == 0
    return path


@pytest.fixture(scope="module")
def quantized(folder, calibration):
    path = folder / "quantized.safetensors"
    model = str(folder / "model.safetensors")
    assert main(["quantize", "--model", model, "--calibration", str(calibration), "--out", str(path)]) == 0
    return path


def picture(path):
    return np.asarray(Image.open(path))


def sample(folder, out, *options, model="model"):
    classes = [str(c) for c in CLASSES]
    source = folder / f"{model}.safetensors"
    return main(["generate", "--model", f"{source}", *SAMPLING, "--classes", *classes, "--out", f"{out}", *options])


# --- help -------------------------------------------------------------------------------------------------------------


def subparsers():
    return next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def printed(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0
    streams = capsys.readouterr()
    assert not streams.err
    return streams.out


def test_help_lists_every_command_and_what_it_does(capsys):
    text = printed(capsys, ["--help"])
    assert set(subparsers()) == set(COMMANDS)
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\s+\w+ \w+", text, re.M), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_option(capsys, name):
    text = " ".join(printed(capsys, [name, "--help"]).split())
    command = subparsers()[name]
    assert command.description and " ".join(command.description.split()) in text
    for action in command._actions:
        assert action.help, f"{name} {action.option_strings} has no help"
        assert all(option in text for option in action.option_strings)
        assert " ".join(action.help.split())[:40] in text
        for choice in action.choices or ():
            assert choice in text
    assert "==SUPPRESS==" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_named_in_the_help_are_the_defaults(name):
    for action in subparsers()[name]._actions:
        named = re.search(r"\(default (\w+)\)", action.help)
        if named and named[1] not in ("all",):
            assert named[1] == str(action.default), f"{name} {action.option_strings}"


def run_module(*argv):
    root = Path(qandc_core.__file__).parents[1]
    return subprocess.run([sys.executable, "-m", "qandc_core", *argv], cwd=root, capture_output=True, text=True)


def test_the_module_runs_as_a_program():
    done = run_module("--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m qandc_core ") and not done.stderr


# The module with a command in its place that takes and frees memory as layers do.
FREED = """
import resource, runpy, sys
import torch
import qandc_core.cli.main as commands

def paged_in():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def run():
    for number in range(8):
        if number == 4:
            before = paged_in()
        torch.ones(24 * 2**20)  # 96 MiB
    print(paged_in() - before)

commands.main = run
runpy.run_module("qandc_core", run_name=sys.argv[1])
if sys.argv[1] != "__main__":
    run()
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="sets what glibc has")
def test_a_command_keeps_freed_memory_and_the_library_leaves_it_to_the_process():
    root = Path(qandc_core.__file__).parents[1]
    found = {
        name: int(subprocess.run([sys.executable, "-c", FREED, name], cwd=root, capture_output=True, text=True).stdout)
        for name in ("__main__", "imported")
    }
    assert found["__main__"] < 100 and found["imported"] >= 4 * 48, found  # pages of up to 2 MiB
    done = run_module("generate", "--model", "missing.safetensors", "--classes", "0")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "qandc_core generate: no DiT checkpoint at missing.safetensors\n"


# --- bad arguments ----------------------------------------------------------------------------------------------------


def refused(capsys, argv):
    """The one sentence that answers argv. An exception that main lets through, a traceback, fails the test."""
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = stop.code
    streams = capsys.readouterr()
    assert status == 2 and not streams.out
    lines = streams.err.strip().splitlines()
    said = [line for line in lines if not line.startswith(("usage:", " "))]
    assert len(said) == 1 and "Traceback" not in streams.err, streams.err
    # The wrapped options of argparse's usage are no answer, and they come only with it.
    assert len(lines) == 1 or lines[0].startswith("usage:")
    return said[0]


GENERATE = ["generate", "--model", "{model}", "--classes", "0"]
EXPERIMENT = ["experiment", "--model", "{latents}"]
OUT = ["--out", "{new}"]

BAD = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["paint"], "invalid choice: 'paint'"),
    "unknown option": ([*GENERATE, "--colour", "red"], "unrecognized arguments: --colour red"),
    "no steps": ([*GENERATE, "--steps", "0"], "--steps: must be 1 or more, got 0"),
    "too many steps": ([*GENERATE, "--steps", "1001"], "between 1 and 1000, got 1001"),
    "steps in words": ([*GENERATE, "--steps", "many"], "invalid whole number value: 'many'"),
    "cfg in words": ([*GENERATE, "--cfg", "abc"], "invalid float value: 'abc'"),
    "cfg nan": ([*GENERATE, "--cfg", "nan"], "--cfg: must be a finite number, got nan"),
    "cfg infinite": ([*GENERATE, "--cfg", "-inf"], "must be a finite number, got -inf|expected one argument"),
    "device meta": ([*GENERATE, "--device", "meta"], "meta hold no values; leave --device out"),
    "model of NaN": (["generate", "--model", "{nan}", "--classes", "0"], "mlp.fc1.weight holds values that are not"),
    "unknown sampler": ([*GENERATE, "--sampler", "euler"], "invalid choice: 'euler'"),
    "speedup below 1": ([*GENERATE, "--speedup", "0.5"], "speedup must be 1 or more, got 0.5"),
    "speedup nan": ([*GENERATE, "--speedup", "nan"], "--speedup: must be a finite number, got nan"),
    "no computed steps": ([*GENERATE, "--computed-steps", "0"], "--computed-steps: must be 1 or more, got 0"),
    "two policies": ([*GENERATE, "--speedup", "2", "--cache-interval", "2"], "--cache-interval: not allowed with"),
    "interval 0": ([*GENERATE, "--cache-interval", "0"], "must be 1 or more, got 0"),
    "negative seed": ([*GENERATE, "--seed", "-1"], "must be 0 or more, got -1"),
    "no class": (["generate", "--model", "{model}"], "required: --classes"),
    "class too high": ([*GENERATE[:3], "--classes", "0", "6"], "class id 6 is out of range: .* 0 to 4, and 5"),
    "class below 0": ([*GENERATE[:3], "--classes", "-1"], "class id -1 is out of range"),
    "class beyond integers": ([*GENERATE[:3], "--classes", "9" * 30], "must be the number of a class"),
    "model missing": (["generate", "--model", "missing.safetensors", "--classes", "0"], "no DiT checkpoint at missing"),
    "model of text": (["generate", "--model", "{text}", "--classes", "0"], "not a DiT checkpoint"),
    "model cut": (["generate", "--model", "{cut}", "--classes", "0"], "truncated or not a safetensors file"),
    "model is a calibration": (["generate", "--model", "{calibration}", "--classes", "0"], "not a DiT"),
    "model is an empty folder": (["generate", "--model", "{empty}", "--classes", "0"], "no DiT in the folder"),
    "wrong heads": ([*GENERATE, "--num-heads", "5"], "num_heads is 2, not 5; leave that to the file"),
    "unknown device": ([*GENERATE, "--device", "abacus"], "torch has no device abacus here"),
    "device not here": ([*GENERATE, "--device", "cuda:99"], "torch has no device cuda:99 here"),
    "no picture": ([*GENERATE, "--out", "{new}.xyz"], "--out must name a picture"),
    "latents without vae": (["generate", "--model", "{latents}", "--classes", "0"], "4 channels; .* --vae"),
    "vae missing": (["generate", "--model", "{latents}", "--classes", "0", "--vae", "nowhere/vae"], "no diffusers VAE"),
    "calibration missing": ([*GENERATE, "--calibration", "missing"], "no calibration file missing; make one with"),
    "calibration cut": ([*GENERATE, "--calibration", "{cut calibration}"], "not a complete safetensors file"),
    "calibration is a model": ([*GENERATE, "--calibration", "{model}"], "not a calibration file"),
    "calibration of another": (
        ["generate", "--model", "{other}", "--classes", "0", "--calibration", "{calibration}"],
        "made for another model",
    ),
    "calibration of other steps": (
        [*GENERATE, "--cfg", "2", "--calibration", "{calibration}"],
        "fitted for --sampler ddpm --steps 5 --cfg 2 --cache-interval 3",
    ),
    "calibration of another interval": (
        [*GENERATE, *SAMPLING, "--calibration", "{calibration}", "--cache-interval", "2"], "--cache-interval 3",
    ),
    "quantize 1 bit": (["quantize", "--model", "{model}", "--w-bits", "1", *OUT], "--w-bits: must be between 2 and 8"),
    "quantize 9 bits": (["quantize", "--model", "{model}", "--a-bits", "9", *OUT], "--a-bits: must be between 2 and 8"),
    "quantize without out": (["quantize", "--model", "{model}"], "required: --out"),
    "quantize to .pt": (["quantize", "--model", "{model}", "--out", "{new}.pt"], "must end in .safetensors"),
    "quantize twice": (["quantize", "--model", "{quantized}", *OUT], "No linear layer is left"),
    "quantize with another": (
        ["quantize", "--model", "{other}", "--calibration", "{calibration}", *OUT], "made for another model",
    ),
    "gptq without calibration": (["quantize", "--model", "{model}", "--rounding", "gptq", *OUT], "need calibration"),
    "calibrate 1 bit": (["calibrate", "--model", "{model}", "--w-bits", "1", *OUT], "must be between 2 and 8"),
    "calibrate without out": (["calibrate", "--model", "{model}"], "required: --out"),
    "calibrate nothing": (["calibrate", "--model", "{model}", "--trajectories", "0", *OUT], "must be 1 or more"),
    "unknown selection": (["calibrate", "--model", "{model}", "--selection", "best", *OUT], "invalid choice: 'best'"),
    "vae without latents": (["generate", "--classes", "0", "--vae", "nowhere/vae"], "no VAE decodes; leave out --vae"),
    "judge of another model": (["experiment", "--vae", "x"], "judge of its own; leave out --vae"),
    "experiment without judges": (EXPERIMENT, "--vae, --inception and --reference; give all three"),
    "experiment without reference": ([*EXPERIMENT, "--vae", "x", "--inception", "y"], "give all three"),
    "experiment of 3 images": ([*EXPERIMENT, "--num-images", "3"], "must be 4 or more"),
    "unknown part": ([*EXPERIMENT, "--parts", "most"], "invalid choice: 'most'"),
    "bench without reused steps": (["bench", "--steps", "1"], "must be 2 or more, got 1"),
    "demo of no image": (["demo", "--images", "0"], "must be 1 or more"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(folder, calibration, quantized, tmp_path_factory):
    bad = tmp_path_factory.mktemp("bad")
    (bad / "text.txt").write_text("words")
    (bad / "empty").mkdir()
    for name in ("model", "calibration"):
        whole = (folder / f"{name}.safetensors").read_bytes()
        (bad / f"cut {name}.safetensors").write_bytes(whole[: len(whole) // 2])
    whole = load_file(folder / "model.safetensors")
    whole["blocks.1.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(whole, bad / "nan.safetensors", {"num_heads": "2"})
    return {
        "nan": bad / "nan.safetensors",
        "model": folder / "model.safetensors", "other": folder / "other.safetensors", "text": bad / "text.txt",
        "latents": folder / "latents.safetensors", "calibration": calibration, "quantized": quantized,
        "cut": bad / "cut model.safetensors", "cut calibration": bad / "cut calibration.safetensors",
        "empty": bad / "empty",
    }  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_answered_in_one_sentence(capsys, monkeypatch, tmp_path, files, case):
    monkeypatch.chdir(tmp_path)
    argv, reason = BAD[case]
    places = {**files, "new": tmp_path / "new.safetensors"}
    filled = [re.sub(r"\{([\w ]+)\}", lambda m: str(places[m[1]]), word) for word in argv]
    assert re.search(reason, refused(capsys, filled))
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_gptq_needs_a_calibration_with_hessians(folder, tmp_path, capsys):
    assert calibrate(folder, tmp_path / "plain.safetensors", "--pairs", "0", "--no-hessians") == 0
    argv = ["quantize", "--model", f"{folder}/model.safetensors", "--rounding", "gptq"]
    argv += ["--calibration", f"{tmp_path}/plain.safetensors", "--out", f"{tmp_path}/q.safetensors"]
    assert "calibrate with hessians" in refused(capsys, argv)
    assert not (tmp_path / "q.safetensors").exists()


def test_an_output_folder_that_is_a_file_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert sample(folder, tmp_path / "file" / "images.png") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("qandc_core generate: ") and str(tmp_path / "file") in said


def test_a_refusal_comes_before_the_sampling(folder, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("sampled before checking")

    for module in ("sampling.generate", "calibration.trajectories"):
        monkeypatch.setattr(f"qandc_core.{module}.ReverseProcess", never)
    model, latents = (["--model", f"{folder}/{name}.safetensors"] for name in ("model", "latents"))
    out = ["--out", f"{folder}/never.safetensors"]
    assert "--vae" in refused(capsys, ["generate", *latents, "--classes", "0"])
    assert "picture" in refused(capsys, ["generate", *model, "--classes", "0", "--out", "x.abc"])
    assert "selection" in refused(capsys, ["calibrate", *model, "--selection", "best", *out])
    assert "between 2 and 8" in refused(capsys, ["calibrate", *model, "--pairs", "0", "--a-bits", "1", *out])


# --- the commands, end to end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
def test_generate_writes_the_librarys_images(folder, tmp_path, capsys, interval):
    out = tmp_path / "new" / "images.png"
    assert sample(folder, out, "--cache-interval", str(interval), "--seed", "7") == 0
    model = apply_cache_to_dit(load_dit(folder / "model.safetensors"), interval)
    x, report = generate(model, CLASSES, 5, 2.0, seed=7)
    assert np.array_equal(picture(out), np.asarray(to_pil(x, 128)))
    streams = capsys.readouterr()
    assert streams.out == f"{out}\n"
    computed = f"{report.computed_steps} steps computed and {5 - report.computed_steps} reused"
    assert "3 images, ddpm 5 steps on cpu: " in streams.err and computed in streams.err


def test_generate_without_a_cache_is_plain_full_precision(folder, tmp_path):
    assert sample(folder, tmp_path / "images.png", "--cache-interval", "1", "--sampler", "ddim") == 0
    x, _ = generate(load_dit(folder / "model.safetensors"), CLASSES, 5, 2.0, "ddim")
    assert np.array_equal(picture(tmp_path / "images.png"), np.asarray(to_pil(x, 128)))


def test_the_same_command_twice_writes_the_same_picture(folder, tmp_path):
    for name in ("a.png", "b.png"):
        assert sample(folder, tmp_path / name, "--seed", "3") == 0
    assert sample(folder, tmp_path / "c.png", "--seed", "4") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_fused_sampling_draws_the_same_picture(folder, tmp_path):
    for interval in ("1", "3"):
        for name, options in {"plain": [], "fused": ["--fused"]}.items():
            assert sample(folder, tmp_path / f"{name}.png", "--cache-interval", interval, *options) == 0
        plain, fused = (picture(tmp_path / f"{name}.png").astype(int) for name in ("plain", "fused"))
        assert abs(fused - plain).max() <= 1


def test_generate_decodes_latents_with_the_vae(folder, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, scaling_factor=0.5,
    ).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    assert sample(folder, tmp_path / "images.png", "--vae", str(tmp_path / "vae"), model="latents") == 0
    x, _ = generate(apply_cache_to_dit(load_dit(folder / "latents.safetensors"), 3), CLASSES, 5, 2.0)
    with torch.no_grad():
        expected = to_pil(vae.decode(x / 0.5).sample, 128)
    assert np.abs(picture(tmp_path / "images.png").astype(int) - np.asarray(expected)).max() <= 1


def test_calibrate_writes_statistics_and_compensation(folder, calibration):
    model, made = load_dit(folder / "model.safetensors"), load_calibration(calibration)
    made.check_model(model)
    layers = quantized_layers(quantize_model(model, 8, 8, DIT_SKIP))
    assert set(made.statistics) == set(layers)
    assert all(s.count > 0 and s.hessian is not None for s in made.statistics.values())
    assert made.variance.factor.shape == (5, 3) and made.variance.method == "variance_match"
    assert (made.sampling.steps, made.sampling.cfg_scale, made.sampling.sampler) == (5, 2.0, "ddpm")
    assert made.notes == {"cache_interval": 3, "bits": [8, 8], "selection": "tap"}
    assert made.schedule is None


def test_calibrate_without_pairs_fits_no_compensation(folder, tmp_path):
    assert (
        calibrate(
            folder,
            tmp_path / "c.safetensors",
            "--pairs",
            "0",
            "--selection",
            "random",
            "--samples",
            "20",
            "--no-hessians",
            "--all-steps",
        )
        == 0  # fmt: skip
    )
    made = load_calibration(tmp_path / "c.safetensors")
    assert made.variance is None and made.notes["selection"] == "random"
    assert all(s.hessian is None for s in made.statistics.values())


def test_calibrate_with_optimal_steps_sets_the_schedule_that_generate_follows(folder, tmp_path, capsys):
    assert calibrate(folder, tmp_path / "c.safetensors", "--optimal-steps") == 0
    made = load_calibration(tmp_path / "c.safetensors")
    assert len(made.schedule) == 2 and made.schedule[0] == 0
    assert sample(folder, tmp_path / "images.png", "--calibration", str(tmp_path / "c.safetensors")) == 0
    model = apply_cache_to_dit(load_dit(folder / "model.safetensors"), steps=made.schedule)
    x, _ = generate(model, CLASSES, 5, 2.0, compensation=made.variance)
    assert np.array_equal(picture(tmp_path / "images.png"), np.asarray(to_pil(x, 128)))
    assert "2 steps computed and 3 reused" in capsys.readouterr().err


OTHERS = {
    "steps": ["--steps", "9", "--cfg", "2"],
    "guidance": ["--steps", "5", "--cfg", "3"],
    "sampler": [*SAMPLING, "--sampler", "ddim"],
}


@pytest.mark.parametrize("other", OTHERS)
def test_computed_steps_are_those_of_the_run_they_were_chosen_for(folder, tmp_path, capsys, other):
    path = tmp_path / "c.safetensors"
    assert calibrate(folder, path, "--optimal-steps", "--pairs", "0") == 0
    argv = ["generate", "--model", f"{folder}/model.safetensors", *OTHERS[other], "--classes", "0"]
    argv += ["--calibration", f"{path}", "--out", f"{tmp_path}/x.png"]
    said = refused(capsys, argv)
    assert "computed steps of this calibration were chosen for --sampler ddpm --steps 5 --cfg 2" in said
    assert not (tmp_path / "x.png").exists()
    assert main([*argv, "--cache-interval", "2"]) == 0, "an interval that is asked for needs no calibration's steps"


def test_an_interval_that_is_asked_for_beats_the_steps_of_a_calibration(folder, tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    assert calibrate(folder, path, "--optimal-steps", "--pairs", "0") == 0
    options = ["--calibration", f"{path}"]
    assert sample(folder, tmp_path / "a.png", *options, "--cache-interval", "1") == 0
    assert "5 steps computed and 0 reused" in capsys.readouterr().err
    assert sample(folder, tmp_path / "b.png", *options) == 0
    assert "2 steps computed and 3 reused" in capsys.readouterr().err
    for asked in (["--computed-steps", "3"], ["--speedup", "1.6"]):
        assert sample(folder, tmp_path / "c.png", *options, *asked) == 0
        assert "3 steps computed and 2 reused" in capsys.readouterr().err
    assert calibrate(folder, path, "--optimal-steps") == 0
    argv = ["generate", "--model", f"{folder}/model.safetensors", *SAMPLING, "--classes", "0", *options]
    for asked in (["--cache-interval", "1"], ["--computed-steps", "2"], ["--speedup", "2"]):
        assert "without --cache-interval" in refused(capsys, [*argv, *asked])


def test_images_that_are_not_finite_are_not_written(folder, tmp_path, capsys):
    huge = load_file(folder / "model.safetensors")
    huge["final_layer.linear.bias"] += 3e38
    save_file(huge, tmp_path / "huge.safetensors", {"num_heads": "2"})
    capsys.readouterr()
    assert sample(tmp_path, tmp_path / "y.png", model="huge") == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "y.png").exists()


FULL = """
import sys
from qandc_core.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
@pytest.mark.parametrize("command", ["generate", "quantize", "calibrate"])
def test_a_full_disk_is_said_in_one_sentence_and_the_next_run_works(folder, tmp_path, command):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    out = tmp_path / ("x.png" if command == "generate" else "x.safetensors")
    options = {
        "generate": [*SAMPLING, "--classes", "0", "1"],
        "quantize": [],
        "calibrate": [*SAMPLING, "--trajectories", "2", "--samples", "3", "--pairs", "0"],
    }[command]
    argv = [command, "--model", f"{folder}/model.safetensors", *options, "--out", f"{out}"]
    root = Path(qandc_core.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *argv], cwd=root, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"qandc_core {command}: {out} could not be written (File too large)")
    assert not list(tmp_path.iterdir())
    assert main(argv) == 0 and list(tmp_path.iterdir()) == [out]


def test_calibrating_twice_writes_the_same_file(folder, calibration, tmp_path):
    assert calibrate(folder, tmp_path / "again.safetensors", "--hessians") == 0
    assert load_calibration(tmp_path / "again.safetensors").notes == load_calibration(calibration).notes
    assert (tmp_path / "again.safetensors").read_bytes() == calibration.read_bytes()


def test_quantize_writes_the_librarys_model(folder, calibration, quantized):
    expected = load_dit(folder / "model.safetensors")
    quantize_model(expected, 8, 8, DIT_SKIP, load_calibration(calibration))
    found = load_dit(quantized)
    formats = {layer.format for layer in quantized_layers(found).values()}
    assert {(f.w_bits, f.a_bits, f.static) for f in formats} == {(8, 8, True)}
    first, second = expected.state_dict(), found.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    saved_bytes = (folder / "model.safetensors").stat().st_size - quantized.stat().st_size
    # A quarter of the weights' bytes are left; scales, sums and the longer header take a little of what is won.
    weights = sum(layer.codes.numel() for layer in quantized_layers(found).values())
    assert 0.7 * 3 * weights < saved_bytes <= 3 * weights


def test_generate_from_the_quantized_file_with_its_calibration(folder, calibration, quantized, tmp_path):
    out = tmp_path / "images.png"
    assert sample(folder, out, "--calibration", str(calibration), model="quantized") == 0
    made, model = load_calibration(calibration), load_dit(folder / "model.safetensors")
    apply_cache_to_dit(quantize_model(model, 8, 8, DIT_SKIP, made), 3)
    x, _ = generate(model, CLASSES, 5, 2.0, compensation=made.variance)
    assert np.array_equal(picture(out), np.asarray(to_pil(x, 128)))
    full, _ = generate(load_dit(folder / "model.safetensors"), CLASSES, 5, 2.0)
    assert 0 < float((x - full).norm() / full.norm()) < 0.5


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_quantize_to_four_bits(folder, calibration, tmp_path, capsys, rounding):
    out = tmp_path / "four.safetensors"
    argv = ["quantize", "--model", f"{folder}/model.safetensors", "--w-bits", "4", "--rounding", rounding]
    assert main([*argv, "--calibration", str(calibration), "--out", str(out)]) == 0
    streams = capsys.readouterr()
    before, after = map(float, re.search(r"([\d.]+) MiB before, ([\d.]+) MiB after", streams.err).groups())
    assert streams.out == f"{out}\n" and after <= before
    x, _ = generate(load_dit(out), CLASSES, 5, 2.0)
    assert x.isfinite().all()


def test_quantize_without_calibration_is_dynamic(folder, tmp_path):
    out = tmp_path / "dynamic.safetensors"
    assert main(["quantize", "--model", f"{folder}/model.safetensors", "--out", str(out)]) == 0
    assert not any(layer.format.static for layer in quantized_layers(load_dit(out)).values())


def test_bench_says_what_steps_take_in_words(folder, tmp_path, capsys):
    argv = ["bench", "--model", f"{folder}/model.safetensors", "--images", "3", "--steps", "4", "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert re.search(r"^A step takes [\d.]+ ms computed and [\d.]+ ms reused \(\d+ %\)\.$", out, re.M)
    assert re.search(r"^W8A8 computes a step [\d.]+ times as fast", out, re.M)
    result = json.loads((tmp_path / "bench-cpu.json").read_text())
    plain, quantized = result["times"]["as loaded"], result["times"]["W8A8"]
    assert min(plain["computed"], plain["reused"], quantized["computed"], quantized["reused"]) > 0
    assert quantized["weight_bytes"] < plain["weight_bytes"] and result["images"] == 3
    assert result["command"].startswith("python -m qandc_core bench --model")


def test_bench_takes_a_quantized_file_as_it_is(quantized, tmp_path, capsys):
    assert main(["bench", "--model", str(quantized), "--images", "1", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "W8A8" not in capsys.readouterr().out

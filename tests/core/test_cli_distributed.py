"""The command line under torchrun: two gloo processes give what one gives, and an error of one ends both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qandc_core
from qandc_core import DiT, DiTConfig, load_calibration, load_dit, save_dit
from qandc_core.cli.main import main
from qandc_core.quantization.model import quantized_layers

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=False)
MODEL, CALIBRATION, QUANTIZED, PICTURE = "model.safetensors", "calibration.safetensors", "w4.safetensors", "out.png"
SAMPLING = ["--steps", "6", "--cfg", "2"]
COMMANDS = [
    ["calibrate", "--model", MODEL, *SAMPLING, "--trajectories", "7", "--batch", "2", "--samples", "9", "--pairs", "5",
     "--cache-interval", "2", "--optimal-steps", "--w-bits", "4", "--out", CALIBRATION],
    ["quantize", "--model", MODEL, "--calibration", CALIBRATION, "--rounding", "gptq", "--w-bits", "4",
     "--out", QUANTIZED],
    ["generate", "--model", QUANTIZED, *SAMPLING, "--calibration", CALIBRATION, "--classes", "0", "3", "4", "1", "2",
     "--out", PICTURE],
]  # fmt: skip
WORKER = """
import json, sys
from qandc_core.cli.main import main
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""


def start(folder: Path, commands: list[list[str]]) -> subprocess.CompletedProcess:
    root = str(Path(qandc_core.__file__).parents[1])
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = clean | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (folder / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py"]
    return subprocess.run([*launch, json.dumps(commands)], env=env, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """Folders of one process and of two, with the same model and what the commands made of it, and what two said."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for folder in (alone, together):
        save_dit(model, folder / MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(alone)
        assert [main(command) for command in COMMANDS] == [0, 0, 0]
    return alone, together, start(together, COMMANDS)


def test_two_processes_write_each_file_once_and_only_the_first_tells_progress(folders):
    alone, together, done = folders
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [CALIBRATION, QUANTIZED, PICTURE]
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()} | {"worker.py"}
    for said in ("Calibrating on 7", "Fitting the variance", "Linear weights", "5 images, ddpm 6 steps"):
        assert done.stderr.count(said) == 1, done.stderr
    assert done.stderr.count("0/6") == 1  # one progress bar


def test_statistics_of_two_processes_are_those_of_one(folders):
    one, two = (load_calibration(folder / CALIBRATION) for folder in folders[:2])
    assert one.schedule == two.schedule and one.notes == two.notes and list(one.statistics) == list(two.statistics)
    for name, layer in one.statistics.items():
        other = two.statistics[name]
        assert (layer.count, layer.reach) == (other.count, other.reach), name
        for key in ("low", "high", "histogram"):
            assert torch.equal(getattr(layer, key), getattr(other, key)), (name, key)
        for key in ("mean", "hessian"):
            torch.testing.assert_close(getattr(layer, key), getattr(other, key), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.held_out, other.held_out) and len(layer.held_out)
    assert len(one.held_out) == len(two.held_out) > 0
    for call, other_call in zip(one.held_out, two.held_out):
        assert torch.equal(call.x, other_call.x) and torch.equal(call.sigma, other_call.sigma)
    torch.testing.assert_close(one.variance.factor, two.variance.factor, rtol=1e-4, atol=1e-4)
    assert not torch.equal(one.variance.factor, torch.ones_like(one.variance.factor))


def test_layers_that_two_processes_rounded_are_those_of_one(folders):
    one, two = (quantized_layers(load_dit(folder / QUANTIZED)) for folder in folders[:2])
    assert list(one) == list(two)
    for name, layer in one.items():
        same = (layer.weight_codes() == two[name].weight_codes()).float().mean()
        assert same > 0.99, name  # sums in another order may turn a tie
        for key, value in layer.state_dict().items():
            if key not in ("codes", "row_sums"):
                torch.testing.assert_close(value, two[name].state_dict()[key], rtol=1e-5, atol=1e-5)


def test_images_that_two_processes_sampled_are_those_of_one(folders):
    one, two = (np.asarray(Image.open(folder / PICTURE), dtype=int) for folder in folders[:2])
    assert one.shape == two.shape and abs(one - two).mean() < 0.5 and one.std() > 10


@pytest.mark.parametrize(
    "command, sentence",
    [
        (
            ["generate", "--classes", "0", "1", "2", "99"],
            "class id 99 is out of range",
        ),  # an image of the second process
        (["generate", "--classes", "0"], "1 images cannot be shared by 2 processes"),  # both
        (["bench"], "bench: runs in one process"),
    ],
)
def test_an_error_of_one_process_ends_both_with_its_sentence(folders, command, sentence):
    options = [] if command == ["bench"] else ["--out", "none.png"]
    done = start(folders[1], [[*command, "--model", MODEL, *SAMPLING, *options]])
    said = [line for line in done.stderr.splitlines() if line.startswith("qandc_core ")]
    assert done.returncode and len(said) == 1 and sentence in said[0], done.stderr
    assert not (folders[1] / "none.png").exists()

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import qandc_core
from qandc_core.evaluation.inception import (
    Inception,
    InceptionFeatures,
    average_pool,
    load_inception,
    preprocess_adm,
    preprocess_pytorch_fid,
    to_uint8,
)

A = "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
B = "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
C = "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch_pool " + " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
D = "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4"
E = (
    "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b "
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b branch_pool"
)
BLOCKS = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D, "7b": E, "7c": E}
STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
CONVOLUTIONS = STEM + [f"Mixed_{block}.{name}" for block, names in BLOCKS.items() for name in names.split()]
PARTS = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
PUBLISHED = {f"{name}.{part}" for name in CONVOLUTIONS for part in PARTS} | {"fc.weight", "fc.bias"}


def tiny() -> Inception:
    """A random network of a sixteenth of the channels, with statistics far from the fresh batch norm's."""
    torch.manual_seed(0)
    model = Inception(divisor=16)
    for name, value in model.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith(("bn.weight", "bn.running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            value.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> Inception:
    return tiny()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def features(model: Inception, images: torch.Tensor) -> InceptionFeatures:
    return model(images)


def test_full_width_has_the_published_names_and_shapes():
    state = Inception().state_dict()
    assert len(CONVOLUTIONS) == len(set(CONVOLUTIONS)) == 94
    assert set(state) == PUBLISHED and len(state) == 566
    # torchvision's Inception3 without the auxiliary head has 23,834,568 parameters; 8 more classes add 8 * 2049.
    assert sum(p.numel() for p in Inception().parameters()) == 23_834_568 + 8 * 2049
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_6d.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)


def hashed(name: str, value: torch.Tensor) -> torch.Tensor:
    """Weights that any machine can write again, in the range of a trained network's."""
    if name.endswith("tracked"):
        return value
    phase = torch.arange(1, value.numel() + 1, dtype=torch.float64) * (5**0.5 - 1) / 2 * (len(name) + 1)
    uniform = (phase.sin() * 43758.5453 % 1).view(value.shape).float()
    if name.endswith("conv.weight"):
        return (2 * uniform - 1) * (6 / value[0].numel()) ** 0.5
    if name.startswith("fc"):
        return (2 * uniform - 1) * 0.1
    return uniform + 0.5 if name.endswith(("weight", "var")) else (uniform - 0.5) * 0.2


def test_features_are_those_of_torch_fidelity():
    model = Inception(preprocess=preprocess_adm)
    model.load_state_dict({name: hashed(name, value) for name, value in model.state_dict().items()})
    features = model((torch.arange(3 * 48 * 64) ** 2 % 251).to(torch.uint8).view(1, 3, 48, 64))
    # Written by torch-fidelity 0.4.0 with the same weights; spatial by a hook on its Mixed_6d.branch1x1.
    pool = [0.17000160, 3.32944846, 13.32162094, 0.27518210, 2.45619726, 2.75282764, 0.01477019, 0.95124054]
    spatial = [1.64869606, 1.03543377, 0, 3.52444053, 0.65928185, 0, 1.11334360, 0.79909992, 2.76365972]
    assert features.pool[0, ::256].tolist() == pytest.approx(pool, rel=1e-4)
    assert features.spatial[0, ::225].tolist() == pytest.approx(spatial, abs=1e-4)
    assert float(features.probabilities[0, 504]) == pytest.approx(1.77823967e-09, rel=1e-3)


def test_forward_shapes(features: InceptionFeatures):
    assert features.pool.shape == (2, 2048 // 16)
    assert features.spatial.shape == (2, 17 * 17 * 7) == (2, 2023)
    assert features.probabilities.shape == (2, 1008)
    assert (features.spatial >= 0).all() and (features.spatial > 0).any()
    assert all(f.isfinite().all() and not f.requires_grad for f in vars(features).values())


def test_probabilities_leave_out_the_bias(model: Inception, features: InceptionFeatures):
    assert torch.allclose(features.probabilities.sum(1), torch.ones(2))
    assert torch.allclose(features.probabilities, (features.pool @ model.fc.weight.T).softmax(1))
    assert not torch.allclose(features.probabilities, model.fc(features.pool).softmax(1))


def test_spatial_features_are_seven_channels_of_mixed_6d_in_nhwc_order(
    model: Inception, images: torch.Tensor, features: InceptionFeatures
):
    seen: list[torch.Tensor] = []
    handle = model.Mixed_6d.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(images)
    handle.remove()
    # branch1x1 leads the concatenation of Mixed_6d.
    assert torch.equal(features.spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2), seen[0][:, :7])


def test_forward_does_not_depend_on_the_batch(model: Inception, images: torch.Tensor, features: InceptionFeatures):
    alone = model(images[1:])
    torch.testing.assert_close(alone.pool, features.pool[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.spatial, features.spatial[1:], rtol=1e-4, atol=1e-4)


def test_tensorflow_pooling_quirks(model: Inception):
    assert torch.equal(average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    x = torch.randn(1, 2048 // 16, 8, 8)
    assert torch.equal(model.Mixed_7c.pool(x), F.max_pool2d(x, 3, stride=1, padding=1))
    assert model.Mixed_7b.pool is average_pool
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3}


def test_preprocess_ranges():
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    fid, adm = preprocess_pytorch_fid(extremes), preprocess_adm(extremes)
    assert fid.shape == adm.shape == (2, 3, 299, 299)
    for values, low, high in ((fid, -1, 1), (adm, -1, 127 / 128)):
        torch.testing.assert_close(values[0], torch.full((3, 299, 299), float(low)))
        torch.testing.assert_close(values[1], torch.full((3, 299, 299), float(high)))


def test_adm_resize_reads_tensorflow_positions():
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).view(1, 1, 1, 24).expand(1, 3, 24, 24)
    row = preprocess_adm(ramp)[0, 0, 0] * 128 + 128
    # A ramp is exact under linear interpolation: position i * 24 / 299 up to the last pixel, which repeats.
    expected = (torch.arange(299) * 24 / 299).clamp_max(23) * 10
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-3)
    assert torch.equal(preprocess_adm(ramp.mT), preprocess_adm(ramp).mT)
    # pytorch-fid samples half a pixel off, which moves the ramp by (24 / 299 - 1) / 2 pixels.
    half = (preprocess_pytorch_fid(ramp)[0, 0, 0, 150] + 1) * 127.5
    assert float(half - row[150]) == pytest.approx((24 / 299 - 1) / 2 * 10, abs=1e-3)


def test_images_already_at_299_are_not_resampled():
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(preprocess_adm(images), (images.float() - 128) / 128)
    assert torch.equal(preprocess_pytorch_fid(images), images.float() / 255 * 2 - 1)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-1.5, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 128, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))


def test_float_images_are_refused(model: Inception):
    with pytest.raises(ValueError, match="reads uint8 images, not torch.float32"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("tracked", [True, False])
def test_load_round_trip(
    suffix: str, tracked: bool, model: Inception, images: torch.Tensor, features: InceptionFeatures, tmp_path: Path
):
    state = {k: v for k, v in model.state_dict().items() if tracked or "num_batches_tracked" not in k}
    path = tmp_path / f"inception{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = load_inception(path)
    assert not loaded.training and loaded.fc.in_features == 2048 // 16
    assert torch.equal(loaded(images).pool, features.pool)
    assert not torch.equal(load_inception(path, preprocess_adm)(images).pool, features.pool)


def test_faulty_files_are_named_in_one_sentence(model: Inception, tmp_path: Path):
    state = dict(model.state_dict())
    del state["fc.bias"], state["Mixed_5b.branch1x1.bn.bias"]
    state |= {"AuxLogits.fc.bias": torch.zeros(1), "fc.weight": torch.zeros(1000, 128)}
    torch.save(state, tmp_path / "faulty.pth")
    with pytest.raises(ValueError) as error:
        load_inception(tmp_path / "faulty.pth")
    assert str(error.value) == (
        f"{tmp_path / 'faulty.pth'} is not an InceptionV3 state dict as pytorch-fid publishes it: "
        "2 keys missing (first: Mixed_5b.branch1x1.bn.bias), 1 keys unexpected (first: AuxLogits.fc.bias), "
        "1 keys of another shape (first: fc.weight)."
    )


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="472 keys missing .*, 1 keys unexpected"):
        load_inception(tmp_path / "other.safetensors")


def test_import_needs_neither_scipy_nor_torchvision():
    names = "metrics inception"
    code = f"import sys; from qandc_core.evaluation import {names.replace(' ', ', ')}; print(*sys.modules)"
    root = Path(qandc_core.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    modules = done.stdout.split()
    assert "torch" in modules and not {"scipy", "sklearn", "torchvision"} & set(modules)

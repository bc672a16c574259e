"""Every reader on damaged and malicious files: it loads them, or says in one sentence which file is wrong."""

import copy
import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qandc_core import DiT, DiTConfig, load_calibration, load_dit, quantize_model, save_dit
from qandc_core.calibration.file import Calibration, fingerprint
from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.checkpoints.quantized import load_quantized, quantized_metadata, save_quantized
from qandc_core.compensation.correction import VarianceCompensation
from qandc_core.diffusion.process import SamplingConfig
from qandc_core.evaluation.judges import read_arrays
from qandc_core.files import METADATA_KEY, metadata_tensor, read_json
from qandc_core.quantization.native import NativeConfig, quantize_weight

CONFIG = DiTConfig(input_size=4, hidden_size=64, depth=1, num_heads=2, num_classes=3)
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000

pytestmark = pytest.mark.usefixtures("no_grad")


def model():
    torch.manual_seed(0)
    return DiT(CONFIG).eval()


def published(path):
    save_dit(model(), path)


def pickled(path):
    torch.save({"ema": model().state_dict(), "opt": {"lr": 1e-4}}, path)


def quantized(path):
    save_quantized(quantize_model(model(), 8, 4, ["embed"]), path)


def by_comfyui(path):
    made = quantize_model(model(), 4, 8, ["embed"])
    tensors = {**made.state_dict(), METADATA_KEY: metadata_tensor(quantized_metadata(made))}
    save_file({f"model.diffusion_model.{key}": value.contiguous() for key, value in tensors.items()}, path)


def native(path):
    tensors = dict(model().state_dict())
    for name, format in (("blocks.0.mlp.fc1", "W8A8"), ("blocks.0.attn.proj", "W4A8")):
        layer = quantize_weight(name, tensors.pop(f"{name}.weight"), None, NativeConfig(format, "nearest"))
        tensors |= {f"{name}.{part}": value for part, value in layer.tensors.items()}
    metadata = {key: "2" if key == "num_heads" else "3" for key in ("num_heads", "num_classes")}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)


def calibration(path):
    source = model()
    statistics = LayerStatistics.empty(8, hessian=True, inputs=4)
    statistics.update(torch.randn(20, 8))
    statistics.keep_inputs(torch.randn(4, 8))
    variance = VarianceCompensation(torch.tensor([3.0, 1.0]), torch.zeros(2, 4), torch.ones(2, 4))
    Calibration(
        fingerprint(source), {"blocks.0.attn.qkv": statistics}, (0, 2), variance, torch.rand(4, 4),
        SamplingConfig(4, 2.0, "ddim"), {"cache_interval": 2},
    ).save(path)  # fmt: skip


def reference_batch(path):
    arrays = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    np.savez(path, **arrays, arr_0=np.zeros((2, 8, 8, 3), np.uint8))


# How a valid file is made, and what reads it.
READERS = {
    "published.safetensors": (published, load_dit),
    "training.pt": (pickled, lambda path: load_dit(path, num_heads=2)),
    "quantized.safetensors": (quantized, load_quantized),
    "quantized by name.safetensors": (quantized, load_dit),
    "from ModelSave.safetensors": (by_comfyui, load_dit),
    "native.safetensors": (native, load_dit),
    "calibration.safetensors": (calibration, load_calibration),
    "interrupted.partial": (calibration, load_calibration),
    "reference.npz": (reference_batch, read_arrays),
}
SAFETENSORS = [name for name in READERS if not name.endswith((".pt", ".npz"))]


class Contents(dict):
    def __repr__(self):  # Hypothesis shows it with every failure
        return "valid"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of a valid file of every kind."""
    folder, files = tmp_path_factory.mktemp("valid"), Contents()
    for name, (make, _) in READERS.items():
        made = folder / (name.replace(".partial", ".safetensors"))
        make(made)
        files[name] = made.read_bytes()
    return files


def check(folder, name, content, read=None):
    """Whether the content loads. Anything but a ValueError or OSError that names the file fails the test."""
    path = folder / name
    path.write_bytes(content)
    try:
        (read or READERS[name][1])(path)
    except (ValueError, OSError) as error:
        assert str(path) in str(error), f"{type(error).__name__}: {error}"
        assert "\n" not in str(error)
        return False
    return True


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_valid_files_load(valid, tmp_path, name):
    assert check(tmp_path, name, valid[name])


@pytest.mark.parametrize("name", READERS)
@examples(25)
@given(data=st.data())
def test_bytes_changed_and_cut(valid, tmp_path_factory, name, data):
    content = bytearray(valid[name])
    near = st.integers(0, min(len(content), 2000) - 1) | st.integers(0, len(content) - 1)  # headers come first
    for place in data.draw(st.lists(near | near.map(lambda i: len(content) - 1 - i), max_size=6)):
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        start = data.draw(near)
        content[start : start + data.draw(st.integers(1, 64))] = data.draw(st.binary(max_size=64))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    check(tmp_path_factory.mktemp("bytes"), name, bytes(content))


# Headers: JSON whose values are of any kind.

ODD = st.sampled_from(
    [None, True, False, -1, 0, 1, 2**31, 2**63, 2**80, -(2**40), 1e308, 0.5, "", "x", "nan", "inf", "1e999", "0", [],
     {}, [0], [[]], {"tensor": "x"}, {"a": {}}, "\u0000", "\ud83d\ude00", "../../x", 10**15]
)  # fmt: skip


def places(value, path=()):
    """Every place in nested JSON, as the keys that lead there."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(part, (*path, key))


def mutated(data, value):
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(value))
        assume(found)
        *outer, last = data.draw(st.sampled_from(found))
        owner = value
        for key in outer:
            owner = owner[key]
        action = data.draw(st.sampled_from(("replace", "replace", "delete", "rename")))
        if action == "replace":
            owner[last] = copy.deepcopy(data.draw(ODD))
        elif action == "delete" or isinstance(owner, list):
            del owner[last]
        else:
            owner[data.draw(st.sampled_from(("x", "", "format", "blocks.9.attn.qkv.weight", "a.b.c")))] = owner.pop(
                last
            )
    return value


def split(content):
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header, tensors):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


@pytest.mark.parametrize("name", SAFETENSORS)
@examples(25)
@given(data=st.data())
def test_headers_changed(valid, tmp_path_factory, name, data):
    header, tensors = split(valid[name])
    check(tmp_path_factory.mktemp("header"), name, joined(mutated(data, header), tensors))


@pytest.mark.parametrize("name", ["quantized.safetensors", "calibration.safetensors", "interrupted.partial"])
@examples(120)
@given(data=st.data())
def test_our_own_json_changed(valid, tmp_path_factory, name, data):
    header, tensors = split(valid[name])
    ours = mutated(data, json.loads(header["__metadata__"]["qandc"]))
    header["__metadata__"]["qandc"] = json.dumps(ours)
    check(tmp_path_factory.mktemp("json"), name, joined(header, tensors))


@examples(60)
@given(data=st.data())
def test_metadata_of_a_dit_changed(valid, tmp_path_factory, data):
    header, tensors = split(valid["published.safetensors"])
    key = data.draw(st.sampled_from(sorted(header["__metadata__"])))
    header["__metadata__"][key] = data.draw(st.sampled_from(("", "nan", "inf", "-1", "1e400", "9" * 5000, "x", "1.5")))
    loaded = check(tmp_path_factory.mktemp("metadata"), "published.safetensors", joined(header, tensors))
    assert not loaded or key == "format"


@pytest.mark.parametrize("name", SAFETENSORS)
@examples(25)
@given(data=st.data())
def test_tensors_replaced(valid, tmp_path_factory, name, data):
    """Other dtypes, shapes, NaN, empty and missing tensors, in a file that is otherwise whole."""
    folder = tmp_path_factory.mktemp("tensors")
    (folder / "valid.safetensors").write_bytes(valid[name])
    tensors, metadata = load_file(folder / "valid.safetensors"), split(valid[name])[0].get("__metadata__", {})
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[key]
        changed = data.draw(
            st.sampled_from(
                (None, tensor.flatten(), tensor[None], tensor[..., :-1] if tensor.ndim else tensor[None],
                 torch.zeros_like(tensor),
                 torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor.float(),
                 torch.zeros(0), torch.zeros((), dtype=torch.bool), tensor.double(), tensor.to(torch.int16),
                 torch.zeros(7, 5, dtype=torch.float8_e4m3fn), torch.full((3,), float("inf")),
                 torch.tensor(list(b"{}"), dtype=torch.uint8), torch.tensor([255, 254], dtype=torch.uint8))
            )
        )  # fmt: skip
        del tensors[key]
        if changed is not None:
            tensors[key] = changed.contiguous()
        assume(tensors)
    save_file(tensors, folder / "changed.safetensors", metadata)
    check(folder, name, (folder / "changed.safetensors").read_bytes())


@pytest.mark.parametrize("name", SAFETENSORS)
def test_json_that_is_nested_too_deep(valid, tmp_path, name):
    header, tensors = split(valid[name])
    for text in (DEEP, DEEP_OBJECT):
        assert not check(tmp_path, name, joined(text.encode(), tensors))
        header["__metadata__"] = {**header.get("__metadata__", {}), "qandc": text}
        assert check(tmp_path, name, joined(header, tensors)) is (name not in OURS)


OURS = ("quantized.safetensors", "quantized by name.safetensors", "calibration.safetensors", "interrupted.partial")


@pytest.mark.parametrize("text", ["{}", "[]", "null", DEEP, DEEP_OBJECT, '{"format": 3}', '{"format": {}}', "\u00e9"])
def test_a_quantized_layer_that_does_not_say_how(valid, tmp_path, text):
    (tmp_path / "valid.safetensors").write_bytes(valid["native.safetensors"])
    tensors = load_file(tmp_path / "valid.safetensors")
    tensors["blocks.0.mlp.fc1.comfy_quant"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "native.safetensors", {"num_heads": "2"})
    with pytest.raises(ValueError, match=r"native\.safetensors.*blocks\.0\.mlp\.fc1"):
        load_dit(tmp_path / "native.safetensors")


# Pickles that hold what no state dict does.


@pytest.mark.parametrize(
    "odd",
    [
        lambda t: t.to_sparse(), lambda t: t.to(torch.complex64), lambda t: torch.zeros(1).expand(10**9, 10**6),
        lambda t: torch.empty(3, 3, device="meta"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_weights(tmp_path, odd):
    content = model().state_dict()
    key = "final_layer.linear.weight"
    torch.save({**content, key: odd(content[key])}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt"):
        load_dit(tmp_path / "odd.pt", num_heads=2)


def test_a_pickle_that_asks_for_more_memory_than_there_is(tmp_path):
    stream = pickle.PROTO + b"\x02" + b"cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    assert not check(tmp_path, "training.pt", stream)


# Indices and configurations.


@pytest.fixture
def sharded(tmp_path):
    save_file({key: value.contiguous() for key, value in model().state_dict().items()}, tmp_path / "a.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "C:\\a.safetensors",
     "..\\a.safetensors",
     "model.safetensors.index.json", "a.safetensors.index.json", "b\u0000.safetensors", "con.safetensors", 3, None, {}],
)  # fmt: skip
def test_an_index_reads_checkpoints_of_its_own_folder_alone(sharded, name):
    index = sharded / "model.safetensors.index.json"
    (sharded.parent / "outside.safetensors").write_bytes((sharded / "a.safetensors").read_bytes())
    (sharded / "sub").mkdir()
    (sharded / "sub" / "a.safetensors").write_bytes((sharded / "a.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"pos_embed": name}}))
    with pytest.raises(
        ValueError, match=r"lists .* expected the names of checkpoint files in its own folder"
    ) as caught:
        load_dit(index, num_heads=2)
    assert str(index) in str(caught.value)
    index.write_text(json.dumps({"weight_map": {"pos_embed": "a.safetensors"}}))
    assert load_dit(index, num_heads=2).config == CONFIG


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", DEEP.encode(), DEEP_OBJECT.encode(), b'{"a": NaN}', b"3", b"", b"\x00"]
)
def test_json_files(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from diffusers import DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("diffusers")
    torch.manual_seed(0)
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, num_embeds_ada_norm=3, out_channels=8
    ).save_pretrained(folder)
    return folder


@examples(60)
@given(data=st.data())
def test_a_diffusers_configuration_changed(pipeline, data):
    path = pipeline / "config.json"
    whole = json.loads(path.read_text())
    used = {key: whole[key] for key in ("sample_size", "num_attention_heads", "num_embeds_ada_norm", "norm_eps")}
    changed = mutated(data, used)
    try:
        path.write_text(json.dumps(changed))
        load_dit(pipeline, num_heads=2)
    except ValueError as error:
        assert str(pipeline) in str(error)
    finally:
        path.write_text(json.dumps(whole))


def test_a_configuration_of_another_model_beside_a_file_is_not_read(tmp_path):
    published(tmp_path / "published.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xff not for us")
    assert load_dit(tmp_path / "published.safetensors").config == CONFIG


# Values that would sample garbage.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_are_not_finite(tmp_path, value, suffix):
    content = model().state_dict()
    content["blocks.0.mlp.fc2.weight"][3, 5] = value
    path = tmp_path / f"bad{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2\.weight holds values that are not finite"):
        load_dit(path, num_heads=2)


@pytest.mark.parametrize("key", ["mean", "factor", "sigmas"])
def test_a_compensation_that_is_not_finite(tmp_path, key):
    calibration(tmp_path / "c.safetensors")
    with_nan = load_file(tmp_path / "c.safetensors")
    with_nan[f"variance/{key}"].view(-1)[0] = float("nan")
    save_file(with_nan, tmp_path / "n.safetensors", split((tmp_path / "c.safetensors").read_bytes())[0]["__metadata__"])
    with pytest.raises(ValueError, match=rf"variance/{key} holds values that are not finite"):
        load_calibration(tmp_path / "n.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"norm2_eps": float("nan")}, {"norm2_eps": -1.0}, {"prediction": "nonsense"}, {"num_heads": 0},
     {"hidden_size": 8.5}, {"mlp_ratio": float("inf")},
     {"frequency_shift": 128}, {"num_classes": 0}, {"learn_sigma": "yes"}, {"depth": True}],
)  # fmt: skip
def test_a_configuration_that_no_dit_has(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DiTConfig(**change)


def test_a_reference_batch_that_claims_more_memory_than_there_is(tmp_path):
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("mu", "sigma", "mu_s", "sigma_s"):
            file.writestr(f"{name}.npy", header.ljust(127) + b"\n")
    assert not check(tmp_path, "reference.npz", packed.getvalue())

import argparse
import copy
import json
import os
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from qandc_core import files
from qandc_core.checkpoints import dit as checkpoints
from qandc_core.checkpoints import load_dit, save_dit
from qandc_core.checkpoints.dit import detect_config, read_dit
from qandc_core.checkpoints.quantized import save_quantized
from qandc_core.models import DiT, DiTConfig
from qandc_core.models.layers import DIT_SKIP
from qandc_core.models.layouts import from_diffusers
from qandc_core.quantization.model import quantize_model

CONFIG = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10)


pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiT(CONFIG).eval()


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=3, sample_size=8, num_embeds_ada_norm=10, out_channels=8
    )
    for block in model.transformer_blocks[1:]:  # published weights repeat one embedder, a fresh model has one each
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def inputs(config):
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    return x, torch.tensor([3, 999]), torch.tensor([0, config.num_classes])


def assert_equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


def assert_equals_diffusers(model, reference):
    x, t, y = inputs(model.config)
    theirs = reference(x, t, y).sample
    assert theirs.std() > 0.05
    assert (model(x, t, y) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_round_trip_is_exact(tmp_path, dtype, learn_sigma):
    config = DiTConfig(
        input_size=12, patch_size=4, in_channels=3, hidden_size=48, depth=3, num_heads=3, mlp_ratio=2.5,
        num_classes=7, learn_sigma=learn_sigma, norm2_eps=1.3e-5, frequency_shift=1,
    )  # fmt: skip
    saved = DiT(config, dtype=dtype)
    save_dit(saved, tmp_path / "new" / "model.safetensors")
    loaded = load_dit(tmp_path / "new" / "model.safetensors")
    assert loaded.config == config
    assert not loaded.training
    assert_equal(loaded, saved)
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_failed_save_keeps_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_dit(model, path)
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_dit(model, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_saving_over_the_file_a_model_was_loaded_from(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_dit(model, path)
    loaded = load_dit(path)
    loaded.pos_embed += 1
    save_dit(loaded, path)
    assert_equal(load_dit(path), loaded)


def test_dtype_and_device(tmp_path, model):
    path = tmp_path / "model.safetensors"
    save_dit(model.bfloat16(), path)
    assert {p.dtype for p in load_dit(path).parameters()} == {torch.bfloat16}
    loaded = load_dit(str(path), dtype=torch.float32, device="cpu")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight.float())
    assert {p.device.type for p in load_dit(path, device="meta").parameters()} == {"meta"}


def write(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_published_files(tmp_path, model, suffix):
    loaded = load_dit(write(tmp_path / f"DiT{suffix}", model.state_dict()), num_heads=4)
    assert loaded.config == CONFIG
    assert_equal(loaded, model)


def test_old_pytorch_format(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(load_dit(tmp_path / "old.pt", num_heads=4), model)


@pytest.mark.parametrize("names", [("model",), ("ema",), ("model", "ema")])
def test_training_checkpoint_prefers_ema(tmp_path, model, names):
    others = DiT(CONFIG).state_dict()
    content = {name: model.state_dict() if name == names[-1] else others for name in names}
    content |= {"opt": {"state": {}, "lr": 1e-4}, "args": argparse.Namespace(model="DiT-XL/2", epochs=1400)}
    assert_equal(load_dit(write(tmp_path / "0400000.pt", content), num_heads=4), model)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixed_keys(tmp_path, model, prefix):
    content = {prefix + key: value for key, value in model.state_dict().items()}
    content["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    assert_equal(load_dit(write(tmp_path / "comfy.safetensors", content), num_heads=4), model)


def under(prefix, content):
    return {prefix + key: value for key, value in content.items()}


PREFIXES = [
    "module.", "_orig_mod.", "model.", "ema.", "ema_state_dict.", "state_dict.", "net.", "model.module._orig_mod.",
    "transformer.", "generator.ema_model.", "module.model.diffusion_model.",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_recognised(tmp_path, model, prefix, suffix):
    others = {"optimizer.x": torch.zeros(1), "vae.x_embedder.weight": torch.zeros(3)}
    path = write(tmp_path / f"model{suffix}", {**under(prefix, model.state_dict()), **others})
    assert_equal(load_dit(path, num_heads=4), model)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "transformer."])
def test_a_prefixed_diffusers_file(tmp_path, reference, prefix):
    content = {**reference.state_dict(), "pos_embed.pos_embed": reference.pos_embed.pos_embed}
    path = write(tmp_path / "lone.safetensors", under(prefix, content))
    assert_equals_diffusers(load_dit(path, num_heads=4), reference)


@pytest.mark.parametrize("name", ["state_dict", "ema_state_dict", "model_state_dict", "module", "params", "net"])
def test_nested_training_checkpoints(tmp_path, model, name):
    content = {"epoch": 3, name: under("module._orig_mod.", model.state_dict()), "optimizer": {"state": {0: {}}}}
    assert_equal(load_dit(write(tmp_path / "a.pt", content), num_heads=4), model)
    assert_equal(load_dit(write(tmp_path / "b.pth", {"a": {"b": content}}), num_heads=4), model)


@pytest.mark.parametrize("average", ["ema", "ema_state_dict", "model_ema", "ema_0.9999", "EMA"])
@pytest.mark.parametrize("last", [True, False])
def test_the_moving_average_is_preferred_wherever_it_is(tmp_path, model, average, last):
    entries = [(average, model.state_dict()), ("model", DiT(CONFIG).state_dict())]
    content = dict(entries[::-1] if last else entries)
    assert_equal(load_dit(write(tmp_path / "a.pt", content), num_heads=4), model)
    flat = {f"{name}.{key}": value for name, tensors in content.items() for key, value in tensors.items()}
    assert_equal(load_dit(write(tmp_path / "a.safetensors", flat), num_heads=4), model)
    bare = {**DiT(CONFIG).state_dict(), **under(f"{average}.", model.state_dict())}
    assert_equal(load_dit(write(tmp_path / "b.safetensors", bare), num_heads=4), model)


def test_of_two_models_the_one_with_the_shorter_prefix(tmp_path, model):
    content = {**under("teacher.model.", DiT(CONFIG).state_dict()), **model.state_dict()}
    assert_equal(load_dit(write(tmp_path / "bare.safetensors", content), num_heads=4), model)
    content = {**under("teacher.model.", DiT(CONFIG).state_dict()), **under("model.", model.state_dict())}
    assert_equal(load_dit(write(tmp_path / "two.safetensors", content), num_heads=4), model)


def test_of_two_moving_averages_the_first_and_a_warning(tmp_path, model, caplog):
    content = {"ema_0.99": model.state_dict(), "ema_0.9999": DiT(CONFIG).state_dict()}
    assert_equal(load_dit(write(tmp_path / "a.pt", content), num_heads=4), model)
    assert "2 moving averages; using ema_0.99" in caplog.text


# --- classes ----------------------------------------------------------------------------------------------------------


def classes_of(rows):
    torch.manual_seed(0)
    model = DiT(DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=rows - 1))
    return model.eval(), model.state_dict()


def test_a_thousand_rows_are_a_thousand_classes_and_none_for_no_class(tmp_path):
    from qandc_core import generate

    source, content = classes_of(1000)
    model = load_dit(write(tmp_path / "a.safetensors", content), num_heads=4)
    assert (model.config.num_classes, model.config.has_null_class) == (1000, False)
    x = torch.randn(1, 4, 8, 8)
    t, y = torch.tensor([500]), torch.tensor([999])
    torch.testing.assert_close(model(x, t, y), source(x, t, y))
    for scale in (1.5, 4.0, 0.0):
        with pytest.raises(ValueError, match="1000 classes and none for no class.*guidance scale 1"):
            generate(model, [999], 2, scale)
    assert generate(model, [999], 2, 1.0)[0].shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="class id 1000 is out of range.*none for no class"):
        generate(model, [1000], 2, 1.0)
    save_dit(model, tmp_path / "b.safetensors")
    assert load_dit(tmp_path / "b.safetensors").config == model.config


@pytest.mark.parametrize("rows", [1000, 1001, 11])
def test_metadata_says_whether_the_last_row_is_no_class(tmp_path, rows):
    _, content = classes_of(rows)
    for classes, null in ((rows, False), (rows - 1, True)):
        path = tmp_path / f"{classes}.safetensors"
        save_file(content, path, {"num_heads": "4", "num_classes": str(classes)})
        config = load_dit(path).config
        assert (config.num_classes, config.has_null_class) == (classes, null)
        save_dit(load_dit(path), tmp_path / "again.safetensors")
        assert load_dit(tmp_path / "again.safetensors").config == config
    save_file(content, tmp_path / "other.safetensors", {"num_heads": "4", "num_classes": "5"})
    refused(ValueError, tmp_path / "other.safetensors", f"has {rows} rows, expected 5 classes and one for no class")


def test_demo_is_found_in_the_package(tmp_path, model, monkeypatch):
    assert checkpoints.DEMO.parts[-3:] == ("qandc_core", "demo", "pictures_dit.safetensors")
    monkeypatch.setattr(checkpoints, "DEMO", tmp_path / "pictures_dit.safetensors")
    with pytest.raises(FileNotFoundError, match="pictures_dit.safetensors; install the package again"):
        load_dit("demo")
    save_file(model.state_dict(), checkpoints.DEMO, metadata={"num_heads": "4"})
    assert load_dit("demo").config == CONFIG


def folder(reference, path, safe=True, shard_size="10GB"):
    reference.save_pretrained(path, safe_serialization=safe, max_shard_size=shard_size)
    return path


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", ["10GB", "100KB"], ids=["whole", "sharded"])
def test_diffusers_folder(tmp_path, reference, safe, shard_size):
    folder(reference, tmp_path, safe, shard_size)
    weights = [name for name in os.listdir(tmp_path) if name != "config.json"]
    assert len(weights) == 1 if shard_size == "10GB" else len(weights) > 2
    loaded = load_dit(tmp_path)
    assert (loaded.config.num_heads, loaded.config.norm2_eps, loaded.config.frequency_shift) == (4, 1e-5, 1)
    assert_equals_diffusers(loaded, reference)


def test_diffusers_pipeline_folder_and_lone_file(tmp_path, reference):
    transformer = folder(reference, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    assert_equals_diffusers(load_dit(tmp_path), reference)
    assert_equals_diffusers(load_dit(transformer / "diffusion_pytorch_model.safetensors"), reference)


def test_diffusers_file_with_positions_needs_no_config(tmp_path, reference):
    content = {**reference.state_dict(), "pos_embed.pos_embed": reference.pos_embed.pos_embed}
    path = write(tmp_path / "lone.safetensors", content)
    assert_equals_diffusers(load_dit(path, num_heads=4), reference)


def test_diffusers_model_saved_by_us(tmp_path, reference):
    folder(reference, tmp_path)
    save_dit(load_dit(tmp_path), tmp_path / "ours.safetensors")
    assert_equals_diffusers(load_dit(tmp_path / "ours.safetensors"), reference)


def test_published_layout_equals_diffusers_under_its_conventions(tmp_path, reference):
    positions = {"pos_embed": reference.pos_embed.pos_embed}
    content = {**from_diffusers(reference.state_dict()), **positions}
    plain = load_dit(write(tmp_path / "plain.safetensors", content), num_heads=4)
    assert (plain.config.norm2_eps, plain.config.frequency_shift) == (1e-6, 0)
    metadata = {"num_heads": "4", "norm2_eps": "1e-5", "frequency_shift": "1"}
    save_file(content, tmp_path / "told.safetensors", metadata=metadata)
    assert_equals_diffusers(load_dit(tmp_path / "told.safetensors"), reference)


def test_what_the_file_says_is_not_overruled(tmp_path, reference, model):
    path = folder(reference, tmp_path / "diffusers") / "config.json"
    assert read_dit(path.parent, num_heads=4, input_size=8)[1] == load_dit(path.parent).config
    with pytest.raises(ValueError, match="diffusers.*: its num_heads is 4, not 8; leave that to the file"):
        load_dit(path.parent, num_heads=8)
    with pytest.raises(ValueError, match="its input_size is 8, not 16"):
        read_dit(path.parent, input_size=16)
    save_quantized(quantize_model(copy.deepcopy(model), 8, 8, DIT_SKIP), tmp_path / "quantized.safetensors")
    assert load_dit(tmp_path / "quantized.safetensors", num_heads=4).config == model.config
    with pytest.raises(ValueError, match="quantized.safetensors: its num_heads is 4, not 2"):
        load_dit(tmp_path / "quantized.safetensors", num_heads=2)


def test_diffusers_config_and_metadata_decide_the_epsilon(tmp_path, reference):
    path = folder(reference, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_eps": 1e-4, "num_attention_heads": 8}))
    assert (load_dit(tmp_path).config.norm2_eps, load_dit(tmp_path).config.num_heads) == (1e-4, 8)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, metadata={"norm2_eps": "1e-3", "num_heads": "2"})
    assert (load_dit(tmp_path).config.norm2_eps, load_dit(tmp_path).config.num_heads) == (1e-3, 2)


def test_bfloat16_diffusers_folder(tmp_path, reference):
    state_dict = {key: value.bfloat16() for key, value in reference.state_dict().items()}
    folder(reference, tmp_path)
    save_file(state_dict, tmp_path / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in load_dit(tmp_path).state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(("hidden", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_come_from_the_width(hidden, heads):
    config = DiTConfig(hidden_size=hidden, depth=1, num_heads=heads)
    state_dict = DiT(config, device="meta").state_dict()
    assert detect_config(state_dict) == config
    assert detect_config(state_dict, {"num_heads": "8"}).num_heads == 8
    assert detect_config(state_dict, num_heads=4).num_heads == 4


def test_read_dit_gives_what_a_host_needs_to_build_the_model(tmp_path, reference):
    state_dict, config = read_dit(folder(reference, tmp_path))
    model = DiT(config)
    model.load_state_dict(state_dict)
    assert_equals_diffusers(model.eval(), reference)


def refused(error, path, *fragments, **options):
    """Loading must fail with one sentence that names the file and holds every fragment."""
    with pytest.raises(error) as caught:
        load_dit(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


def changed(model, **tensors):
    """State dict with tensors replaced; `__` stands for a dot, None deletes the key."""
    content = model.state_dict() | {key.replace("__", "."): value for key, value in tensors.items()}
    return {key: value.contiguous() for key, value in content.items() if value is not None}


def test_missing_file_and_folder_without_a_model(tmp_path):
    refused(FileNotFoundError, tmp_path / "absent.safetensors", "no DiT checkpoint at")
    refused(FileNotFoundError, tmp_path, "no DiT in the folder", "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer").mkdir()
    refused(FileNotFoundError, tmp_path, "in " + str(tmp_path / "transformer"))


def test_unknown_file_type(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(ValueError, tmp_path / "model.gguf", "expected a file ending in .safetensors")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"\xff" * 64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_junk(tmp_path, content, suffix):
    (tmp_path / f"junk{suffix}").write_bytes(content)
    refused(ValueError, tmp_path / f"junk{suffix}")


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated(tmp_path, model, kept):
    for path in (tmp_path / "cut.safetensors", tmp_path / "cut.pt"):
        content = write(path, model.state_dict()).read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        refused(ValueError, path, "truncated", num_heads=4)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, model, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    content = {"ema": model.state_dict(), "args": Attack()}
    torch.save(content, tmp_path / "attack.pt", _use_new_zipfile_serialization=zipped)
    refused(ValueError, tmp_path / "attack.pt", "weights_only=True refuses", "safetensors")
    assert os.listdir(tmp_path) == ["attack.pt"]


def test_pickle_without_a_state_dict(tmp_path):
    refused(ValueError, write(tmp_path / "list.pt", [torch.zeros(1)]), "holds a list, expected a state dict")
    refused(ValueError, write(tmp_path / "epoch.pt", {"epoch": 3}), "this is not a DiT")


def test_not_a_dit(tmp_path):
    content = {"conv.weight": torch.zeros(1), "model.embed_tokens.weight": torch.zeros(1)}
    refused(ValueError, write(tmp_path / "x.safetensors", content), "this is not a DiT")
    content = {f"transformer_blocks.{i}.attn.to_q.weight": torch.zeros(1) for i in range(2)}
    refused(ValueError, write(tmp_path / "flux.safetensors", content), "this is not a DiT")


def test_missing_keys(tmp_path, model, reference):
    content = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.1.attn.")}
    first = "blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, blocks.1.attn.proj.weight"
    refused(ValueError, write(tmp_path / "a.safetensors", content), f"4 of 32 DiT keys are missing, first {first}")
    content = {key: value for key, value in model.state_dict().items() if not key.startswith("blocks.")}
    refused(ValueError, write(tmp_path / "b.safetensors", content), "10 of 22 DiT keys are missing")
    refused(ValueError, write(tmp_path / "c.pt", changed(model, pos_embed=None)), "1 of 32", "first pos_embed")
    content = reference.state_dict()
    del content["transformer_blocks.2.attn1.to_k.bias"]
    path = write(tmp_path / "d.safetensors", content)
    refused(ValueError, path, "1 of 53", "first transformer_blocks.2.attn1.to_k.bias")


def test_foreign_keys(tmp_path, model, reference):
    content = changed(model, blocks__0__attn__q_norm__weight=torch.ones(8))
    path = write(tmp_path / "qknorm.safetensors", content)
    refused(ValueError, path, "1 of 33 keys are not those of", "blocks.0.attn.q_norm.weight")
    content = {**reference.state_dict(), "transformer_blocks.0.attn2.to_q.weight": torch.ones(8)}
    path = write(tmp_path / "cross.safetensors", content)
    refused(ValueError, path, "1 of 64 keys are not those of", "transformer_blocks.0.attn2.to_q.weight")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks__1__attn__qkv__weight": torch.zeros(96, 31)}, "qkv.weight has the shape (96, 31), expected (96, 32)"),
        ({"x_embedder__proj__weight": torch.zeros(32, 16)}, "has the shape (32, 16), expected 4 dimensions"),
        ({"final_layer__linear__weight": torch.zeros(20, 32)}, "has 20 rows, expected 16"),
        ({"pos_embed": torch.zeros(1, 15, 32)}, "covers 15 patches, expected a square grid"),
        ({"pos_embed": torch.zeros(1, 16, 30)}, "pos_embed has the shape (1, 16, 30), expected (1, 16, 32)"),
        ({"t_embedder__mlp__0__weight": torch.zeros(32, 128)}, "expected (32, 256)"),
        ({"blocks__0__mlp__fc2__bias": torch.zeros(32).char()}, "has the type torch.int8"),
    ],
)
def test_unexpected_shapes(tmp_path, model, tensors, message):
    path = write(tmp_path / "model.safetensors", changed(model, **tensors))
    refused(ValueError, path, message, num_heads=4)


def test_unknown_heads(tmp_path, model):
    path = write(tmp_path / "model.safetensors", model.state_dict())
    refused(ValueError, path, "the number of attention heads is not known for width 32; give it as num_heads")
    refused(ValueError, path, "width 32 is not divisible by 5 attention heads", num_heads=5)


def test_diffusers_faults(tmp_path, reference):
    content = reference.state_dict()
    lone = write(tmp_path / "lone.safetensors", content)
    refused(ValueError, lone, "input size", "load the diffusers folder", num_heads=4)

    key = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    path = write(tmp_path / "differ.safetensors", {**content, key: content[key] + 1})
    refused(ValueError, path, f"{key} differs from {key.replace('.2.', '.0.')}")

    key = "transformer_blocks.1.attn1.to_k.weight"
    path = write(tmp_path / "ragged.safetensors", {**content, key: content[key][:, 1:].contiguous()})
    refused(ValueError, path, "to_k.weight", "have different shapes [(32, 32), (32, 31), (32, 32)]")

    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json")) + " is not valid JSON"):
        load_dit(lone)


def test_faulty_index(tmp_path, reference):
    index = folder(reference, tmp_path, shard_size="100KB") / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (tmp_path / shards[0]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0]} is missing, but {index.name} lists it"):
        load_dit(tmp_path)
    index.write_text("[]")
    refused(ValueError, index, "holds a list, expected a JSON object")
    index.write_text("{}")
    refused(ValueError, index, "has no weight_map")


def test_metadata_of_a_saved_file(tmp_path, model):
    from safetensors import safe_open

    save_dit(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    kept = {
        "num_heads": "4",
        "num_classes": "10",
        "norm2_eps": "1e-06",
        "frequency_shift": "0",
        "prediction": "epsilon",
    }
    assert metadata == {"format": "pt"} | kept
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()

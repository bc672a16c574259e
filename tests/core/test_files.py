"""Names and writing: what may be listed, and that a write is whole or leaves nothing behind."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qandc_core
from qandc_core.checkpoints.dit import dit_folders, source_files
from qandc_core.files import is_portable, is_text, save_tensors, save_text, written_whole

ROOT = Path(qandc_core.__file__).parents[1]

PLAIN = [
    "a.safetensors", "my,model.safetensors", "[fp8] model@v1.safetensors", "\u6807\u5b9a\uff08v2\uff09.safetensors",
    "it's mine (2) #3; 50% = a&b ~ !.safetensors", "cafe\u0301.safetensors", "emoji\U0001f600.safetensors",
    "CON_00001.safetensors", "console.safetensors", "a" * 240 + ".safetensors",
]  # fmt: skip
ODD = [
    "", ".", "..", ".hidden.safetensors", "a/b.safetensors", "../a.safetensors", "/a.safetensors", "a\\b.safetensors",
    "C:a.safetensors", "con.safetensors", "NUL", "Lpt1.safetensors", "a\nb.safetensors", "a\x00.safetensors",
    "bytes\udcff.safetensors", "\x7f.safetensors", "a/", "a\u2028b", "nul .safetensors", "a?", "a" * 252 + ".sft",
]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_any_script_and_sign_is_a_portable_name(name, tmp_path):
    assert is_portable(name) and is_text(name)
    save_tensors({"a": torch.ones(2)}, tmp_path / name, {})
    assert os.listdir(tmp_path) == [name] and load_file(tmp_path / name)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("name", ODD)
def test_paths_devices_and_hidden_files_are_not(name):
    assert not is_portable(name)


def limited(code, folder, size):
    """Runs code in a process whose files cannot grow beyond `size` bytes, as on a disk that fills up."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    argv = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)


SAVING = """
import sys, torch
from pathlib import Path
from qandc_core.files import save_tensors, save_text
folder = Path(sys.argv[1])
saves = [
    lambda: save_tensors({"a": torch.zeros(10**5)}, folder / "a.safetensors", {}),
    lambda: save_text("x" * 10**5, folder / "a.txt"),
]
for save in saves:
    try:
        save()
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_a_disk_that_fills_up_leaves_the_old_files(tmp_path):
    save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
    save_text("before", tmp_path / "a.txt")
    done = limited(SAVING, tmp_path, 10_000)
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stdout.splitlines(), ("a.safetensors", "a.txt"), strict=True):
        assert (
            line
            == f"{tmp_path / name} could not be written (File too large); make room there, or choose another folder."
        )
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "a.txt"]
    assert (
        load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1] and (tmp_path / "a.txt").read_text() == "before"
    )
    save_tensors({"a": torch.zeros(10**5)}, tmp_path / "a.safetensors", {})
    assert len(load_file(tmp_path / "a.safetensors")["a"]) == 10**5


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "new" / "a.safetensors", {})
        save_text("a", tmp_path / "a.txt")
    finally:
        os.umask(before)
    for path in (tmp_path / "new" / "a.safetensors", tmp_path / "a.txt"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_error_of_the_writer_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(KeyError), written_whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyError("stop")
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "before"


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "folder.safetensors", Path("/proc/a.safetensors")):
        with pytest.raises(OSError, match="could not be written") as caught:
            save_tensors({"a": torch.ones(2)}, path, {})
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]


# Folders of somebody else's files, as Load DiT lists them.


def test_folders_are_listed_whatever_is_in_them(tmp_path):
    def pipeline(name, content):
        config = tmp_path / name / "transformer" / "config.json"
        config.parent.mkdir(parents=True)
        config.write_bytes(content)
        return tmp_path / name

    good = [
        pipeline("dit", b'{"num_embeds_ada_norm": 1000}'),
        pipeline("[my], dit@home \u4e2d", b'{"num_embeds_ada_norm": 1000}'),
    ]
    pipeline("flux", b'{"num_layers": 19}')
    pipeline("not UTF-8", b"\xff\xfe\x00")
    pipeline("deep", b"[" * 10**6)
    pipeline(os.fsdecode(b"bytes\xff"), b'{"num_embeds_ada_norm": 1000}')
    (tmp_path / "config is a folder" / "transformer" / "config.json").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    os.makedirs(tmp_path / "pipe" / "transformer")
    os.mkfifo(tmp_path / "pipe" / "transformer" / "config.json")
    assert dit_folders(tmp_path) == sorted(good)
    assert dit_folders(tmp_path / "absent") == dit_folders(tmp_path / "file") == []


def test_the_files_of_a_source(tmp_path):
    for name in ("[fp8] a.safetensors", "[fp8] a.b.safetensors", "1.safetensors"):
        (tmp_path / name).write_bytes(b"")
    lone = tmp_path / "[fp8] a.safetensors"
    assert source_files(lone) == [lone, tmp_path / "config.json"]
    index = tmp_path / "x.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    shards = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    assert source_files(index) == [index, *shards, tmp_path / "config.json"]
    index.write_bytes(b"\xff")
    assert source_files(index) == [index, tmp_path / "config.json"]

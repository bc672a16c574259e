"""One folder for several processes, any file name, a full disk and a folder that cannot be written."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qandc_core.calibration.file import Calibration
from qandc_core.calibration.folder import check_writable, is_listed, listed, made_before, named, save_new, stem_of
from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.compensation.correction import VarianceCompensation
from qandc_core.files import is_portable


def saving(content):
    return lambda path: path.write_bytes(content)


def test_saves_at_the_same_moment_lose_nothing(tmp_path):
    barrier = Barrier(8)

    def save(number):
        def write(path):
            path.write_bytes(b"%d" % number)
            barrier.wait()

        return save_new(tmp_path, write, "race", "asked.safetensors").name, b"%d" % number

    with ThreadPoolExecutor(8) as pool:
        made = dict(pool.map(save, range(8)))
    assert len(made) == 8 and "asked.safetensors" in made
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made


@given(st.text(max_size=300))
def test_any_name_that_is_typed_stands_for_one_listed_portable_file(name):
    path = named(Path("folder"), name)
    assert path.parent == Path("folder") and is_portable(path.name) and is_listed(path.name)
    assert named(Path("folder"), path.name) == path


@pytest.mark.parametrize(("name", "file"), [
    ("my model (v2)", "my_model_v2"), ("../../x", "x"), ("CON", "calibration_CON"), ("\u6a21\u578b", "\u6a21\u578b"),
    ("runs.safetensors", "runs"), ("", "calibration"), ("con", "calibration_con"),
])  # fmt: skip
def test_names_that_are_typed(name, file, tmp_path):
    assert named(tmp_path, name).name == f"{file}.safetensors"


PROCESS = """
import sys, time, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from qandc_core.calibration.folder import save_new
folder, number = Path(sys.argv[2]), sys.argv[3]
def save(path):
    path.write_text(number)
    (folder / f"{number}.ready").touch()
    started = time.time()
    while len(list(folder.glob("*.ready"))) < 2 and time.time() - started < 60:
        time.sleep(0.001)
print(save_new(folder, save, "race").name)
"""


def test_processes_that_save_at_the_same_moment_lose_nothing(tmp_path):
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROCESS, root, str(tmp_path)]
    running = [subprocess.Popen([*command, n], stdout=subprocess.PIPE, text=True) for n in "ab"]
    names = [process.communicate()[0].strip() for process in running]
    assert sorted(names) == ["race_00001.safetensors", "race_00002.safetensors"]
    assert [(tmp_path / name).read_text() for name in names] == ["a", "b"]


ODD = (
    "a [fp8]", "flux, 50", "dev@v1", "\u6807\u5b9a\uff08v2\uff09", "it's", "cafe\u0301", "50%;a=b&c#~!", "NUL", "a ",
    "a.", "\U0001f600", "new\nline", "back\\slash", ".hidden", "", "a\u2028b", "x\0y", "not utf8 \udcff",
)  # fmt: skip


@given(st.one_of(st.sampled_from(ODD), st.text(max_size=60)))
@settings(max_examples=300, deadline=None)
def test_any_name_is_listed_as_one_visible_file_or_not_at_all(tmp_path_factory, stem):
    folder, name = tmp_path_factory.mktemp("names"), f"{stem}.safetensors"
    try:
        (folder / name).write_bytes(b"")
    except (OSError, ValueError):  # what this file system cannot hold, or a name with a folder in it
        assert listed(folder) == []
        return
    for found in listed(folder):
        assert is_listed(found) and (folder / found).is_file() and found == name
        assert json.loads(json.dumps(found).encode()) == found and not set(found) & set("\n\r\t\x00\u2028\u2029")


def test_calibrations_and_compensations_are_listed_apart(tmp_path):
    """What does not say what it holds is in both lists: it may be of another version."""
    statistics = {"fc": LayerStatistics.empty(4)}
    statistics["fc"].update(torch.ones(3, 4))
    values = torch.zeros(2, 3), torch.ones(2, 3)
    variance = VarianceCompensation(torch.tensor([2.0, 1.0]), *values, "paper")
    Calibration("model", statistics).save(tmp_path / "calibration.safetensors")
    Calibration("model", variance=variance).save(tmp_path / "compensation.safetensors")
    Calibration("model", statistics, variance=variance).save(tmp_path / "both.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"?")
    names = ("both", "calibration", "compensation", "other")
    assert listed(tmp_path) == [f"{name}.safetensors" for name in names]
    assert listed(tmp_path, "statistics") == [f"{name}.safetensors" for name in names if name != "compensation"]
    assert listed(tmp_path, "variance") == [f"{name}.safetensors" for name in names if name != "calibration"]
    Calibration("model", variance=variance).save(tmp_path / "calibration.safetensors")
    assert "calibration.safetensors" in listed(tmp_path, "variance")


def test_a_file_is_found_again_whatever_its_name_says_after_the_prefix(tmp_path):
    for name, inputs in (("run_00001", "a"), ("run_flux1-dev_2026-11-26_00001", "b"), ("runner_00001", "c")):
        Calibration("model", notes={"inputs": inputs}).save(tmp_path / f"{name}.safetensors")
    found = [made_before(tmp_path, "run", inputs) for inputs in "abc"]
    assert [path and path.stem for path in found] == ["run_00001", "run_flux1-dev_2026-11-26_00001", None]


def test_folders_and_other_files_are_not_listed(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    for name in ("a.partial", "a.safetensors.damaged", "a.saving", "b.safetensors"):
        (tmp_path / name).touch()
    assert listed(tmp_path) == ["b.safetensors"] and listed(tmp_path / "absent") == []


@pytest.mark.parametrize("name", ["CON", "nul", "Lpt1.b", "com9", "a:b", "a?", "x" * 250, "\u6807" * 100])
def test_names_that_another_system_cannot_hold_become_numbers(tmp_path, name):
    assert not is_portable(f"{name}.safetensors")
    assert save_new(tmp_path, saving(b""), "kept", f"{name}.safetensors").name == "kept_00001.safetensors"
    assert is_portable("CONTROL.safetensors") and is_portable("\u6807\u5b9a\uff08v2\uff09.safetensors")


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_prefix_gives_a_listed_name_in_the_folder(prefix):
    name = f"{stem_of(prefix)}_00001.safetensors"
    assert is_listed(name) and is_portable(name) and len(os.fsencode(name)) < 180


def test_numbers_go_on_where_others_are(tmp_path):
    for expected in ("a_00001", "a_00002", "a_00003"):
        path = save_new(tmp_path, saving(b"new"), "a")
        assert path.name == f"{expected}.safetensors"
    (tmp_path / "a_00002.safetensors").unlink()
    assert save_new(tmp_path, saving(b""), "a").name == "a_00002.safetensors"


def test_files_of_the_same_inputs_are_found(tmp_path):
    def save(inputs, prefix="a"):
        return save_new(tmp_path, Calibration("model", notes={"inputs": inputs}).save, prefix)

    first, second = save("one"), save("two")
    save("one", "b")
    (tmp_path / "a_00003.safetensors").write_bytes(b"damaged")
    Calibration("model").save(tmp_path / "a_00004.safetensors")
    assert made_before(tmp_path, "a", "one") == first and made_before(tmp_path, "a", "two") == second
    assert made_before(tmp_path, "a", "three") is None and made_before(tmp_path / "absent", "a", "one") is None


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from qandc_core.calibration.file import Calibration
from qandc_core.calibration.folder import save_new
folder = Path(sys.argv[2])
large = Calibration("model", distances=torch.zeros(200, 200))
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
try:
    save_new(folder, large.save, "full")
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
print(sorted(p.name for p in folder.iterdir()))
print(save_new(folder, large.save, "full").name)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_leaves_nothing_and_the_next_save_works(tmp_path):
    command = [sys.executable, "-c", FULL, str(Path(__file__).parents[2]), str(tmp_path)]
    said, left, saved = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said.startswith(f"Nothing can be saved in {tmp_path} (") and said.endswith("and queue again.")
    assert left == "[]" and saved == "full_00001.safetensors"


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    check_writable(tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    for act in (check_writable, lambda folder: save_new(folder, saving(b""), "a")):
        with pytest.raises(OSError, match="Nothing can be saved in"):
            act(tmp_path / "file" / "folder")
    assert (tmp_path / "file").read_bytes() == b""

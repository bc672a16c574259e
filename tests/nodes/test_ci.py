"""That CI would see what it is there to see, and that the archive stays small."""

import re
from pathlib import Path

import pytest

from tests.comfyui import checkouts
from tests.comfyui.server import copy_published_files

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
ARCHIVE = 20_000_000  # bytes

pytestmark = pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="the archive of the registry has no workflows")


def read(name):
    return (WORKFLOWS / name).read_text(encoding="utf-8")


@pytest.fixture
def no_comfyui(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    checkouts.checkouts.cache_clear()
    yield
    checkouts.checkouts.cache_clear()


def test_a_missing_comfyui_is_a_skip_on_a_desk_and_a_failure_in_ci(no_comfyui, monkeypatch):
    assert [mark.name for mark in checkouts.parameters()[0].marks] == ["skip"]
    monkeypatch.setenv("COMFYUI_REQUIRED", "1")
    with pytest.raises(pytest.UsageError, match="no ComfyUI checkout"):
        checkouts.parameters()
    assert checkouts.parameters(old=True)  # CI has no ComfyUI that is too old


def test_a_comfyui_that_cannot_start_is_a_failure_in_ci(tmp_path, monkeypatch):
    checkout = checkouts.Checkout(tmp_path, (0, 33, 0))
    monkeypatch.setattr(checkouts, "REQUIREMENTS", ("a_module_that_nobody_has",))
    checkouts.missing_modules.cache_clear()
    monkeypatch.delenv("COMFYUI_REQUIRED", raising=False)
    assert [mark.name for mark in checkouts.parameter(checkout).marks] == ["skip"]
    monkeypatch.setenv("COMFYUI_REQUIRED", "1")
    with pytest.raises(pytest.UsageError, match="lacks a_module_that_nobody_has"):
        checkouts.parameter(checkout)
    checkouts.missing_modules.cache_clear()


def test_every_push_tries_floor_and_release_and_every_week_the_newest_of_all():
    assert re.search(r"COMFYUI_REQUIRED: .1", read("comfyui.yml"))
    floor = ".".join(map(str, checkouts.FLOOR))
    assert f"ref: v{floor}" in read("tests.yml") and f">={floor}" in (ROOT / "pyproject.toml").read_text()
    weekly = read("weekly.yml")
    assert "cron:" in weekly and weekly.count("newest-packages: true") == 2 and "ref: master" in weekly
    assert "registry.yml" in weekly


def test_the_archive_is_small(tmp_path):
    copy_published_files(tmp_path / "pack")
    sizes = {path: path.stat().st_size for path in (tmp_path / "pack").rglob("*") if path.is_file()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    assert sum(sizes.values()) <= ARCHIVE, [(str(path), sizes[path]) for path in largest]

"""Apply Cache in every official template that samples, against the schemas of a real ComfyUI."""

from __future__ import annotations

import pytest

from tests.official.recorded import FILE, compact, recorded
from tests.official.table import section
from tests.official.templates import available, check, sampling_templates

from .checkouts import checkouts
from .workflows_table import TABLE

pytestmark = pytest.mark.skipif(not available(), reason="comfyui-workflow-templates-json is not installed")


@pytest.fixture(scope="module")
def object_info(server) -> dict:
    return server.object_info()


def test_apply_cache_goes_before_every_sampler_and_guider(object_info):
    found = {name: check(workflow, object_info) for name, workflow in sampling_templates().items()}
    assert len(found) == 241
    assert not {name: problems for name, problems in found.items() if problems}


def test_what_is_recorded_and_written_is_so(server, object_info):
    if server.checkout != checkouts()[0]:
        pytest.skip("the newest ComfyUI is recorded")
    assert {**recorded(), **compact(object_info)} == recorded(), f"renew {FILE.name} with workflows_table"
    assert section(object_info, server.checkout.name) in TABLE.read_text(encoding="utf-8")

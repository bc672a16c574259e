"""Writes docs/workflows.md from the newest ComfyUI checkout: python -m tests.comfyui.workflows_table"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.official import recorded
from tests.official.table import section

from .checkouts import FLOOR, Checkout, checkouts
from .inside_programs import REPOSITORY
from .server import Server

TABLE = REPOSITORY / "docs" / "workflows.md"
TEXT = """# Workflows

{templates}
Written by `python -m tests.comfyui.workflows_table`.
"""


def schemas(checkout: Checkout) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as base, Server(checkout, Path(base)) as server:
        return server.object_info()


def main() -> None:
    newest = checkouts()[0]
    if newest.version < FLOOR:
        raise SystemExit(f"ComfyUI {newest.name} is older than the oldest that the nodes support")
    object_info = schemas(newest)
    recorded.write(object_info)
    TABLE.write_text(TEXT.format(templates=section(object_info, newest.name)), encoding="utf-8")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

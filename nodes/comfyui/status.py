"""Words on a node of the canvas: what a run did, said where it was asked for.

ComfyUI shows such a text by PromptServer.send_progress_text, on any node, whether or not it runs now.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


def show(node_id: str | None, text: str) -> None:
    """Shows `text` on the node, instead of what it showed before; from any thread, and never raises.

    `node_id` is io.Hidden.unique_id of the node, such as "12:5" inside a subgraph. Without a server, as in tests or in
    a script, and without a node it does nothing.
    """
    server = running_server()
    if server is None or not node_id:
        return
    try:
        server.send_progress_text(text, str(node_id), server.client_id)
    except Exception as error:  # words must never end a run
        log.debug("Q&C: no text on node %s: %r", node_id, error)


def running_server() -> Any:
    """ComfyUI's PromptServer, or None; importing its module would start what a script never wanted."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)

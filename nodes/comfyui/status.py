"""Words on a node of the canvas: what a run did, said where it was asked for.

ComfyUI shows such a text by PromptServer.send_progress_text on any node, whether or not it runs now. Older frontends
keep it; newer ones (1.58) take it off all nodes of a job when the job ends, those included that were cached. What was
said of a node is therefore said once more when a job with that node has ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable
from typing import Any

from .queue import Prompt, executing, running_prompts, running_server, workflow_of

PAUSE = 0.25  # seconds between two looks at the queue
SETTLED, IDLE = 4, 12  # looks at an empty queue after which all jobs have ended, and after which nobody looks any more
OURS = "QandC_"
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
        BOARD.write(server, str(node_id), text)
        BOARD.say(server, str(node_id))
        BOARD.keep(server)
    except Exception as error:  # words must never end a run
        log.debug("Q&C: no text on node %s: %r", node_id, error)


def sentences(lines: Iterable[str]) -> str:
    """The lines that are not empty, each ended by a full stop: Nodes 2.0 draws line breaks as spaces."""
    return "\n".join(f"{line.rstrip('.')}." for line in lines if line)


def node_of(cls: Any) -> str | None:
    """The id on the canvas of a node class that executes and has io.Hidden.unique_id; None in a script."""
    return getattr(getattr(cls, "hidden", None), "unique_id", None)


def parents(node_id: str) -> list[str]:
    """The subgraph nodes around a node, the innermost first: "12:5" and "12" of "12:5:7"."""
    parts = node_id.split(":")
    return [":".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


class Board:
    """The latest words of each node of each workflow, and the watch that shows them again after a job."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, str], tuple[str, str | None]] = {}
        self.workflow = ""
        self.lock = threading.Lock()
        self.server: Any = None  # the one whose prompts are heard of
        self.heard: list[tuple[Prompt, str | None]] = []  # queued since the queue was last empty, with their browser
        self.watching = False

    def write(self, server: Any, node_id: str, text: str) -> None:
        now = executing()
        # A thread of a node's own executes nothing, as far as ComfyUI knows.
        prompt = now[0] if now else next(iter(running_prompts()), None)
        with self.lock:
            self.workflow = prompt.workflow if prompt else ""
            self.texts[self.workflow, node_id] = text, server.client_id

    def say(self, server: Any, node_id: str, workflow: str | None = None, client: str | None = None) -> None:
        """To one browser. A frontend draws only nodes of the graph that is open, so what is said of a node inside a
        subgraph is said of the subgraph's node too, of all its nodes together.
        """
        with self.lock:
            workflow = self.workflow if workflow is None else workflow
            told = {node: said for (where, node), said in self.texts.items() if where == workflow}
        text, first = told[node_id]
        server.send_progress_text(text, node_id, client or first)
        for parent in parents(node_id):
            inside = [said for node, (said, _) in told.items() if node.startswith(f"{parent}:") and said]
            server.send_progress_text("\n".join(inside), parent, client or first)

    def say_again(self, prompt: Prompt, client: str | None = None) -> None:
        """Shows the words of a prompt's nodes in its browser, else in the one that saw it first."""
        for node, spec in prompt.graph.items():
            known = (prompt.workflow, node) in self.texts
            if known and str(spec.get("class_type", "")).startswith(OURS):
                self.say(self.server, node, prompt.workflow, client)

    def keep(self, server: Any) -> None:
        """Hears of every prompt from now on, also of those that find all nodes cached, and watches their end."""
        if self.server is not server:
            self.server = server
            server.add_on_prompt_handler(self.hear)
        self.begin_watch()

    def hear(self, queued: dict[str, Any]) -> dict[str, Any]:
        """Called by the server with what POST /prompt holds."""
        if isinstance(queued.get("prompt"), dict):
            workflow = workflow_of(queued.get("extra_data") or {})
            self.heard.append((Prompt("", queued["prompt"], workflow), queued.get("client_id")))
            self.begin_watch()
        return queued

    def begin_watch(self) -> None:
        if not self.watching:
            self.watching = True
            asyncio.run_coroutine_threadsafe(self.watch(), self.server.loop)

    async def watch(self) -> None:
        """Until the queue has been empty for a while."""
        running: dict[str, Prompt] = {}
        idle = 0
        try:
            while idle < IDLE:
                now = {prompt.id: prompt for prompt in running_prompts()}
                for ended in running.keys() - now.keys():
                    self.say_again(running[ended])
                running = now
                idle = 0 if self.server.prompt_queue.get_tasks_remaining() else idle + 1
                if idle == SETTLED:
                    heard, self.heard = self.heard, []
                    for prompt, client in heard:
                        self.say_again(prompt, client)
                await asyncio.sleep(PAUSE)
        except Exception as error:
            log.debug("Q&C: texts on nodes are no longer repeated: %r", error)
        finally:
            self.watching = False


BOARD = Board()

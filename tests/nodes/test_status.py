"""Words on nodes: what reaches ComfyUI's server, what follows a node, and that no broken server ends a run."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import types
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "nodes" / "comfyui"
GRAPH = {
    "1": {"class_type": "QandC_RunReport", "inputs": {"model": ["0", 0], "label": ""}},
    "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "steps": 4}},
    "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}},
    "4": {"class_type": "KSampler", "inputs": {"model": ["0", 0]}},
    "0": {"class_type": "UNETLoader", "inputs": {"unet_name": "x", "shape": [1, 2, 3]}},
}


@pytest.fixture
def package(monkeypatch):
    """The modules that know nothing of comfy, under a name of their own."""
    parent = types.ModuleType("words_of_the_pack")
    parent.__path__ = [str(FOLDER)]
    monkeypatch.setitem(sys.modules, "words_of_the_pack", parent)
    found = {name: importlib.import_module(f"words_of_the_pack.{name}") for name in ("queue", "status")}
    yield types.SimpleNamespace(**found)
    for name in found:
        sys.modules.pop(f"words_of_the_pack.{name}")


@pytest.fixture
def status(package, monkeypatch):
    monkeypatch.setattr(package.status, "PAUSE", 0.001)
    return package.status


class Queue:
    def __init__(self):
        self.currently_running = {}

    def get_tasks_remaining(self):
        return len(self.currently_running)


class Server:
    client_id = "browser"

    def __init__(self):
        self.sent, self.handlers, self.prompt_queue = [], [], Queue()
        self.loop = asyncio.new_event_loop()

    def send_progress_text(self, text, node_id, sid=None):
        self.sent.append((text, node_id, sid))

    def add_on_prompt_handler(self, handler):
        self.handlers.append(handler)

    def begin(self, prompt_id, graph, workflow="w"):
        extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
        for handler in self.handlers:
            handler({"prompt": graph, "extra_data": extra, "client_id": self.client_id})
        self.prompt_queue.currently_running[0] = (0, prompt_id, graph, extra, [])

    def work(self, seconds=0.05):
        """Lets what was scheduled go on for a while: in turns, since a busy machine takes longer for each."""

        async def turns():
            for _ in range(round(seconds / 0.001)):
                await asyncio.sleep(0.001)

        self.loop.run_until_complete(turns())


@pytest.fixture
def server(monkeypatch):
    found = Server()
    yield running(monkeypatch, found)
    found.loop.run_until_complete(asyncio.sleep(0.1))  # the watch ends by itself
    found.loop.close()


def running(monkeypatch, instance):
    module = types.ModuleType("server")
    module.PromptServer = type("PromptServer", (), {} if instance is None else {"instance": instance})
    monkeypatch.setitem(sys.modules, "server", module)
    return instance


def execute_as(monkeypatch, prompt_id, node):
    module = types.ModuleType("comfy_execution.utils")
    module.get_executing_context = lambda: types.SimpleNamespace(prompt_id=prompt_id, node_id=node, list_index=None)
    monkeypatch.setitem(sys.modules, "comfy_execution.utils", module)


def test_text_goes_to_the_node_and_to_the_browser_that_queued_it(status, server):
    status.show("5", "10 of 20 steps computed")
    assert server.sent == [("10 of 20 steps computed", "5", "browser")]


def test_text_inside_subgraphs_is_said_of_every_subgraph_around_with_that_of_its_other_nodes(status, server):
    status.show("12:5:7", "first")
    assert server.sent == [("first", node, "browser") for node in ("12:5:7", "12:5", "12")]
    server.sent.clear()
    status.show("12:8", "second")
    assert server.sent == [("second", "12:8", "browser"), ("first\nsecond", "12", "browser")]


def test_words_of_a_thread_are_those_of_the_job_that_runs(status, server, monkeypatch):
    """They take the place of what the node said before in this workflow, also when all is said again."""
    server.begin("p", GRAPH)
    execute_as(monkeypatch, "p", "1")
    status.show("1", "no runs yet")
    monkeypatch.delitem(sys.modules, "comfy_execution.utils")
    thread = threading.Thread(target=status.show, args=("1", "2 runs"))
    thread.start()
    thread.join()
    server.work()
    server.sent.clear()
    server.prompt_queue.currently_running.clear()
    server.work()
    assert server.sent and {text for text, _, _ in server.sent} == {"2 runs"}


def test_without_a_node_nothing_is_sent(status, server):
    status.show(None, "text")
    assert not server.sent


def test_nothing_happens_without_a_server(status, monkeypatch):
    running(monkeypatch, None)
    status.show("1", "text")
    monkeypatch.delitem(sys.modules, "server")
    status.show("1", "text")
    assert "server" not in sys.modules


@pytest.mark.parametrize("broken", [object(), types.SimpleNamespace(client_id="x", send_progress_text=None)])
def test_a_server_that_cannot_show_text_ends_no_run(status, monkeypatch, broken):
    running(monkeypatch, broken)
    status.show("1", "text")


def test_it_is_said_again_when_the_job_has_ended_and_after_jobs_that_find_the_node_cached(status, server, monkeypatch):
    server.begin("a", GRAPH)
    execute_as(monkeypatch, "a", "2")
    status.show("1", "text")
    server.work()
    assert len(server.sent) == 1, "the job still runs"
    server.prompt_queue.currently_running.clear()
    server.work()
    assert server.sent[1:] and set(server.sent) == {("text", "1", "browser")}
    server.sent.clear()
    server.client_id = "reloaded"
    server.begin("b", GRAPH)
    server.prompt_queue.currently_running.clear()  # all cached: over before anybody looks
    server.work()
    assert server.sent == [("text", "1", "reloaded")]


@pytest.mark.parametrize("graph, workflow", [({"9": GRAPH["1"]}, "w"), (GRAPH, "another"), ({"1": GRAPH["2"]}, "w")])
def test_nothing_is_said_again_of_other_nodes_and_other_workflows(status, server, monkeypatch, graph, workflow):
    server.begin("a", GRAPH)
    execute_as(monkeypatch, "a", "2")
    status.show("1", "text")
    server.prompt_queue.currently_running.clear()
    server.work()
    server.sent.clear()
    server.begin("b", graph, workflow)
    server.work()
    server.prompt_queue.currently_running.clear()
    server.work()
    assert not server.sent


def test_what_executes_is_known_with_its_graph(package, server, monkeypatch):
    assert package.queue.executing() is None or "comfy_execution.utils" in sys.modules
    server.begin("a", GRAPH)
    execute_as(monkeypatch, "a", "2")
    prompt, node, place = package.queue.executing()
    assert (prompt.id, prompt.graph, prompt.workflow, node, place) == ("a", GRAPH, "w", "2", 0)
    execute_as(monkeypatch, "of no queue", "3")
    assert package.queue.executing()[0].graph == {}


@pytest.mark.parametrize("node, follow", [("1", {"2", "3"}), ("0", {"1", "2", "3", "4"}), ("3", set()), ("x", set())])
def test_what_follows_a_node(package, node, follow):
    assert package.queue.downstream(GRAPH, node) == follow


def test_lines_read_well_where_their_breaks_are_not_drawn(status):
    assert status.sentences(["10 of 20 steps computed", "", "It ended."]) == "10 of 20 steps computed.\nIt ended."

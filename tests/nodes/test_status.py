"""Words on nodes: what reaches ComfyUI's server, and that a missing or broken server ends no run."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "nodes" / "comfyui" / "status.py"


@pytest.fixture
def status():
    spec = importlib.util.spec_from_file_location("status_of_the_pack", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server:
    client_id = "browser"

    def __init__(self):
        self.sent = []

    def send_progress_text(self, text, node_id, sid=None):
        self.sent.append((text, node_id, sid))


def running(monkeypatch, instance):
    module = types.ModuleType("server")
    module.PromptServer = type("PromptServer", (), {} if instance is None else {"instance": instance})
    monkeypatch.setitem(sys.modules, "server", module)


def test_text_goes_to_the_node_and_to_the_browser_that_queued_it(status, monkeypatch):
    server = Server()
    running(monkeypatch, server)
    status.show("12:5", "10 of 20 steps computed")
    assert server.sent == [("10 of 20 steps computed", "12:5", "browser")]


def test_without_a_node_nothing_is_sent(status, monkeypatch):
    server = Server()
    running(monkeypatch, server)
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

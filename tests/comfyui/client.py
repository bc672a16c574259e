"""ComfyUI's HTTP and websocket interface, as its frontend uses it."""

from __future__ import annotations

import json
import select
import struct
import urllib.error
import urllib.request
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import websocket

TIMEOUT = 300  # seconds that an answer or the next message may take on a busy machine
TEXT, PREVIEW_WITH_METADATA = 3, 4


class Rejected(Exception):
    """ComfyUI refuses the prompt; the argument is its answer."""


@dataclass
class Run:
    """What happened to one prompt, by node id."""

    prompt_id: str
    status: str = ""  # success, error or interrupted
    started: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    progress: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    previews: Counter = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)  # the last that was shown on a node
    error: dict[str, Any] | None = None
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def executed(self) -> set[str]:
        return set(self.started) - set(self.cached)

    @property
    def message(self) -> str:
        assert self.error is not None, f"the run ended in {self.status}, expected an error"
        return self.error["exception_message"].strip()

    def hear(self, event: str, data: dict[str, Any]) -> None:
        """Takes in one event of this prompt."""
        if event == "execution_cached":
            self.cached += data["nodes"]
        elif event == "executing" and data["node"] is not None:
            self.started.append(data["node"])
        elif event == "progress":
            self.progress[data["node"]].append((data["value"], data["max"]))
        elif event == "execution_error":
            self.error = data
        if event in ("execution_success", "execution_error", "execution_interrupted"):
            self.status = event.removeprefix("execution_")


class Client:
    def __init__(self, address: str):
        self.address = address

    def get(self, path: str, timeout: float = TIMEOUT) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout) as answer:
            return answer.read()

    def status_of(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=TIMEOUT) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, content: Any) -> Any:
        data = json.dumps(content).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.loads(answer.read() or "null")

    def object_info(self, node: str = "") -> dict[str, Any]:
        return self.get_json(f"/object_info/{node}" if node else "/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def start(self, prompt: dict[str, Any]) -> Running:
        return Running(self, prompt)

    def run(self, prompt: dict[str, Any]) -> Run:
        """The prompt, run to its end."""
        return self.start(prompt).finish()

    def free_memory(self) -> None:
        """Empties ComfyUI's cache of outputs and unloads the models."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The worker frees after the prompt at hand: when this one has ended, the next starts from nothing.
        self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "free"}}})


class Running:
    """A prompt that was queued, heard over its own websocket."""

    def __init__(self, client: Client, prompt: dict[str, Any]):
        self.client, name = client, uuid.uuid4().hex
        self.socket = websocket.create_connection(f"ws://{client.address}/ws?clientId={name}", timeout=TIMEOUT)
        self.ended = False
        try:
            self.ask_for_preview_metadata()
            self.result = Run(client.post("/prompt", {"prompt": prompt, "client_id": name})["prompt_id"])
        except urllib.error.HTTPError as error:
            self.socket.close()
            raise Rejected(error.read().decode()) from error

    def ask_for_preview_metadata(self) -> None:
        """With it, ComfyUI says which node a preview belongs to."""
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        while json.loads(self.socket.recv())["type"] != "feature_flags":
            pass

    def listen(self) -> None:
        """Takes in one message."""
        message = self.socket.recv()
        if isinstance(message, bytes):
            return self.see(message)
        event = json.loads(message)
        data = event["data"]
        if data.get("prompt_id") == self.result.prompt_id:
            self.result.hear(event["type"], data)
            self.ended = event["type"] == "executing" and data["node"] is None

    def see(self, frame: bytes) -> None:
        kind, length = struct.unpack(">II", frame[:8])
        if kind == TEXT:
            node, text = frame[8 : 8 + length], frame[8 + length :]
            self.result.texts[node.decode()] = text.decode()
        if kind == PREVIEW_WITH_METADATA:
            self.result.previews[json.loads(frame[8 : 8 + length])["node_id"]] += 1

    def wait_for_progress(self, node: str) -> None:
        while not self.result.progress[node] and not self.ended:
            self.listen()
        assert self.result.progress[node], f"the run ended without progress: {self.result}"

    def interrupt(self, node: str) -> int:
        """Interrupts the run; the last step that the node had reported when ComfyUI had heard of it."""
        self.client.interrupt()
        while not self.ended and select.select([self.socket.sock], [], [], 0)[0]:
            self.listen()
        return self.result.progress[node][-1][0]

    def finish(self) -> Run:
        try:
            while not self.ended:
                self.listen()
        finally:
            self.socket.close()
        history = self.client.get_json(f"/history/{self.result.prompt_id}")
        self.result.outputs = history[self.result.prompt_id]["outputs"]
        return self.result

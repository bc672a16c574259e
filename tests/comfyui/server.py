"""ComfyUI as users start it, on a folder of its own that holds the pack as it is published."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from fnmatch import fnmatch
from pathlib import Path

from .checkouts import FLOOR, Checkout
from .client import Client, Run

ROOT = Path(__file__).parents[2]
FOLDER = "ComfyUI-QandC"
START = 300  # seconds, on a busy machine
FLAGS = ("--cpu", "--preview-method", "latent2rgb", "--disable-metadata", "--disable-api-nodes")


def copy_published_files(target: Path) -> None:
    """The pack without what git and the registry leave out."""
    lists = [ROOT / ".gitignore", ROOT / ".comfyignore"]
    patterns = [line.strip("/") for file in lists for line in file.read_text().splitlines() if line]

    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder).relative_to(ROOT)
        paths = {name: ((inside / name).as_posix(), name) for name in names}
        return [n for n, forms in paths.items() if n == ".git" or any(fnmatch(f, p) for f in forms for p in patterns)]

    shutil.copytree(ROOT, target, ignore=left_out)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server(Client):
    """`must_start` False also takes a ComfyUI that ends before it listens; its log then says why."""

    def __init__(self, checkout: Checkout, base: Path, must_start: bool = True):
        self.checkout, self.base, self.must_start = checkout, base, must_start
        self.log_file = base / "server.log"
        self.port = free_port()
        super().__init__(f"127.0.0.1:{self.port}")
        copy_published_files(base / "custom_nodes" / FOLDER)
        for name in ("models/diffusion_models", "models/vae", "input", "output", "user"):
            (base / name).mkdir(parents=True)

    def __enter__(self) -> Server:
        command = [
            self.checkout.python, "main.py", *FLAGS, "--port", str(self.port), "--base-directory", str(self.base),
            "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        if self.checkout.version >= FLOOR:
            # Newer versions drop results that are in use where other programs leave little memory.
            command += ["--cache-ram", "0"]
        # Models this small gain nothing from threads.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout.path, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        try:
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        deadline, listening = time.monotonic() + START, False
        while not listening and self.running and time.monotonic() < deadline:
            time.sleep(0.25)
            listening = self.listens()
        self.startup_log = self.log
        if not listening and (self.must_start or self.running):
            raise RuntimeError(f"ComfyUI {self.checkout.name} did not start:\n{self.log[-4000:]}")

    def listens(self) -> bool:
        try:
            return bool(self.get("/system_stats", timeout=5))
        except OSError:
            return False

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def models(self) -> Path:
        return self.base / "models" / "diffusion_models"

    @property
    def calibrations(self) -> Path:
        return self.base / "output" / "qandc"

    def succeed(self, prompt: dict) -> Run:
        run = self.run(prompt)
        assert run.status == "success", run.error and f"{run.error['node_type']}: {run.message}"
        return run

    def saved(self, run: Run, node: str) -> list[bytes]:
        """Content of the files that an output node wrote."""
        places = [place for files in run.outputs[node].values() for place in files]
        return [(self.base / p["type"] / p["subfolder"] / p["filename"]).read_bytes() for p in places]

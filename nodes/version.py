"""The oldest ComfyUI these nodes run on: the first with advanced inputs, search aliases and node replacement."""

from comfyui_version import __version__

FLOOR = (0, 18, 1)


def require_comfyui() -> None:
    """Raises RuntimeError with one sentence where ComfyUI is older."""
    if tuple(int(part) for part in __version__.split(".")[:3]) < FLOOR:
        floor = ".".join(map(str, FLOOR))
        raise RuntimeError(f"Q&C needs ComfyUI {floor} or newer and this is {__version__}; update ComfyUI.")

"""Files of tensors: safetensors, pickled state dicts, sharded checkpoints, their metadata, and one atomic save.

Every reader treats a file as something that anybody may have made or damaged. Parsing happens within `reading`, so that
whatever a parser raises, from a wrong byte to JSON nested a million deep, leaves as one ValueError that names the file;
every writer goes through `written_whole`, so that a full disk leaves the old file and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import secrets
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
METADATA_KEY = "qandc_metadata"  # a tensor of metadata, for savers that write tensors alone (ComfyUI's ModelSave)
METADATA_BYTES = 2**26
NESTED = 8  # how deep a pickled checkpoint may nest its state dicts
WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d) *(\.|$)", re.IGNORECASE)


# Names.


def is_text(name: str) -> bool:
    """True for printable Unicode: file systems also hold bytes that no JSON and no web page can carry."""
    return all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in name)


def is_file_name(name: str) -> bool:
    """True for the name of one visible file in its folder: no path on any system, printable, not hidden.

    Any script, brackets, commas, quotes and the like are fine.
    """
    return bool(name) and not name.startswith(".") and is_text(name) and not set(name) & {"/", "\\"}


def is_portable(name: str) -> bool:
    """True for a file name that every system can hold; Windows takes CON and a:b for devices and streams."""
    device = WINDOWS_DEVICE.match(name) or set(name) & set('<>:"|?*')
    return is_file_name(name) and not device and len(os.fsencode(name)) < 256


# Writing.


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once the context ends well, else disappears.

    Raises OSError with one sentence that names `path`: no space, no permission, a folder that is a file.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short, so that a name of full length can be saved
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors writes files for their owner alone
            with suppress(OSError):
                temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or io_error(str(error))
        raise OSError(f"{path} could not be written ({reason}); make room there, or choose another folder.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def io_error(message: str) -> str:
    """The system's reason in safetensors' "Error while serializing: I/O error: No space left ... (os error 28)"."""
    return message.rpartition("I/O error: ")[2].partition(" (os error")[0]


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; a failed write leaves the old file alone and raises OSError."""
    with written_whole(path) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, dict(metadata))


def save_text(text: str, path: str | os.PathLike[str]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# Reading.


@contextmanager
def reading(path: str | os.PathLike[str], remedy: str = "download or save it again") -> Iterator[None]:
    """Whatever goes wrong with the content of `path` becomes a ValueError that names it; OSError stays one.

    `remedy` ends the sentence where the cause is a parser's, which does not say what to do.
    """
    try:
        yield
    except OSError as error:
        if str(path) in str(error) or error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read ({one_line(error)}); {remedy}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {one_line(error)}") from error
    except MemoryError as error:
        raise ValueError(f"{path} is damaged or needs more memory than there is; {remedy}") from error
    except Exception as error:  # damaged files fail in as many ways as there are bytes
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{path} is damaged ({reason}); {remedy}") from error


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and string metadata of one file, or of all files of an index."""
    return (read_shards(path), {}) if path.name.endswith(".index.json") else read_file(path)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.suffix in SAFETENSORS:
        return read_safetensors(path)
    if path.suffix in PICKLES:
        return read_pickle(path), {}
    raise ValueError(f"{path} is not a DiT checkpoint: expected a file ending in {', '.join(SAFETENSORS + PICKLES)}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with reading(path), opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def read_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Names of the tensors of a safetensors file, and its metadata, that of a metadata tensor included."""
    with reading(path), opened(path) as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
        for key in filter(is_metadata, keys):
            metadata = {**metadata, **read_metadata_tensor(file.get_tensor(key))}
        return keys, metadata


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, of which tensors are read as they are asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({one_line(error)}); download or save it again"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict, those of nested ones under dotted names, such as `ema.` in a training checkpoint."""
    with reading(path):
        try:
            # Training checkpoints of the original code hold their arguments, a plain record, beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is damaged or holds Python objects that weights_only=True refuses; "
                "save its state dict as safetensors and load that"
            ) from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle fails in as many ways as it has opcodes
            raise ValueError(f"{path} is truncated or not a PyTorch file") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
        tensors = dict(nested_tensors(content))
        for key, tensor in tensors.items():
            check_stored(key, tensor)
        return tensors


def nested_tensors(content: Mapping[Any, Any], prefix: str = "", depth: int = NESTED) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        elif isinstance(key, str) and isinstance(value, Mapping) and depth:
            yield from nested_tensors(value, f"{prefix}{key}.", depth - 1)


def check_stored(key: str, tensor: Tensor) -> None:
    """Refuses what a state dict does not hold: sparse, complex or absent values, and more values than are stored."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
    if not plain or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{key} is a tensor of {tensor.dtype} that is not dense, expected the weights of a model")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{key} has the shape {tuple(tensor.shape)}, but the file holds fewer values")


def read_shards(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in shard_files(path):
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, but {path.name} lists it")
        tensors.update(read_file(shard)[0])
    return tensors


def shard_files(path: Path) -> list[Path]:
    """The files that an index lists, all beside it. Raises ValueError on any other place."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path} has no weight_map, expected the index of a sharded checkpoint")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if not is_portable(name) or not name.endswith(SAFETENSORS + PICKLES):
            raise ValueError(f"{path} lists {name[:100]!r}, expected the names of checkpoint files in its own folder")
    return [path.parent / name for name in names]


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError on anything else, NaN and infinity included."""

    def refused(constant: str) -> None:
        raise ValueError(f"it holds the number {constant}")

    try:
        content = json.loads(text, parse_constant=refused)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, expected a JSON object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        message = str(error)
        if message.startswith("it holds a "):
            raise ValueError(f"{path} {message.removeprefix('it ')}") from error
        raise ValueError(f"{path} is not valid JSON ({one_line(error)})") from error


# Metadata among the tensors.


def is_metadata(key: str) -> bool:
    return key == METADATA_KEY or key.endswith(f".{METADATA_KEY}")


def metadata_tensor(metadata: Mapping[str, str]) -> Tensor:
    """UTF-8 JSON bytes, uint8 (N,)."""
    return torch.frombuffer(bytearray(json.dumps(dict(metadata)).encode()), dtype=torch.uint8)


def read_metadata_tensor(tensor: Tensor) -> dict[str, Any]:
    """Raises ValueError unless the bytes are a JSON object."""
    try:
        if tensor.dtype != torch.uint8 or tensor.numel() > METADATA_BYTES:
            raise ValueError(f"it is {tuple(tensor.shape)} of {tensor.dtype}, expected bytes")
        return parse_json(bytes(tensor.flatten().tolist()))
    except ValueError as error:
        raise ValueError(f"{METADATA_KEY} is damaged ({one_line(error)}); save the model again") from error


def pop_metadata(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Takes the metadata tensor out of the tensors, wherever its prefix put it."""
    keys = list(filter(is_metadata, tensors))
    found = [tensors.pop(key) for key in keys]
    return read_metadata_tensor(found[0]) if found else {}

"""Which layers of a network are quantized: those of its repeated transformer blocks, found by structure.

What embeds images, text, labels and timesteps, distils guidance or ends a network is small, runs once, and costs
quality when it is quantized; it lies outside the lists of blocks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence

from torch import nn

UNET = ("input_blocks", "middle_block", "output_blocks")
SMALLEST_BLOCK = 3  # linear layers: attention alone has three


def block_linears(
    network: nn.Module, known_lists: Collection[str], is_linear: Callable[[nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    """Linear layers of the network's blocks by name, in the network's order.

    `known_lists` are the paths of the lists of blocks where they are known. Another list as high in the network counts
    where each of its entries has all the layers that an entry of a known list has (VACE's control blocks, refiners of
    noise, but not the shorter blocks of a text encoder). Without known lists the attention blocks of a UNet, or the
    outermost lists whose entries attend.
    """
    linears = [(name, module) for name, module in network.named_modules() if is_linear(module)]
    if known_lists:
        lists = [*known_lists, *similar_lists(network, known_lists, is_linear)]
    elif all(hasattr(network, part) for part in UNET):
        lists = list(unet_attention(network))
    else:
        lists = attending_lists(network, is_linear)
    prefixes = tuple(f"{path}." for path in lists)
    return [(name, module) for name, module in linears if f"{name}.".startswith(prefixes)]


def entries(container: nn.Module) -> list[nn.Module]:
    return list(container.children())


def module_lists(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """ModuleLists and ModuleDicts by path, outer ones before those within them."""
    for path, module in network.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and path and len(module):
            yield path, module


def linear_names(block: nn.Module, is_linear: Callable[[nn.Module], bool]) -> set[str]:
    return {name for name, module in block.named_modules() if is_linear(module)}


def similar_lists(
    network: nn.Module, known_lists: Collection[str], is_linear: Callable[[nn.Module], bool]
) -> list[str]:
    known = [linear_names(block, is_linear) for path in known_lists for block in entries(network.get_submodule(path))]
    shapes = [names for names in known if len(names) >= SMALLEST_BLOCK]
    inside = tuple(f"{path}." for path in known_lists)
    depth = max(path.count(".") for path in known_lists)
    return [
        path
        for path, found in module_lists(network)
        if path not in known_lists
        and path.count(".") <= depth
        and not path.startswith(inside)
        and any(all(shape <= linear_names(block, is_linear) for block in entries(found)) for shape in shapes)
    ]


def unet_attention(network: nn.Module) -> Iterator[str]:
    """The lists of blocks of every spatial transformer, and the projections into and out of them."""
    for path, module in network.named_modules():
        if path.startswith(UNET) and isinstance(getattr(module, "transformer_blocks", None), nn.ModuleList):
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) or name in ("proj_in", "proj_out"):
                    yield f"{path}.{name}"


def attends(block: nn.Module, is_linear: Callable[[nn.Module], bool]) -> bool:
    attention = any("attn" in text or "attention" in text for text in words(block))
    return attention and len(linear_names(block, is_linear)) >= SMALLEST_BLOCK


def words(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        yield name.lower()
        yield type(module).__name__.lower()


def attending_lists(network: nn.Module, is_linear: Callable[[nn.Module], bool]) -> list[str]:
    """Lists with attention that lie least deep: those of encoders lie within the encoder's module."""
    found: list[str] = []
    for path, module in module_lists(network):
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if not nested and any(attends(block, is_linear) for block in entries(module)):
            found.append(path)
    depth = min((path.count(".") for path in found), default=0)
    return [path for path in found if path.count(".") == depth]


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Names that contain one of the patterns."""
    return [name for name in names if any(pattern in name for pattern in patterns)]


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """A sentence for each pattern that no name contains, with parts of names that come near it."""
    parts = sorted({part for name in names for part in (*name.split("."), name)})
    sentences = []
    for pattern in patterns:
        if any(pattern in name for name in names):
            continue
        by_case = {part.lower(): part for part in parts}
        near = difflib.get_close_matches(pattern.lower(), by_case, n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(by_case[part] for part in near)}" if near else ""
        sentences.append(f"no layer's name contains {pattern!r}{hint}")
    return sentences

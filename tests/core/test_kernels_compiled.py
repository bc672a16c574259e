"""Compiles the Triton kernels for GPUs that are not here, with the assembler that Triton brings along."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qandc_core.fused.kernels import triton_ops  # noqa: E402
from qandc_core.fused.kernels.triton_matmul import (  # noqa: E402
    INTERPRETED,
    TILES,
    fitting_tiles,
    int8_matmul_kernel,
    shared_bytes,
)
from qandc_core.fused.kernels.triton_quantize import halves, quantize_kernel  # noqa: E402
from qandc_core.quantization.grids import Grid  # noqa: E402

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may take
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}
LEVELS = {None: 0, 64: 3, 256: 4}
ALIGNED = ("N", "K", "shift_stride", "scale_stride", "gate_stride")  # integers that 16 divides in a transformer

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set"),
    pytest.mark.skipif(not PTXAS.is_file(), reason="this Triton brings no ptxas"),
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_for(architecture, kernel, types, constants, warps, stages):
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants.get(name) for name in names if name not in types}
    aligned = [name for name, type in types.items() if type.startswith("*") or name in ALIGNED]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def spilled_bytes(compiled, architecture, folder):
    """What ptxas had to move from registers to memory."""
    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [PTXAS, "-v", f"-arch={ARCHITECTURES[architecture]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return int(stores) + int(loads)


def compile_product(architecture, tile, end):
    """`end`: plain in bfloat16, codes after GELU, or a gated residual in float32, which needs the most registers."""
    types = {
        "a": "*i8", "b": "*i8", "row_scale": "*fp32", "column_scale": "*fp32", "bias": "*bf16",
        "out": {"plain": "*bf16", "codes": "*i8", "residual": "*fp32"}[end],
        "M": "i32", "N": "i32", "K": "i32", "tokens": "i32", "gate_stride": "i32",
    }  # fmt: skip
    if end == "codes":
        types |= {"grid_scale": "*fp32", "grid_zero": "*fp32"}
        del types["row_scale"]
    if end == "residual":
        types |= {"gate": "*bf16", "residual": "*fp32"}
    constants = {
        "GELU": end == "codes", "LOW": -128, "HIGH": 127, "EVEN_K": 1152 % tile.kwargs["BLOCK_K"] == 0,
        "ONE_IMAGE": True, **tile.kwargs,
    }  # fmt: skip
    return compile_for(architecture, int8_matmul_kernel, types, constants, tile.num_warps, tile.num_stages)


def offered(architecture):
    """Every tile that some number of rows is offered on the architecture."""
    found = [
        tile
        for tile in TILES
        if any(tile in fitting_tiles(TILES, rows, SHARED[architecture], architecture == 90) for rows in (1, 32, 4096))
    ]
    return [pytest.param(architecture, tile, id=f"sm_{architecture}, {tile}") for tile in found]


@pytest.mark.parametrize(("architecture", "tile"), [*offered(90), *offered(80)])
def test_product_compiles_without_spills_and_multiplies_on_tensor_cores(architecture, tile, tmp_path):
    ends = ("residual", "codes") if architecture == 90 else ("plain",)
    for end in ends:
        compiled = compile_product(architecture, tile, end)
        assert compiled.metadata.shared <= min(SHARED[architecture], max(shared_bytes(tile), 65536))
        assert spilled_bytes(compiled, architecture, tmp_path) == 0
        instructions = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S*", compiled.asm["ptx"]))
        wgmma = architecture == 90 and tile.kwargs["BLOCK_M"] >= 64
        pattern = r"wgmma\.mma_async\.\S*\.s32\.s8\.s8" if wgmma else r"mma\.sync\.\S*k32\S*\.s32\.s8\.s8\.s32"
        assert instructions and all(re.fullmatch(pattern, name) for name in instructions)


def compile_quantizer(architecture, width, group, warps, modulated, static, dtype):
    types = {
        "x": dtype, "codes": "*i8", "rows": "i32", "tokens": "i32", "shift_stride": "i32", "scale_stride": "i32",
        "eps": "fp32",
    }  # fmt: skip
    types |= {"shift": dtype, "scale": dtype} if modulated else {}
    types |= {"grid_scale": "*fp32", "grid_zero": "*fp32"} if static else {"row_scale": "*fp32"}
    head, tail = halves(width, group or 1)
    constants = {
        "WIDTH": width, "HEAD": head, "TAIL": tail, "LEVELS": LEVELS[group], "GELU": not modulated,
        "LOW": -127, "HIGH": 127,
    }  # fmt: skip
    return compile_for(architecture, quantize_kernel, types, constants, warps, 3)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("width", "group", "modulated", "static", "dtype"),
    [
        (1152, 64, True, False, "*bf16"),
        (1152, None, True, True, "*fp32"),
        (4608, 256, False, False, "*bf16"),
        (8192, 256, True, False, "*fp16"),
    ],
)
def test_quantizer_compiles_without_spills(architecture, width, group, modulated, static, dtype, tmp_path):
    arguments = dict(zip(("HEAD", "TAIL"), halves(width, group or 1)))
    configs = quantize_kernel.early_config_prune(quantize_kernel.configs, arguments)
    # The fewest warps hold the most values in each thread.
    warps = min(config.num_warps for config in configs) if architecture == 90 else 4
    compiled = compile_quantizer(architecture, width, group, warps, modulated, static, dtype)
    assert spilled_bytes(compiled, architecture, tmp_path) == 0
    assert "ld.global.v4.b32" in compiled.asm["ptx"], "rows are not read in 16 bytes"


@pytest.mark.parametrize("width", [64, 1152, 4608, 768, 3072, 5120, 8192, 3456])
def test_a_row_fits_its_two_parts(width):
    for group in (1, 4, 16, 64, 256):
        if width % group == 0:
            head, tail = halves(width, group)
            assert head + tail >= width and head % group == tail % group == 0
            assert not head & (head - 1) and not tail & (tail - 1)
    if width in (1152, 4608, 768, 3072, 5120, 8192):
        assert sum(halves(width, 64)) == width


def test_tiles_fit_the_rows_and_the_device():
    every = [fitting_tiles(TILES, rows, shared, wgmma) for rows in (1, 2, 17, 64, 500, 8192) for shared in
             SHARED.values() for wgmma in (True, False)]  # fmt: skip
    assert all(every)
    assert {tile.kwargs["BLOCK_M"] for tile in fitting_tiles(TILES, 4, SHARED[90], True)} == {16}
    assert max(tile.kwargs["BLOCK_M"] for tile in fitting_tiles(TILES, 64, SHARED[90], True)) == 64
    assert all(shared_bytes(tile) <= SHARED[80] for tile in fitting_tiles(TILES, 8192, SHARED[80], False))


class PretendedH100:
    """What Triton asks of a driver before it loads a kernel."""

    utils = SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED[90]})

    def get_current_device(self):
        return 99  # not the number of a real one, whose compiled kernels Triton keeps

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launches(monkeypatch):
    """Launches compile for an H100, with the arguments that they were given, and go no further; name and kernels."""
    found = []

    def compile_only(tuner, *arguments, grid, warmup, **options):
        found.append((tuner.base_fn.__name__, tuner.warmup(*arguments, grid=grid, **options)))

    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedH100())
    monkeypatch.setattr(triton.runtime.autotuner.Autotuner, "run", compile_only)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for kernel in (quantize_kernel, int8_matmul_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1] + kernel.configs[-1:])
    return found


def test_functions_launch_what_compiles(launches):
    grid = Grid(torch.tensor(0.03), torch.tensor(-5.0), -128, 127)
    x, modulation = torch.randn(2, 8, 192).bfloat16(), torch.randn(2, 6, 192).bfloat16()
    codes, rows = triton_ops.quantize_modulated(x, modulation[:, 1], modulation[:, 4], 1e-6, 64)
    static, nothing = triton_ops.quantize_rows(x.flatten(0, 1), 64, True, grid)
    weight, scale, bias = torch.zeros(192, 192, dtype=torch.int8), torch.ones(192), torch.zeros(192)
    given = (weight, scale, bias, torch.bfloat16)
    y = triton_ops.int8_matmul(codes, rows, *given, gate=modulation[:, 2], residual=x.flatten(0, 1))
    hidden = triton_ops.int8_matmul(static, nothing, *given, gelu=True, grid=grid)
    assert [name for name, _ in launches] == ["quantize_kernel"] * 2 + ["int8_matmul_kernel"] * 2
    assert all("sm_90" in kernel.asm["ptx"] for _, kernels in launches for kernel in kernels)
    assert [len(kernels) for _, kernels in launches] == [2, 2, 1, 1], "tiles for 16 rows are one"
    assert y.dtype == torch.bfloat16 and hidden.dtype == torch.int8 and nothing is None

"""Rounding a layer takes no more memory than `working_bytes` says, by the tensors that live at once on a CPU."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qandc_core.calibration.statistics import LayerStatistics
from qandc_core.quantization.formats import ALL
from qandc_core.quantization.native import NativeConfig, quantize_weight, working_bytes


class Living(TorchDispatchMode):
    """The most bytes that tensors made within it took at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage):
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.held.pop, storage._cdata)
            self.most = max(self.most, sum(self.held.values()))


@pytest.mark.parametrize("outputs, inputs", [(1536, 256), (256, 1024)])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("format", [format for format in ALL if format.available()], ids=lambda format: format.name)
def test_no_more_than_is_made_free(format, rounding, outputs, inputs):
    layer = LayerStatistics.empty(inputs, hessian=True, held_out=64)
    x = torch.randn(2 * inputs, inputs)
    layer.update(x)
    layer.keep_held_out(x[:64])
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    with Living() as living:
        quantize_weight("layer", weight, None, NativeConfig(format.name, rounding), layer)
    assert 2 * 4 * outputs * inputs < living.most < working_bytes(outputs, inputs)

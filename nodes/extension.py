"""The extension that ComfyUI registers."""

from comfy_api.v0_0_2 import ComfyExtension, io
from typing_extensions import override

from .apply_cache import ApplyCache
from .calibrate_from_runs import CalibrateFromRuns
from .class_label import ClassLabel
from .compare import Compare
from .load_dit import LoadDiT
from .quantize import Quantize
from .quantize_text_encoder import QuantizeTextEncoder
from .run_report import RunReport
from .sample import Sample
from .save_text_encoder import SaveTextEncoder
from .tap_calibrate import TAPCalibrate
from .variance_compensate import VarianceCompensate


class QandCExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadDiT,
            ClassLabel,
            ApplyCache,
            TAPCalibrate,
            CalibrateFromRuns,
            Quantize,
            QuantizeTextEncoder,
            SaveTextEncoder,
            VarianceCompensate,
            Sample,
            RunReport,
            Compare,
        ]

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..qandc_core.caching.policies import (
    CachePolicy,
    ChosenSteps,
    ErrorBudget,
    Interval,
    Placed,
    Speedup,
    StepCount,
)
from ..qandc_core.caching.presets import LEVELS, Preset
from . import schema
from .comfyui.cache.attach import apply_cache
from .comfyui.cache.placing import placing
from .comfyui.cache.run import REUSE_OPTIONS, CacheSettings
from .comfyui.quantize.weights import fingerprint_of
from .comfyui.status import node_of, show

# What each option of `policy` makes; its inputs are the fields.
CLASSES: dict[str, type[CachePolicy]] = {
    **dict.fromkeys(LEVELS, Preset),
    "speedup": Speedup,
    "number of steps": StepCount,
    "error budget": ErrorBudget,
    "interval": Interval,
    "chosen steps": ChosenSteps,
}
FIELDS = {"computed": "num_computed", "computed_steps": "steps"}  # inputs that the dataclasses name otherwise
POLICIES = [
    *(io.DynamicCombo.Option(name, []) for name in LEVELS),
    io.DynamicCombo.Option(
        "speedup",
        [
            io.Float.Input(
                "speedup",
                default=2.0,
                min=1.0,
                max=20.0,
                step=0.1,
                tooltip="Target speedup of the model calls. The cost of a reused step is counted on the network and "
                "decides how many steps are computed; a calibration decides which. 1 disables the cache.",
            ),
        ],
    ),
    io.DynamicCombo.Option(
        "number of steps",
        [
            io.Int.Input(
                "computed",
                default=20,
                min=1,
                max=1000,
                tooltip="Number of steps to compute. They are denser towards the end; a calibration places them where "
                "they matter most.",
            ),
        ],
    ),
    io.DynamicCombo.Option(
        "error budget",
        [
            io.Float.Input(
                "max_error",
                default=0.02,
                min=0.0,
                max=1.0,
                step=0.001,
                round=0.0001,
                tooltip="Total relative error that reuse may add to the image, as estimated during the run. Harder "
                "images compute more steps. 0 disables the cache.",
            ),
            io.Int.Input(
                "max_reused",
                default=ErrorBudget.max_reused,
                min=1,
                max=50,
                tooltip="Maximum number of consecutive reused steps.",
            ),
        ],
    ),
    io.DynamicCombo.Option(
        "interval",
        [
            io.Int.Input(
                "interval",
                default=Interval.interval,
                min=1,
                max=50,
                tooltip="Compute every N-th step: 3 computes one step in three. 1 disables the cache.",
            ),
        ],
    ),
    io.DynamicCombo.Option(
        "chosen steps",
        [
            io.String.Input(
                "computed_steps",
                default="0-4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48",
                tooltip="Steps to compute, counted from 0: numbers and ranges, separated by commas. All others reuse.",
            ),
        ],
    ),
]


class ApplyCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_ApplyCache",
            display_name="Apply Cache",
            category=schema.CATEGORY,
            description="Runs the model on some sampling steps and reuses its output on the others. Works on any "
            "MODEL; computing every second step makes sampling about 2x faster.",
            search_aliases=[
                "cache",
                "faster",
                "speed up",
                "accelerate",
                "skip steps",
                "fewer steps",
                "teacache",
                "spectrum",
                "easycache",
                "first block cache",
                "fora",
                "feature cache",
                "\u52a0\u901f",
                "\u63d0\u901f",
                "\u7f13\u5b58",  # speed up, faster, cache
            ],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL. It is not changed."),
                io.DynamicCombo.Input(
                    "policy",
                    options=POLICIES,
                    tooltip="auto and balanced aim at 2x, safe at 1.5x, fast at 3x, and compute more where fewer steps "
                    "of the sampler would be as good. The others say exactly which steps compute.",
                ),
                io.Int.Input(
                    "order",
                    default=1,
                    min=0,
                    max=2,
                    advanced=True,
                    tooltip="0 reuses the last computed step unchanged, 1 extrapolates linearly from the last two, 2 "
                    "adds half their curvature from the last three. auto, safe, balanced and fast choose it "
                    "themselves.",
                ),
                schema.fraction(
                    "start_percent",
                    0.0,
                    "Fraction of the run at which reuse begins; every step before it is computed.",
                    optional=True,
                    advanced=True,
                ),
                schema.fraction(
                    "end_percent",
                    1.0,
                    "Fraction of the run at which reuse ends; every step after it is computed.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "reuse",
                    options=list(REUSE_OPTIONS),
                    default=REUSE_OPTIONS[0],
                    optional=True,
                    advanced=True,
                    tooltip="What is reused: the whole prediction, what the transformer blocks add, what the last "
                    "block returns, or the outputs of attention and MLP (Load DiT models only).",
                ),
                io.Boolean.Input(
                    "offload",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Keep cached features in system memory instead of on the GPU. Slower; meant for blocks "
                    "of large models.",
                ),
                schema.Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="A calibration of the model without a cache, with the same steps and scheduler. It "
                    "places the computed steps of auto, safe, balanced, fast, speedup and number of steps.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # ComfyUI must not give one node what another with the same inputs made
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        policy: dict,
        order: int,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        reuse: str = REUSE_OPTIONS[0],
        offload: bool = False,
        calibration=None,
    ) -> io.NodeOutput:
        kind, distances = policy_class(policy), None
        warnings: list[str] = []
        if calibration is not None:
            calibration.check_fingerprint(fingerprint_of(model))
            if issubclass(kind, Placed):
                distances, warnings = placing(model, calibration)
            else:
                warnings = [
                    f"the policy {policy['policy']} does not use the calibration; auto, speedup and number of steps do"
                ]
        when = policy_of(policy, order, start_percent, end_percent, distances)
        settings = CacheSettings(when, reuse, offload, tuple(warnings), node_of(cls))
        off = ["With these settings the cache is off: every step is computed."] if when.off else []
        show(settings.node, "\n".join([*off, *(f"Warning: {text}" for text in warnings)]))
        return io.NodeOutput(apply_cache(model, settings))


def policy_class(policy: dict) -> type[CachePolicy]:
    return CLASSES[policy["policy"]]


def policy_of(policy: dict, order: int, start: float, end: float, distances=None) -> CachePolicy:
    """The policy that an option of the node describes."""
    kind, values = policy_class(policy), {FIELDS.get(name, name): value for name, value in policy.items()}
    option = values.pop("policy")
    if kind is Preset:
        values["level"] = option
    if kind is ChosenSteps:
        values["steps"] = frozenset(schema.parse_numbers(values["steps"]))
    if distances is not None:
        values["distances"] = distances
    return kind(**values, order=order, start=start, end=end)

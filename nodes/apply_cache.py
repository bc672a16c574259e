from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..qandc_core.caching.schedules import CacheConfig, CachePolicy
from .comfyui.caching import apply_cache
from .comfyui.types import CATEGORY, parse_numbers


class ApplyCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QandC_ApplyCache",
            display_name="Apply Cache",
            category=CATEGORY,
            description="Computes the transformer only on some steps and reuses its features on the others. On a model "
            "of Load DiT attention and MLP outputs are reused (FORA); on any other model the whole prediction.",
            search_aliases=["fora", "teacache", "easycache", "feature cache", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL; it stays as it is."),
                io.DynamicCombo.Input(
                    "policy",
                    options=[
                        io.DynamicCombo.Option("interval", [
                            io.Int.Input(
                                "interval", default=3, min=1, max=50,
                                tooltip="Compute every so many steps: 3 computes one step in three. 1 takes the "
                                "cache off.",
                            ),
                        ]),
                        io.DynamicCombo.Option("number of steps", [
                            io.Int.Input(
                                "computed", default=20, min=1, max=1000,
                                tooltip="How many steps to compute, evenly spaced.",
                            ),
                        ]),
                        io.DynamicCombo.Option("chosen steps", [
                            io.String.Input(
                                "computed_steps", default="0-4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48",
                                tooltip="The steps to compute, from 0, with commas and ranges; all others reuse.",
                            ),
                        ]),
                    ],
                    tooltip="Which steps are computed.",
                ),
                io.Int.Input(
                    "order", default=0, min=0, max=1, advanced=True,
                    tooltip="0 holds the last computed features; 1 extrapolates linearly from the last two.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Reuse from this part of the run on; every step before it is computed.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Reuse up to this part of the run; every step after it is computed.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the cache.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: io.Model.Type, policy: dict, order: int, start_percent: float = 0.0, end_percent: float = 1.0
    ) -> io.NodeOutput:
        config = CacheConfig(
            policy.get("interval", 1),
            frozenset(parse_numbers(policy["computed_steps"])) if "computed_steps" in policy else None,
            order=order,
        )
        return io.NodeOutput(
            apply_cache(model, CachePolicy(config, policy.get("computed"), start_percent, end_percent))
        )

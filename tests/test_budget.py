"""What a patch costs and what a machine affords."""

from unicon_pipeline.budget import training_costs
from unicon_pipeline.contract import CT_HU_RULE, FeatureLevel, FoundationSpec, InputContract


def test_a_costly_foundation_keeps_a_useful_patch_on_a_cpu():
    level = FeatureLevel((1, 1, 1), 32, 4)
    contract = InputContract(("CT",), "LPS", None, None, (8, 8, 8), {"CT": CT_HU_RULE})
    spec = FoundationSpec("net", {}, contract, "pyramid", level, (level,), 320, 1e9, "MIT")
    assert training_costs(spec, ("CT",), "patch", 2.0, True).budget == 32 * 64 * 64

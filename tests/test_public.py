"""What is public of the two packages: the list, its words, its types, and that importing it costs nothing."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from typing import get_type_hints

import pytest

from vmonarch_cli import Preset, PresetFields
from vmonarch_cli.presets import LABELS

PUBLIC = {
    "vmonarch_cli": {
        "Coverage",
        "ModelError",
        "MonarchSession",
        "Preset",
        "PresetError",
        "PresetFields",
        "StepAttention",
        "VmonarchError",
        "__version__",
        "disable_monarch",
        "enable_monarch",
        "load_preset",
        "monarch",
    },
    "vmonarch_kernels": {
        "DenseUnavailable",
        "Factors",
        "HeadNorm",
        "ImplUnavailable",
        "Inputs",
        "Norm",
        "Options",
        "Residual",
        "Rotation",
        "Rows",
        "Term",
        "attend",
        "attention_lse",
        "dense_attention",
        "dense_backends",
        "dense_choices",
        "dense_obstacle",
        "frame_attention",
        "gated_activation",
        "gated_residual",
        "gelu_tanh_",
        "gelu_tanh_rows",
        "layer_norm_modulate",
        "linear_e4m3",
        "linear_gelu_tanh",
        "monarch_attention",
        "monarch_factors",
        "qk_norm_rope",
        "quantize_rows",
        "residual_norm",
        "resolve_fused_impl",
        "resolve_impl",
    },
}
packages = pytest.mark.parametrize("package", PUBLIC)


@packages
def test_what_is_public_is_listed_and_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == PUBLIC[package]
    listed = [line for line in (module.__doc__ or "").splitlines() if line.startswith("- ")]
    assert {name for line in listed for name in re.findall(r"``(\w+)``", line.split(":")[0])} == PUBLIC[package]


@packages
def test_every_public_name_loads_and_explains_itself(package: str) -> None:
    module = importlib.import_module(package)
    for name in PUBLIC[package] - {"__version__"}:
        found = getattr(module, name)
        assert found.__name__ == name
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            typed = inspect.signature(found).parameters.values()
            assert all(parameter.annotation is not parameter.empty for parameter in typed), name
    with pytest.raises(AttributeError, match="no attribute 'monarc'"):
        module.monarc  # noqa: B018 - the access is the test


@packages
def test_importing_it_loads_nothing_but_itself(package: str) -> None:
    code = f"import sys; before = set(sys.modules); import {package}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("vmonarch")}
    assert ours == {package}
    assert "torch" not in done.stdout.split()


def test_the_fields_that_a_call_takes_are_those_of_a_preset() -> None:
    assert set(get_type_hints(PresetFields)) == set(Preset.model_fields) - set(LABELS)
    own = get_type_hints(Preset)
    assert {name: own[name] for name in get_type_hints(PresetFields)} == get_type_hints(PresetFields)

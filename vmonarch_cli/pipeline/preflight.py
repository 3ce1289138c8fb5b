"""What only torch can tell before any weight is read: device, dtype, implementation, and hopeless memory."""

from __future__ import annotations

from dataclasses import dataclass

from vmonarch_cli.errors import DeviceError, ModelError
from vmonarch_cli.plan import memory
from vmonarch_cli.plan.resolve import Plan
from vmonarch_cli.text import binary_size


@dataclass(frozen=True)
class Machine:
    """Where a plan will run: torch's device string, its name for people, dtype and attention implementation."""

    device: str
    device_name: str
    dtype: str
    impl: str
    """"reference", "torch" or "triton", or "dense" for a dense preset."""
    memory: str = ""
    """Where the weights will be and what that is expected to take; empty on a CPU."""


def check_machine(plan: Plan) -> Machine:
    """Resolve "auto" for this machine; DeviceError or ModelError when the plan cannot run on it (imports torch)."""
    from vmonarch_cli.pipeline.device import device_name, dtype_name, pick_device, pick_dtype
    from vmonarch_cli.pipeline.offload import mode_for

    device = pick_device(plan.device)
    dtype = pick_dtype(plan.dtype, device)
    name = dtype_name(dtype)
    placed = ""
    if device.type == "cpu":
        check_cpu_memory(plan, name)
    else:
        placed = mode_for(plan, device, dtype)[1]
    impl = "dense"
    if plan.preset.attention != "dense":
        from vmonarch_kernels import ImplUnavailable, resolve_impl

        try:
            impl = resolve_impl(plan.preset.impl, device, dtype, plan.model.head_dim)
        except ImplUnavailable as error:
            raise DeviceError(str(error)) from None
    return Machine(str(device), device_name(device), name, impl, placed)


def check_cpu_memory(plan: Plan, dtype: str) -> None:
    """ModelError when the weights and the smallest working set exceed what this machine can give."""
    need = memory.at_least(plan.model, plan.grid, plan.height, plan.width, plan.num_frames, dtype)
    have = memory.available_bytes()
    if need > have:
        raise ModelError(
            f"too little memory: {plan.model.alias} at {plan.width}x{plan.height} with {plan.num_frames} frames in "
            f"{dtype} needs at least {binary_size(need)} and {binary_size(have)} are free: choose a smaller model "
            "or size, or a narrower --dtype"
        )

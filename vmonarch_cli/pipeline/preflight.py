"""What only torch can tell before any weight is read: device, dtype, implementation, and where the weights will be.

Everything here is decided once. The decision is a `Machine`, which the run takes: nothing reads the free memory again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmonarch_cli.errors import DeviceError, ModelError
from vmonarch_cli.machine.memory import available_bytes
from vmonarch_cli.media.ffmpeg import CODECS, require_encoder
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.plan.memory import at_least, shape_of
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.setup import Setup
from vmonarch_cli.plan.small_calls import SmallCalls, all_dense, dense_limit, small_words
from vmonarch_cli.presets import Preset
from vmonarch_cli.text import binary_size


@dataclass(frozen=True)
class Machine:
    """Where plans of one model run: torch's device string, its name for people, dtype, implementation, offload mode."""

    device: str
    device_name: str
    dtype: str
    impl: str
    """The implementation that "auto" stands for: "torch" or "triton"; see `impl_of`."""
    offload: str = "none"
    """Where the weights are: "none", "model", "group" or "sequential"."""
    memory: str = ""
    """One line on the offload mode and what it is expected to take; empty on a CPU."""
    tiles: bool = False
    """Frames are decoded in tiles, because full ones would not fit the memory."""
    vae_dtype: str = "auto"
    """What the VAE decodes in; "auto" is what its family needs."""
    fused_impls: tuple[str, ...] = ()
    """What runs fused blocks of its plans, "triton" or "torch"; each plan has one of them or none, see `fused_of`."""
    dense: tuple[str, ...] = ("sdpa",)
    """Dense attention, see `vmonarch_kernels.dense_choices`: what runs it, and what else samples compare with."""
    free_bytes: int | None = None
    """Memory of the GPU that was free when all this was decided; None on a CPU."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def facts(self, threads: int) -> dict[str, str | int]:
        """What a record says of the device; `threads`: of torch on the CPU."""
        return {"type": self.device, "name": self.device_name, "threads": threads}

    def decided(self, plan: Plan) -> Setup:
        """A plan's setup with what this machine decided, for a model that serves all its plans.

        Blocks are fused where one of these has them so: `fuse.switch` makes them the stock ones for another.
        """
        fused = self.fused_of(plan) or next(iter(self.fused_impls if PIPELINES[plan.pipeline].fuses else ()), None)
        decided = {"offload": self.offload, "vae_dtype": self.vae_dtype, "fused_impl": fused}
        return plan.setup.model_copy(update={**decided, "vae_tiling": plan.setup.vae_tiling or self.tiles})

    def fused_of(self, plan: Plan) -> str | None:
        """What the fused blocks of a plan's clips run with, whatever other plans there are: Triton, or torch beside an
        implementation in it. None for stock blocks: without a fused form, and where nobody chose and nothing is gained.
        """
        impl = _fused_impl(plan, self)
        return impl if impl in self.fused_impls and PIPELINES[plan.pipeline].fuses else None

    def small_of(self, plan: Plan) -> SmallCalls:
        """What becomes of a plan's small calls: as asked for, or dense where Triton's launches would take longer."""
        gpu = self.device_name if self.on_gpu and self.impl_of(plan.preset) == "triton" else None
        limit = dense_limit(plan.setup, plan.preset, gpu, plan.model.hidden_dim)
        return SmallCalls(limit, plan.setup.graphs)

    def runs_dense(self, plan: Plan) -> bool:
        """Whether all calls of a plan run dense because they are small."""
        return all_dense(plan.tokens, plan.preset, self.small_of(plan).dense_below)

    def why_dense(self, plan: Plan) -> str | None:
        """Why all calls of a plan run dense where they are small; None where they are not."""
        if not self.runs_dense(plan):
            return None
        return small_words(plan.tokens, self.small_of(plan).dense_below, asked=plan.setup.dense_below is not None)

    def impl_of(self, preset: Preset) -> str:
        """The implementation of a preset's attention: "reference", "torch" or "triton"; "dense" for a dense preset."""
        if preset.attention == "dense":
            return "dense"
        return self.impl if preset.impl == "auto" else preset.impl


def check_machine(plan: Plan) -> Machine:
    """Resolve "auto" for this machine; DeviceError or ModelError when the plan cannot run on it (imports torch)."""
    return check_machine_for([plan])


def check_machine_for(plans: Sequence[Plan]) -> Machine:
    """One machine for several plans of one loaded model: the offload mode is the fastest that all of them fit in.

    plans: at least one, all with the same model, device, dtype and setup.
    Raises DeviceError for a device, implementation, 8-bit arithmetic or video encoder that is not there, ModelError
    when a plan does not fit the memory.
    """
    from vmonarch_cli.pipeline.offload import mode_for

    _check_encoder(plans)
    machine = _machine(plans[0])
    _check_quantize(plans[0], machine)
    # Of thousands of prompts most differ in nothing that counts here.
    kinds = {(plan.height, plan.width, plan.num_frames, plan.preset, plan.guidance_scale): plan for plan in plans}
    if machine.on_gpu:
        placed = mode_for(list(kinds.values()), machine.device, machine.dtype)
        machine = replace(machine, offload=placed.mode, memory=placed.words, tiles=placed.tiles, free_bytes=placed.free)
    else:
        for plan in kinds.values():
            check_cpu_memory(plan, machine.dtype)
    machine = replace(machine, dense=_dense(plans[0], machine))
    for preset in {plan.preset for plan in plans if plan.preset.attention != "dense"}:
        _check_impl(preset.impl, machine, plans[0])
    return replace(machine, fused_impls=_fused_impls(plans, machine))


def machine_to_decode(plan: Plan) -> Machine:
    """Where saved latents of a plan are decoded: a decoder alone fits wherever any mode of the whole model does."""
    from vmonarch_cli.pipeline.offload import tiles_to_decode

    _check_encoder([plan])
    machine = _machine(plan)
    return replace(machine, tiles=machine.on_gpu and tiles_to_decode(plan, machine.device, machine.dtype))


def _check_encoder(plans: Sequence[Plan]) -> None:
    for ending in CODECS:
        if any(path.suffix.lower() == ending for plan in plans for path in plan.outputs):
            require_encoder(ending)


def _machine(plan: Plan) -> Machine:
    from vmonarch_cli.pipeline.device import device_name, dtype_name, pick_device, pick_dtype, pick_vae_dtype
    from vmonarch_kernels import resolve_impl

    device = pick_device(plan.device)
    dtype = pick_dtype(plan.dtype, device)
    impl = resolve_impl("auto", device, dtype, plan.model.head_dim)
    vae_dtype = dtype_name(pick_vae_dtype(plan, dtype))
    return Machine(str(device), device_name(device), dtype_name(dtype), impl, vae_dtype=vae_dtype)


def _check_quantize(plan: Plan, machine: Machine) -> None:
    import torch

    from vmonarch_cli.pipeline.device import DTYPES
    from vmonarch_cli.pipeline.quantize import check_quantize

    check_quantize(plan.setup.quantize, torch.device(machine.device), DTYPES[machine.dtype])


def _dense(plan: Plan, machine: Machine) -> tuple[str, ...]:
    import torch

    from vmonarch_cli.pipeline.device import DTYPES
    from vmonarch_kernels import DenseUnavailable, dense_choices

    try:
        return dense_choices(
            plan.setup.dense_attention, torch.device(machine.device), DTYPES[machine.dtype], plan.model.head_dim
        )
    except DenseUnavailable as error:
        raise DeviceError(str(error)) from None


def _check_impl(impl: str, machine: Machine, plan: Plan) -> None:
    from vmonarch_cli.pipeline.device import DTYPES
    from vmonarch_kernels import ImplUnavailable, resolve_impl

    try:
        resolve_impl(impl, machine.device, DTYPES[machine.dtype], plan.model.head_dim)
    except ImplUnavailable as error:
        if not machine.on_gpu:
            raise DeviceError(f"impl {impl} needs a GPU, and this run is on the CPU: take torch, or auto") from None
        raise DeviceError(str(error)) from None


def _fused_impl(plan: Plan, machine: Machine) -> str | None:
    """What would run a plan's fused blocks; None where it has stock ones."""
    unasked = machine.on_gpu and plan.fuses_unasked
    if not (unasked if plan.setup.fuse is None else plan.setup.fuse):
        return None
    return "torch" if plan.in_torch else "triton"


def _fused_impls(plans: Sequence[Plan], machine: Machine) -> tuple[str, ...]:
    """What runs the fused blocks of plans, each implementation once.

    Where nobody chose and Triton cannot run, blocks are stock ones. Raises DeviceError where fused blocks are asked for
    and Triton cannot run: on a CPU nothing would be gained.
    """
    from vmonarch_cli.pipeline.device import DTYPES
    from vmonarch_kernels import ImplUnavailable, resolve_fused_impl

    found = []
    for impl in dict.fromkeys(_fused_impl(plan, machine) for plan in plans):
        try:
            found += [] if impl is None else [resolve_fused_impl(impl, machine.device, DTYPES[machine.dtype])]
        except ImplUnavailable as error:
            if plans[0].setup.fuse is None:
                continue
            if machine.on_gpu:
                raise DeviceError(f"--fuse: {error}") from None
            raise DeviceError(
                "--fuse runs Triton kernels, which need a GPU, and this run is on the CPU: leave it out, or add "
                "--impl torch for the same operations in torch, which gain nothing"
            ) from None
    return tuple(found)


def check_cpu_memory(plan: Plan, dtype: str) -> None:
    """ModelError when the weights and the smallest working set exceed what this machine can give."""
    need = at_least(plan.model, shape_of(plan), dtype)
    have = available_bytes()
    if need > have:
        raise ModelError(
            f"too little memory: {plan.model.alias} at {plan.width}x{plan.height} with {plan.num_frames} frames in "
            f"{dtype} needs at least {binary_size(need)} and {binary_size(have)} are free: choose a smaller model "
            "or size, or a narrower --dtype"
        )

"""What is decided before any weight is read, once: device, dtype, implementation, and where the weights will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vmonarch_cli.errors import DeviceError, ModelError
from vmonarch_cli.pipeline import preflight
from vmonarch_cli.pipeline.preflight import Machine, check_machine, check_machine_for, machine_to_decode
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset

GB = 2**30


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(**flags: Any) -> Plan:
    return resolve(GenerateRequest(**{"prompt": "a cat", "model": "wan2.1-1.3b", "preset": "paper", **flags}))


class Card:
    """A GPU that is not there: its free memory, and how often somebody asked for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.asked = free, 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        self.asked += 1
        return self.free, self.free


def test_a_cpu_keeps_its_weights_and_computes_in_float32() -> None:
    machine = check_machine(plan(device="cpu", model="demo", prompt="a red circle"))
    assert (machine.device, machine.dtype, machine.impl, machine.offload) == ("cpu", "float32", "torch", "none")
    assert (machine.memory, machine.on_gpu) == ("", False)
    assert machine.device_name.startswith("CPU (")


def test_a_card_is_asked_once_for_its_memory_and_the_answer_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch, 80 * GB)
    machine = check_machine(plan(device="cuda"))
    assert (machine.offload, machine.dtype, card.asked) == ("none", "bfloat16", 1)
    assert machine.memory.startswith("offload none: all weights stay on the device, about ")
    card.free = 1 * GB
    assert machine.offload == "none", "decided already"
    with pytest.raises(ModelError, match="does not fit the memory in any offload mode"):
        check_machine(plan(device="cuda"))


def test_plans_that_take_turns_get_the_mode_that_the_largest_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = plan(device="cuda", size="256x256", num_frames=17), plan(device="cuda", size="1280x720")
    card = Card(monkeypatch, 80 * GB)
    both = [check_machine_for([small, large]).offload, check_machine_for([large, small]).offload]
    assert both == ["none", "none"]
    modes = {}
    for free in range(10, 20):
        card.free = free * GB
        modes[free] = [check_machine_for(plans).offload for plans in ([small], [large], [small, large], [large, small])]
        assert modes[free][1:] == [modes[free][1]] * 3, "the larger decides, whatever comes first"
    assert any(found[0] != found[1] for found in modes.values())


def test_a_mode_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, 80 * GB)
    machine = check_machine(plan(device="cuda", offload="group"))
    assert machine.offload == "group"
    assert machine.memory.startswith("offload group, as asked: about ")


def test_every_preset_of_the_plans_must_be_able_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plans = [plan(device="cpu", model="demo", prompt="a red circle", impl=impl) for impl in ("torch", "triton")]
    with pytest.raises(DeviceError, match="impl triton needs a GPU, and this run is on the CPU: take torch, or auto"):
        check_machine_for(plans)
    assert check_machine_for(plans[:1]).impl == "torch"


def test_each_preset_has_its_implementation() -> None:
    machine = Machine("cuda:0", "A card", "bfloat16", "triton")
    paper = load_preset("paper")
    named = paper.model_copy(update={"impl": "reference"})
    presets = (paper, named, load_preset("dense"))
    assert [machine.impl_of(preset) for preset in presets] == ["triton", "reference", "dense"]


def test_a_decoder_alone_is_not_refused_for_the_memory_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, 1 * GB)
    assert machine_to_decode(plan(device="cuda", offload="model")).offload == "none"


def test_memory_of_a_cpu_is_checked_for_the_largest_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (plan(device="cpu", num_frames=frames) for frames in (1, 1001))
    monkeypatch.setattr(preflight, "available_bytes", lambda: 35 * GB)
    assert check_machine(small).device == "cpu"
    with pytest.raises(ModelError, match=r"too little memory: wan2\.1-1\.3b at 832x480 with 1001 frames"):
        check_machine_for([small, large])

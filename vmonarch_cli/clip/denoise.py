"""One clip's latents: the pipeline's own loop, watched step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.clip.preview import Previews, StoppedEarly
from vmonarch_cli.errors import NonFiniteError, TooLargeError
from vmonarch_cli.media.pictures import load_picture
from vmonarch_cli.media.read import last_frames, read_frames
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.call import Embeddings, Latents, call_with_sound, sampling_of, takes_callback
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.timing import StepAttention


def denoise(
    pipeline: Any,
    session: AttentionSession,
    embeddings: Embeddings,
    plan: Plan,
    *,
    seed: int,
    on_step: Callable[[StepAttention], None] = lambda step: None,
    previews: Previews | None = None,
) -> Latents:
    """Latents (1, C, F, h, w), float32, of one clip of a plan, and those of its sound, made by the pipeline's own loop
    inside ``swapped``.

    The noise comes from a CPU generator of this clip, so that a seed means the same on every device. `previews` see
    what each step predicts, and may end the loop: the latents are then the prediction.
    Raises NonFiniteError, with the step's number, as soon as a latent is not finite.
    """

    def check(index: int, latents: torch.Tensor) -> None:
        if not torch.isfinite(latents).all():
            raise NonFiniteError(
                f"latents stopped being finite in step {index + 1} of {plan.steps}, and no clip was written: "
                f"a wider --dtype{'' if session.preset.attention == 'dense' else ', or dense attention,'} may help"
            )
        on_step(session.steps[-1])
        if previews is not None:
            previews.after_step(index, plan.steps)

    def after_step(_: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        check(index, tensors["latents"])
        return tensors

    # A pipeline without callbacks is followed through its scheduler.
    by_callback = takes_callback(pipeline)
    session.on_sample = None if by_callback else lambda sample: check(len(session.steps) - 1, sample)
    session.on_clean = None if previews is None else previews.on_clean

    def picture(path: str | None) -> Any:
        return None if path is None else conditioning_image(path, plan.height, plan.width)

    try:
        return call_with_sound(
            pipeline,
            embeddings,
            (plan.height, plan.width, plan.num_frames),
            **sampling_of(plan, seed),
            image=picture(plan.image),
            last_image=picture(plan.last_image),
            **({} if plan.video is None else _video(plan)),
            callback_on_step_end=after_step if by_callback else None,
        )
    except StoppedEarly as stopped:
        return Latents(stopped.latents, None)
    finally:
        session.on_sample = session.on_clean = None


@contextmanager
def fits_memory(plan: Plan, machine: Machine) -> Iterator[None]:
    """TooLargeError with what to do in the place of an out-of-memory error inside the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TooLargeError(
            f"{plan.width}x{plan.height} with {plan.num_frames} frames does not fit the memory of "
            f"{machine.device_name}: choose a smaller size or fewer frames"
        ) from None


def _video(plan: Plan) -> dict[str, Any]:
    """The given video as a pipeline takes it, frame by frame cut as a picture is. How far it is noised is in the plan's
    noise levels, of which the pipeline is to leave out none.
    """
    from PIL import Image, ImageOps

    path, last = Path(plan.video or ""), PIPELINES[plan.model.video_pipeline or plan.model.pipeline].continues
    frames = last_frames(path, last) if last else read_frames(path, plan.num_frames)
    pictures = [ImageOps.fit(Image.fromarray(frame), (plan.width, plan.height)) for frame in frames]
    return {"video": pictures, "strength": 1.0}


def conditioning_image(path: str, height: int, width: int) -> Any:
    """A picture that a model makes a clip around: its middle, cut to the clip's proportions, in RGB."""
    from PIL import ImageOps

    return ImageOps.fit(load_picture(Path(path), f"image {path}"), (width, height))

"""What a comparison came to, in sentences. No torch."""

from __future__ import annotations

from vmonarch_cli.review.compare.results import ComparedClip, Comparison
from vmonarch_cli.text import as_fast, seconds


def verdict(comparison: Comparison) -> list[str]:
    """Two sentences on each clip but the reference: what it gained, and how close its frames are."""
    return [line for clip in comparison.others for line in (_gain(comparison, clip), _closeness(comparison, clip))]


def _gain(comparison: Comparison, clip: ComparedClip) -> str:
    """'fast was faster than dense: attention 20.1 s against 51.2 s, 2.55x as fast; end to end 1.61x as fast'."""
    reference = comparison.reference
    attention, whole = comparison.speedup(clip, "attention_s"), comparison.speedup(clip, "end_to_end_s")
    if attention is None or clip.attention_s is None or reference.attention_s is None:
        return f"{clip.name} and {reference.name}: their times say nothing about each other"
    both = f"attention {seconds(clip.attention_s)} against {seconds(reference.attention_s)}"
    if comparison.same_work(clip):
        return f"{clip.name} does as many operations as {reference.name}: {both}"
    if not comparison.differs(clip):
        return f"{clip.name} and {reference.name} took the same time, as far as can be told here: {both}"
    better = "faster" if attention > 1 else "slower"
    words = f"{clip.name} was {better} than {reference.name}: {both}, {as_fast(attention)}"
    return words if whole is None else f"{words}; end to end {as_fast(whole)}"


def _closeness(comparison: Comparison, clip: ComparedClip) -> str:
    """'its frames are 24.1 dB PSNR and 0.931 SSIM from the dense ones'."""
    if clip.distance is None:
        return f"{clip.name}: its frames have another shape"
    if clip.distance.identical:
        return f"{clip.name}: every pixel is {comparison.reference.name}'s"
    near = f"{clip.name}: its frames and {comparison.reference.name}'s have a PSNR of {clip.distance.psnr:.1f} dB"
    return near if clip.distance.ssim is None else f"{near} and an SSIM of {clip.distance.ssim:.3f}"

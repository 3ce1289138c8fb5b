"""Swap the self-attention of a video transformer, count and time its calls, and put it back.

``swapped(pipeline, preset)`` is the only thing most callers need::

    with swapped(pipeline, preset, sample_dense_every=10) as session:
        pipeline(prompt=...)
    print(session.coverage(), session.steps)

One module, one job: ``swap`` finds the layers and watches the scheduler, ``processors`` holds a replacement for
each model family, ``op`` is the one node that torch.compile sees, ``session`` decides, counts and times every
call, ``warm`` keeps the L factors between steps, ``clock`` reads time on a CPU and on a GPU.
"""

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.swap import swapped

__all__ = ["AttentionSession", "swapped"]

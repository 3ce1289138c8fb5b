"""Whether the weights of a safetensors file are finite, read in pieces and without torch: before anything loads."""

from __future__ import annotations

from pathlib import Path

from vmonarch_cli.errors import ModelError
from vmonarch_cli.models.weights import read_layout
from vmonarch_cli.untrusted.files import once_a_content

FLOATS: dict[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Type of a tensor -> integers of its width, and the bits that are all set in a number that is not finite."""
_PIECE = 1 << 22


@once_a_content
def first_not_finite(path: Path, name: str) -> str | None:
    """The first tensor of a file, in the order of their bytes, with a value that is not finite, or None.

    Types other than floats of 16 to 64 bits are not read. Each ModelError opens with `name` and the path.
    """
    import numpy as np  # slow to import, and most commands need none of it

    layout = read_layout(path, name)
    with path.open("rb") as file:
        for key, (begin, end) in sorted(layout.spans.items(), key=lambda item: item[1]):
            if layout.tensors[key].dtype not in FLOATS:
                continue
            kind, exponent = FLOATS[layout.tensors[key].dtype]
            file.seek(begin)
            while begin < end:
                piece = file.read(min(_PIECE, end - begin))
                if not piece:
                    raise ModelError(f"{name} {path} became shorter while it was read")
                begin += len(piece)
                bits = np.frombuffer(piece, kind) & np.array(exponent, kind)
                if (bits == exponent).any():
                    return key
    return None

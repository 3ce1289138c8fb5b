"""Decode saved latents outside the run that made them; a batch's manifest is kept true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmonarch_cli.batch.claims import Claims
from vmonarch_cli.batch.manifest import FILE, Manifest, happened
from vmonarch_cli.clip.events import Event
from vmonarch_cli.clip.interrupts import Interrupts
from vmonarch_cli.clip.latents import SavedLatents, load_latents, remove_latents
from vmonarch_cli.clip.make import ClipMaker
from vmonarch_cli.errors import InputError, OutputError, VmonarchError
from vmonarch_cli.media.paths import LATENTS_ENDING, record_path
from vmonarch_cli.pipeline.decode_retry import is_out_of_memory
from vmonarch_cli.pipeline.preflight import machine_to_decode
from vmonarch_cli.plan.checks import device as checked_device
from vmonarch_cli.plan.checks import dtype as checked_dtype
from vmonarch_cli.timing import ClipResult


@dataclass(frozen=True)
class Outcome:
    """What became of one latents file: the clip, or why there is none."""

    latents: Path
    path: Path | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"latents": str(self.latents), "path": self.path and str(self.path), "error": self.error}


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The latents files among files and folders, in order; InputError for a path that gives none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(f"*{LATENTS_ENDING}")) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} has no latents to decode: they end in {LATENTS_ENDING}")
        if not inside[0].is_file():
            raise InputError(f"there is no file or folder {path}")
        if not inside[0].name.endswith(LATENTS_ENDING):
            raise InputError(f"{path} holds no latents: the files that decode takes end in {LATENTS_ENDING}")
        found += inside
    return list(dict.fromkeys(found))


def decode_files(
    files: Sequence[Path],
    output: Path | None,
    *,
    device: str | None,
    vae_dtype: str | None,
    keep: bool,
    overwrite: bool,
    interrupts: Interrupts,
    on_event: Callable[[Event], None],
) -> list[Outcome]:
    """Decode every file into `output`, or beside it; each decoder is loaded once for consecutive files.

    InputError before anything is loaded when a file does not read or a clip exists; what fails later is an outcome.
    """
    device, vae_dtype = checked_device(device), checked_dtype(vae_dtype, "--vae-dtype")
    saved = [(file, _relocated(load_latents(file), file, output, device, vae_dtype)) for file in files]
    for _, latents in saved:
        path = latents.plan.outputs[latents.index]
        for taken in (path, record_path(path)):
            # In its own batch folder a clip without an end in the manifest is this clip's, half done.
            if taken.exists() and not overwrite and not (latents.key and output is None):
                raise InputError(f"{taken} exists already: pass --overwrite to replace it, or another --output")
    outcomes = []
    loaded: tuple[tuple[str, ...], ClipMaker] | None = None
    for file, latents in saved:
        kind = (latents.plan.model_source, latents.plan.device, latents.plan.dtype, latents.plan.setup.vae_dtype)
        if loaded is None or loaded[0] != kind:
            loaded = None  # the model before goes first: both may not fit
            loaded = (kind, ClipMaker(latents.plan, machine_to_decode(latents.plan), on_event=on_event, to_decode=True))
        outcomes.append(_decode(file, latents, loaded[1], keep, overwrite, interrupts))
    return outcomes


def _relocated(
    saved: SavedLatents, file: Path, output: Path | None, device: str | None, vae_dtype: str | None
) -> SavedLatents:
    """The same latents with their clip's place, and the device and the dtype to decode in."""
    names = [path.name for path in saved.plan.outputs]
    outputs = tuple((output or file.parent) / name for name in names)
    setup = saved.plan.setup
    if vae_dtype is not None:
        setup = setup.model_copy(update={"vae_dtype": vae_dtype})
    plan = saved.plan.model_copy(update={"outputs": outputs, "device": device or "auto", "setup": setup})
    return SavedLatents(plan, saved.index, saved.denoised, saved.key)


def _decode(
    file: Path, saved: SavedLatents, maker: ClipMaker, keep: bool, overwrite: bool, interrupts: Interrupts
) -> Outcome:
    with ExitStack() as stack:
        manifest, claim = None, None
        if saved.key and saved.plan.outputs[saved.index].parent == file.parent and (file.parent / FILE).is_file():
            manifest = Manifest(file.parent)
            claims = stack.enter_context(Claims(file.parent))
            claim = claims.take(saved.key)
            if claim is None:
                return Outcome(file, error=f"{claims.owner(saved.key)} is making this clip")
            stack.enter_context(claim)
        try:

            def written(result: ClipResult) -> None:
                if manifest is not None:
                    done = happened("done", saved.key, retries=result.record["retries"], seconds=result.timing.total_s)
                    manifest.append(done)
                if not keep:
                    remove_latents(file)

            with interrupts.finishing():
                result = maker.finish(
                    saved.plan,
                    saved.index,
                    saved.denoised,
                    overwrite=overwrite or manifest is not None,
                    work=None if claim is None else claim.work,
                    on_written=written,
                )
            return Outcome(file, path=result.path)
        except OutputError:
            raise
        except VmonarchError as error:
            return Outcome(file, error=error.message)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Outcome(file, error="decoding ran out of memory, in every way that it was tried")

"""What the scorer measured, as tables."""

from __future__ import annotations

from typing import Any


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    from vmonarch_cli.demo.reader import ATTRIBUTES

    console = Console()
    table = Table(title="Agreement of clips with their prompts")
    for column in ("", "clips", *ATTRIBUTES):
        table.add_column(column, justify="left" if not column else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    if "reader" in result:
        reader = result["reader"]
        table.add_row("reader on rendered clips", str(reader["clips"]), *(percent(reader[a]) for a in ATTRIBUTES))
    if "reader_through_vae" in result:
        reader = result["reader_through_vae"]
        table.add_row("  through the autoencoder", str(reader["clips"]), *(percent(reader[a]) for a in ATTRIBUTES))
    for name, entry in result["presets"].items():
        table.add_row(name, str(entry["prompts"]), *(percent(entry[a]) for a in ATTRIBUTES))
        singles = entry["prompts"] - entry["pairs"]
        table.add_row("  one object", str(singles), *(percent(entry["single"][a]) for a in ATTRIBUTES))
        table.add_row("  two objects", str(entry["pairs"]), *(percent(entry["pair"][a]) for a in ATTRIBUTES))
        if entry["several_motions"]:
            shares = (percent(entry["several"][a]) for a in ATTRIBUTES)
            table.add_row("  several motions", str(entry["several_motions"]), *shares)
    console.print(table)
    if "vae" in result:
        vae = result["vae"]
        console.print(
            f"Autoencoder on {vae['clips']} held-out clips: {vae['psnr']:.2f} dB (first, middle and last frame "
            f"{vae['psnr_first']:.2f}, {vae['psnr_middle']:.2f}, {vae['psnr_last']:.2f})"
        )
    compared = {n: e["against_first"] for n, e in result["presets"].items() if "against_first" in e}
    if compared:
        first = next(iter(result["presets"]))
        pairs = Table(title=f"Distance from {first}, same prompts and noise, median (worst)")
        for column in ("preset", "PSNR dB", "SSIM", "latent error", "its mean"):
            pairs.add_column(column, justify="left" if column == "preset" else "right")
        for name, c in compared.items():
            pairs.add_row(
                name,
                f"{c['psnr_median']:.2f} ({c['psnr_worst']:.2f})",
                f"{c['ssim_median']:.4f} ({c['ssim_worst']:.4f})",
                f"{c['latent_error_median']:.4f} ({c['latent_error_worst']:.4f})",
                f"{c['latent_error_mean']:.4f}",
            )
        console.print(pairs)

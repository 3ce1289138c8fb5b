"""`vmonarch profile`: composes its commands."""

from __future__ import annotations

import typer

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.profile.clip import clip
from vmonarch_cli.cli.profile.kernel import kernel
from vmonarch_cli.cli.profile.model import model
from vmonarch_cli.cli.profile.quality import quality

profile_app = typer.Typer(
    help="Measure attention alone, whole model steps, whole clips, or accuracy against cost.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@profile_app.callback()
def profile(context: typer.Context) -> None:
    """Measure attention alone, whole model steps, whole clips, or accuracy against cost, on this machine."""
    if context.invoked_subcommand is None:
        Output().text(f"{context.get_help()}\n")


for command in (kernel, model, clip, quality):
    profile_app.command()(command)

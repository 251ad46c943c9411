"""Commands whose code is imported when they are run: torch takes a second, and help none."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer import rich_utils
from typer.core import TyperGroup
from typer.main import get_command

from fxfuse.cli.guard import guarded

#: Command → what the overview says about it. The function is in the file of its name in `commands`.
COMMANDS = {
    "demo": "Train four small networks on real images, fuse them, and compare.",
    "analyze": "Show the coupling groups of a network, and what is frozen and why.",
    "explain": "Explain one dimension of a parameter, or what couples it with another one.",
    "fuse": "Fuse trained networks of one architecture into one network.",
    "prune": "Remove the least important channels, neurons and heads of one network.",
    "sweep": "Fuse in several sizes, and write what each costs and how good it is.",
    "stack": "Write the ensemble as one graph that answers exactly as its members do.",
    "run": "Fuse as a recipe says; on a folder that fxfuse wrote, make its content again.",
    "recipe": "Print an example of a recipe or its JSON schema, or check a recipe.",
    "refit": "Apply the plan of a fusion again, and fit every layer to the members' activations.",
    "distill": "Make a fusion again, and train it on its ensemble's answers or on labels.",
    "compare": "Compare fused networks with their members and the ensemble, on the same data.",
    "bench": "Time a fused network beside one of its members and the ensemble.",
    "report": "Write a page that shows what a fusion did, and what came out on data.",
    "verify": "Check that fxfuse understands a network: run its oracles, exit 1 if one fails.",
}


class LazyGroup(TyperGroup):
    """A group that puts a command in the place of its stand-in when it is called."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the arguments; without any, print the overview, which is no mistake."""
        if not args:
            print(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name."""
        name = args[0]
        if name in COMMANDS:
            # What every run needs comes first, and is called so.
            rich_utils.OPTIONS_PANEL_TITLE = "Essentials"
            alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
            function = getattr(import_module(f"fxfuse.cli.commands.{name}"), name)
            alone.command(name)(guarded(function))
            self.commands[name] = get_command(alone)
        return super().resolve_command(ctx, args)


def stand_ins(app: typer.Typer) -> None:
    """Register a stand-in for every command, which the overview lists."""
    for name, summary in COMMANDS.items():
        app.command(name, help=summary)(_nothing)


def _nothing() -> None:
    """Is never run: the group puts the command in its place."""

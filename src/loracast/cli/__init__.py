"""The command line: `loracast COMMAND`. Each command is a thin file here; the work is done elsewhere.

Exit codes: 0 done; 1 loracast refused or failed (one line on standard error); 2 wrong usage; 130 stopped by Ctrl-C.
Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from loracast import LoracastError, __version__
from loracast.cli.commands import CommandGroup, add
from loracast.cli.terminal import EXIT_CODE, prompt_interrupts, say, warn


class Program(CommandGroup):
    """The group of all commands. It turns errors into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        is_debug = bool(ctx.params.get("verbose"))
        try:
            with warnings.catch_warnings():
                if not is_debug:
                    _show_own_warnings_only()
                return super().invoke(ctx)
        except (KeyboardInterrupt, typer.Abort):  # Abort: at a question
            raise typer.Exit(EXIT_CODE) from None
        except (LoracastError, OSError) as error:
            if is_debug or isinstance(error, BrokenPipeError):
                raise
            say(f"error: {error}")
            raise typer.Exit(1) from None


def _show_own_warnings_only() -> None:
    """Show loracast's warnings as lines on standard error; those of its dependencies are for developers."""
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"loracast\b")
    warnings.showwarning = lambda message, *where, **more: warn(str(message))


def _is_no_advice_to_torchao(record: logging.LogRecord) -> bool:
    """Whether torch logs anything but its advice to torchao, which transformers imports with every model."""
    return "Calling register_constant() on Enum subclasses" not in record.getMessage()


app = typer.Typer(
    cls=Program,
    help="Cast documents into LoRAs for a frozen language model, and ask questions about them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback with local variables would show the documents
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loracast {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", envvar="LORACAST_DEBUG", help="Show tracebacks and all warnings.")
    ] = False,
) -> None:
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("torch.utils._pytree").addFilter(_is_no_advice_to_torchao)
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels for GPUs that are not there
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers and of the hub


_PACKAGE = "loracast.cli"
add(app, _PACKAGE, "learn:learn", "learn:task", "ask:ask", "ask:chat", "show:list_", panel="Learn and ask")
add(app, _PACKAGE, "serve:serve", "serve:stop", panel="Serve")
add(
    app,
    _PACKAGE,
    *("folder:sync", "folder:watch", "show:search", "show:route", "show:show", "show:inspect", "show:diff"),
    *("upkeep:edit", "upkeep:combine", "upkeep:rm", "upkeep:gc", "upkeep:compact", "upkeep:verify"),
    *("exchange:store", "exchange:push_adapter", "exchange:pull_adapter", "exchange:pull"),
    panel="Library",
)
add(
    app,
    _PACKAGE,
    "exchange:export",
    "exchange:export_base",
    "upkeep:import_",
    "exchange:deploy",
    panel="Other runtimes",
)
add(app, _PACKAGE, "models:models", "models:demo", "models:convert", panel="Models")
for _commands in entry_points(group="loracast.commands"):  # other packages' commands, such as those of the lab
    _commands.load()(app)


def main() -> None:
    """The entry point of the `loracast` program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may have letters that the terminal lacks: print "?" for them
            stream.reconfigure(errors="replace")
    with prompt_interrupts():
        app(prog_name="loracast")

"""`baton completion`: the script that teaches a shell to complete `baton`.

Click brings the scripts and the protocol behind them (`_BATON_COMPLETE`); what it lacks is a
command that a person finds.
"""

from collections.abc import Callable

import click
from click.shell_completion import CompletionItem, get_completion_class

from coordinator.cli.settings import common_options


def paths(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What completes a text that is a path here: a "file" or a "dir"."""
    return lambda context, parameter, begun: [CompletionItem(begun, type=kind)]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@common_options
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash, in ~/.bashrc:   eval "$(baton completion bash)"     (bash 4.4 or newer)
    zsh, in ~/.zshrc:     eval "$(baton completion zsh)"      (after compinit)
    fish:                 baton completion fish > ~/.config/fish/completions/baton.fish

    A new shell then completes commands and options when you press Tab.
    """
    chosen = get_completion_class(shell)
    assert chosen is not None, "click knows every shell of the choice above"
    script = chosen(context.find_root().command, {}, "baton", "_BATON_COMPLETE").source()
    from coordinator.cli.render import write_json
    from coordinator.cli.settings import settings_of

    if settings_of(context).as_json:
        write_json({"shell": shell, "script": script})
    else:
        click.echo(script)

"""`baton completion`: the script that teaches a shell to complete `baton`, and what is offered of
the fleet's own: jobs, nodes, projects.

Click brings the scripts and the protocol behind them (`_BATON_COMPLETE`); what it lacks is a
command that a person finds. Ids and names are asked of the coordinator. Tab is no place for a
sentence: one that does not answer in a moment, or refuses, has nothing to offer.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from coordinator.cli.settings import CommandFailed, common_options, settings_of

if TYPE_CHECKING:
    from coordinator.cli.client import Client

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

# Whoever presses Tab goes on typing otherwise.
ANSWER_S_MAX = 1.0
# One page: those that people still speak of.
JOBS_LOOKED_AT = 1000
# A shell asks before it shows more.
OFFERED_MAX = 100


def paths(kind: str) -> Completer:
    """What completes a text that is a path here: a "file" or a "dir"."""
    return lambda context, parameter, begun: [CompletionItem(begun, type=kind)]


def _known(ask: "Callable[[Client], Iterable[CompletionItem]]") -> Completer:
    """Of what the coordinator knows that which begins so, and is not on the line yet."""

    def complete(
        context: click.Context, parameter: click.Parameter, begun: str
    ) -> list[CompletionItem]:
        from coordinator.cli.client import Client

        settings = settings_of(context)
        try:
            with Client(
                replace(settings, timeout_s=min(ANSWER_S_MAX, settings.timeout_s))
            ) as client:
                known = list(ask(client))
        except (CommandFailed, click.UsageError):
            return []
        given = context.params.get(parameter.name or "") if parameter.nargs < 0 else None
        taken = [str(one) for one in given or ()]
        found = [one for one in known if one.value.startswith(begun) and one.value not in taken]
        return found[:OFFERED_MAX]

    return complete


def job_ids(*phases: str) -> Completer:
    """Jobs in one of these phases, of all of them if none is named, the newest first."""
    return _known(
        lambda client: [
            CompletionItem(str(job.id), help=f"{job.phase} {job.spec.name}")
            if job.trial is None
            else CompletionItem(str(job.trial.array_job_id), help=f"array {job.spec.name}")
            for job in client.jobs(list(phases), "", JOBS_LOOKED_AT, fold=True)[0]
        ]
    )


nodes = _known(
    lambda client: [CompletionItem(node.id, help=f"{node.phase}") for node in client.nodes()]
)
projects = _known(
    lambda client: [CompletionItem(project.name) for project in client.projects().projects]
)


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

    A new shell then completes commands, options and files when you press Tab, and, as far as the
    coordinator answers at once, jobs, nodes and projects.
    """
    chosen = get_completion_class(shell)
    assert chosen is not None, "click knows every shell of the choice above"
    script = chosen(context.find_root().command, {}, "baton", "_BATON_COMPLETE").source()
    from coordinator.cli.render import write_json

    if settings_of(context).as_json:
        write_json({"shell": shell, "script": script})
    else:
        click.echo(script)

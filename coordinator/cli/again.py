"""The command line that makes a command do the same again.

Problem: a figure is believed when it can be made again, and a command that is printed with options
that nobody typed, or without one that somebody did, is another one. So it has what was given, and
nothing else: defaults decide as before.
"""

import shlex
from typing import Any

import click


def again(context: click.Context) -> str:
    """The command with everything that it was given."""
    words = ["baton", context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        is_default = context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT
        if is_default or value is None or value is False or not parameter.expose_value:
            continue
        words += _said(parameter, value)
    return " ".join(words)


def _said(parameter: click.Parameter, value: Any) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [shlex.quote(str(value))]
    flag = parameter.opts[0]
    if value is True:
        return [flag]
    found = []
    for each in value if parameter.multiple else (value,):
        parts = each if isinstance(each, tuple) else (each,)
        text = "=".join(str(part).removesuffix(".0") for part in parts)
        found.append(f"{flag} {shlex.quote(text)}")
    return found

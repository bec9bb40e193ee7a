"""Completion of `hope` in a shell: commands, options, and names of runs, models and clusters.

hope completion bash >> ~/.bashrc
hope completion zsh >> ~/.zshrc
hope completion fish > ~/.config/fish/completions/hope.fish
"""

from __future__ import annotations

import argparse

from hope_megatron.config.presets import config_names

_BASH = """\
# completion of hope, by `hope completion bash`
_hope() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}" first="${{COMP_WORDS[1]}}"
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W "{commands}" -- "$current"))
        return
    fi
    case "$previous" in
        --cluster) COMPREPLY=($(compgen -W "{clusters}" -- "$current") $(compgen -f -- "$current")); return ;;
    esac
    case "$first" in
{cases}
    esac
}}
complete -o default -F _hope hope
"""
_CASE = '        {name}) COMPREPLY=($(compgen -W "{words}" -- "$current")) ;;'
_ZSH = """\
# completion of hope, by `hope completion zsh`
(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script to print")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    words = command_words()
    print(_fish(words) if args.shell == "fish" else (_ZSH if args.shell == "zsh" else "") + _bash(words), end="")
    return 0


def command_words() -> dict[str, list[str]]:
    """Second words and options of each first word, as their parsers know them."""
    from hope_megatron.cli.main import COMMANDS, command_parser

    words: dict[str, list[str]] = {}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        found = words.setdefault(first, [])
        if second:
            found.append(second)
        for action in command_parser(name)._actions:
            found += [option for option in action.option_strings if option.startswith("--")]
            if isinstance(action, argparse._SubParsersAction):
                found += list(action.choices)
    for first, kind in (("train", "runs"), ("launch", "runs"), ("plan", "models"), ("sweep", "sweeps")):
        words[first] += config_names(kind)  # type: ignore[arg-type]
    return {first: sorted(set(found)) for first, found in words.items()}


def _bash(words: dict[str, list[str]]) -> str:
    cases = "\n".join(_CASE.format(name=name, words=" ".join(found)) for name, found in words.items())
    return _BASH.format(commands=" ".join(words), clusters=" ".join(config_names("clusters")), cases=cases)


def _fish(words: dict[str, list[str]]) -> str:
    lines = ["# completion of hope, by `hope completion fish`"]
    lines.append(f"complete -c hope -n __fish_use_subcommand -f -a '{' '.join(words)}'")
    for name, found in words.items():
        plain = " ".join(word for word in found if not word.startswith("-"))
        condition = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c hope {condition} -a '{plain}'"] if plain else []
        lines += [f"complete -c hope {condition} -l {word[2:]}" for word in found if word.startswith("--")]
    return "\n".join(lines) + "\n"

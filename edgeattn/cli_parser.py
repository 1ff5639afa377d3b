"""The parser of the command `edgeattn`: errors of one line with the nearest name that there is, and completion."""
import argparse
import re

from edgeattn import hints
from edgeattn.arithmetic import KERNEL_SETS

SCHEMES, PARTS = ("float32", "static"), ("text", "vision", "encoder")  # edgeattn.types has them for type checkers
SHELLS = ("bash", "zsh", "fish")
EXIT_STATUS = ("Exit status: 0 done, 2 an error, which one line on standard error names, 130 interrupted, 141 "
               "nobody reads the output.")


class Words(argparse.HelpFormatter):
    """Help in the words and the form of `quant --help`."""

    def add_usage(self, usage, actions, groups, prefix=None):
        """The first line."""
        super().add_usage(usage, actions, groups, "Usage: " if prefix is None else prefix)

    def _format_action(self, action):
        """Without the word that stands for all commands, in front of them."""
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text


class Parser(argparse.ArgumentParser):
    """Of a command, or of one of its commands."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "epilog": EXIT_STATUS, "add_help": False, "formatter_class": Words,
                            **options})
        self._positionals.title, self._optionals.title = "Arguments", "Options"
        self.add_argument("-h", "--help", action="help", help="Show this message and exit.")

    def error(self, message):
        """End with one line, in the words that `quant` has for it."""
        unknown = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if unknown:
            message = f"No such command {unknown[1]!r}.{nearest(unknown[1], list(commands_of(self)))}"
        elif missing := re.match(r"the following arguments are required: (.*)", message):
            first = missing[1].split(", ")[0]
            message = f"Missing {'option' if first.startswith('-') else 'argument'} {_quoted(first)}."
        elif wrong := re.match(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", message):
            choices = ", ".join(repr(choice.strip("'")) for choice in wrong[3].split(", "))
            message = f"Invalid value for {_quoted(wrong[1])}: {wrong[2]} is not one of {choices}."
        elif wrong := re.match(r"argument (\S+): invalid int value: (.*)", message):
            message = f"Invalid value for {_quoted(wrong[1])}: {wrong[2]} is not a valid integer."
        elif bare := re.match(r"argument (\S+): expected (?:one|at least one) argument", message):
            message = f"Option {_quoted(bare[1])} requires an argument."
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def add_reading_options(self):
        """Add what an .onnx file, or a folder of several models, is read as."""
        self.add_argument("--part", choices=PARTS, default=None,
                          help="Of a folder: text or vision, a half of CLIP and its kind; encoder, the layers alone.")
        self.add_argument("--scheme", choices=SCHEMES, default=None,
                          help="Of an .onnx file with quantizers: static, its int8 layers by its own scales; float32 "
                               "unless given.")
        self.add_argument("--arithmetic", choices=KERNEL_SETS, default=None,
                          help="The TFLite kernel set to compute with; by default the one stored, or litert.")

    def refuse(self, left):
        """End for arguments that no option takes."""
        for argument in left:
            if argument.startswith("-"):
                name = argument.partition("=")[0]
                self.error(f"No such option {name!r}.{nearest(name, options_of(self))}")
        self.error(f"too many arguments: {' '.join(left)}")


def _quoted(names):
    """'-o' / '--output' of -o/--output."""
    return " / ".join(repr(name) for name in names.split("/"))


def nearest(name, names):
    """A sentence with the name that was probably meant; empty where none is near."""
    begin = [each for each in names if each.startswith(name)]
    return f" Did you mean {begin[0]!r}?" if len(begin) == 1 else hints.nearest(name, names)


def commands_of(parser):
    """Name -> the parser of each command."""
    action = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def options_of(parser):
    """The options of a command, long names."""
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


def completion(parser, shell):
    """The program for a shell that completes commands and options of a parser; what is neither is a file.

    Parameters
    ----------
    parser : Parser
        With commands.
    shell : str
        Of SHELLS.
    """
    commands, prog = commands_of(parser), parser.prog
    if shell == "fish":
        lines = [f"complete -c {prog} -n __fish_use_subcommand -f -a {name}" for name in commands]
        for name, command in commands.items():
            lines += [f"complete -c {prog} -n '__fish_seen_subcommand_from {name}' -l {option[2:]}"
                      for option in options_of(command)]
            lines += [f"complete -c {prog} -n '__fish_seen_subcommand_from {name}' -f -a {choice}"
                      for choice in _choices(command)]
        return "\n".join(lines)
    cases = "".join(f"        {name}) words='{' '.join([*_choices(command), *options_of(command)])}' ;;\n"
                    for name, command in commands.items())
    script = (f"_{prog}() {{\n"
              "    local words\n"
              '    case "${COMP_WORDS[1]}" in\n'
              f"{cases}"
              "        *) words='' ;;\n"
              "    esac\n"
              f"    [ \"$COMP_CWORD\" -eq 1 ] && words='{' '.join([*commands, *options_of(parser)])}'\n"
              '    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))\n'
              "}\n"
              f"complete -o default -F _{prog} {prog}")
    return f"autoload -U +X compinit bashcompinit && compinit && bashcompinit\n{script}" if shell == "zsh" else script


def _choices(command):
    return [choice for action in command._actions if not action.option_strings for choice in action.choices or ()]

"""Makes the parser of a command line, ``python -m MODULE``."""

import argparse


def parser_of(module: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose usage names the command as it is typed; before Python 3.14, argparse names the file.

    Args:
        module: ``__spec__.name`` of the module that is run.
        description: its docstring, shown as it stands.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module.removesuffix('.__main__')}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

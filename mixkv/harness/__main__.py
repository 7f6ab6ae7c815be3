"""``python -m mixkv.harness``: lm_eval's command line, which knows the model ``mixkv`` here.

lm_eval finds models in its own list and in what has been imported, and has no entry points for more.
"""

import sys


def main() -> None:
    """Runs lm_eval's command line on the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"lm_eval cannot be imported ({error}): pip install 'mixkv[harness]'")
    from . import lm  # noqa: F401

    cli_evaluate()


if __name__ == "__main__":
    main()

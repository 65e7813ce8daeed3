"""Convert GSM8K to what ``+task=gsm8k`` reads: ``OUT/train.parquet`` and the test set, ``OUT/gsm8k.parquet``.

    python -m verl_ext.tasks.gsm8k.prepare                     # from the hub to data/gsm8k
    python -m verl_ext.tasks.gsm8k.prepare --local downloads   # from gsm8k_train.jsonl and gsm8k_test.jsonl there

The files of its authors are ``train.jsonl`` and ``test.jsonl`` in github.com/openai/grade-school-math; these names are
found, too. All else is done by :mod:`verl_ext.tasks.math.prepare`, which prints what it read, rejected and changed.
"""

import sys

from verl_ext.command import parser_of
from verl_ext.tasks.math import prepare

NAME = "gsm8k"


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("verl_ext.tasks.gsm8k.prepare", __doc__)
    parser.add_argument(
        "--out", default=f"data/{NAME}", help=f"folder to write to, gsm8k.folder of the run; default: data/{NAME}"
    )
    parser.add_argument("--local", help="directory with the two files, instead of the hub")
    args = parser.parse_args(arguments)
    sets = ["--out", args.out, "--train", NAME, "--benchmarks", NAME]
    return prepare.main(sets + (["--local", args.local] if args.local else []))


if __name__ == "__main__":
    sys.exit(main())

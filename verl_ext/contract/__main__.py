"""``python -m verl_ext.contract``: compare the installed verl with the contract; ``--write`` brings that up to date."""

import sys

from verl_ext.contract.compare import Contract, changes, rewrite, unused, unwritten


def main() -> int:
    contract = Contract.load()
    uses = contract.uses()
    if "--write" in sys.argv[1:]:
        rewrite(uses)
        contract = Contract.load()
    lines = [line for check in (changes, unwritten, unused) for line in check(contract, uses)]
    print("\n".join(lines) or "verl is as the contract says")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Whether a trainer's command line is in order, without training anything: a job asks before it starts servers.

    python -m megatron_sip.config FLAGS OF megatron_sip.train ...

Servers that it names need not be there yet. Exits with 0, or with everything that is wrong.
"""

from __future__ import annotations

import sys

from megatron_sip.config.early_checks import check_flags
from megatron_sip.config.presets import expand_presets


def main() -> None:
    check_flags(expand_presets(sys.argv[1:]))


if __name__ == "__main__":
    main()

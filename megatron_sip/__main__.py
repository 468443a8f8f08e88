"""`python -m megatron_sip`, for where the console entry megatron-sip is not installed."""

from megatron_sip.one_node.command import main

if __name__ == "__main__":
    main()

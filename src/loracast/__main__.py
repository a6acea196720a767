"""`python -m loracast`: the command line."""

from loracast.cli import main

main()
